"""A trained model from its run: what `export` and `analyze` read."""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.model.kinds import build_model
from arvideo_dist.model.pretraining import PretrainingModel
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Trained:
    """A complete checkpoint whose content is what its manifest says."""

    run: Storage
    checkpoint: Checkpoint
    model_config: ModelConfig
    decoder_config: DecoderConfig

    @property
    def config(self) -> PretrainConfig:
        """The whole configuration of the run that wrote the checkpoint."""
        return PretrainConfig.model_validate(self.checkpoint.state["config"])

    @property
    def label(self) -> str:
        return f"{self.run.uri.partition('?')[0].rpartition('/')[2]} {self.checkpoint.name}"

    def load_model(self, decoder: DecoderConfig | None = None) -> PretrainingModel:
        """The model with the checkpoint's weights; `decoder` in place of the run's where its parameters are
        the same."""
        model = build_model(self.model_config, decoder or self.decoder_config)
        self.checkpoint.load_weights(model)
        return model


def open_trained(source: str) -> Trained:
    """The newest complete checkpoint of the run `source`, or the checkpoint `source`: folders or URIs.

    Every part is compared with its digest. Raises ValueError where there is none, CheckpointError where it is
    damaged.
    """
    run, name = _find(source)
    checkpoint = Checkpoint(run, name)
    checkpoint.verify()
    config = checkpoint.state["config"]
    return Trained(
        run,
        checkpoint,
        ModelConfig.model_validate(config["model"]),
        DecoderConfig.model_validate(config["decoder"]),
    )


def _find(source: str) -> tuple[Storage, str]:
    """The run and the name of the checkpoint that `source` names."""
    *above, folder, name = ["", "", *source.rstrip("/").split("/")]
    if folder == FOLDER:
        run = Storage("/".join(above[2:]) or ("/" if source.startswith("/") else "."))
        if name not in complete_checkpoints(run):
            raise ValueError(f"{source} is not a complete checkpoint; {run.uri} has {_listed(run)}")
        return run, name
    run = Storage(source)
    if not complete_checkpoints(run):
        raise ValueError(
            f"{source} has no complete checkpoint: give a run's folder or one of its checkpoints"
        )
    return run, complete_checkpoints(run)[-1]


def _listed(run: Storage) -> str:
    return ", ".join(complete_checkpoints(run)) or "none"
