"""What a run has trained: read by export, analysis and evaluation, and by runs that start from it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from arvideo_dist.config.commands import ROOTS, FinetuneConfig, PretrainConfig, TrainingConfig
from arvideo_dist.config.finetuning import ClassifierConfig
from arvideo_dist.config.model import DecoderConfig
from arvideo_dist.model.interchange import is_weights_file, read_classifier_weights, read_encoder
from arvideo_dist.model.kinds import build_model
from arvideo_dist.model.pretraining import PretrainingModel
from arvideo_dist.model.vit import ENCODER_SIZES, Encoder
from arvideo_dist.storage import Storage, shown
from arvideo_dist.tasks.kinds import task_of
from arvideo_dist.tasks.sequence import Readers
from arvideo_dist.train.checkpoint.layout import FOLDER, complete_checkpoints
from arvideo_dist.train.checkpoint.reader import Checkpoint

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)


@dataclass(frozen=True)
class Trained:
    """A complete checkpoint whose content is what its manifest says."""

    run: Storage
    checkpoint: Checkpoint

    @property
    def config(self) -> TrainingConfig:
        """The whole configuration of the run that wrote the checkpoint; ValueError if it does not train."""
        root: Any = ROOTS[self.checkpoint.state.get("command", PretrainConfig.command)]
        if not issubclass(root, TrainingConfig):
            raise ValueError(f"{self.checkpoint} is of a run of {root.command}, which trains nothing")
        config: TrainingConfig = root.model_validate(self.checkpoint.state["config"])
        return config

    @property
    def pretraining(self) -> PretrainConfig:
        """The same of a pretraining run; ValueError if it is none."""
        return self._config_of(PretrainConfig)

    @property
    def finetuning(self) -> FinetuneConfig:
        """The same of a fine-tuning run; ValueError if it is none."""
        return self._config_of(FinetuneConfig)

    def _config_of(self, kind: type[Config]) -> Config:
        config = self.config
        if not isinstance(config, kind):
            raise ValueError(f"{self.checkpoint} is of a run of {config.command}; give one of {kind.command}")
        return config

    @property
    def label(self) -> str:
        return f"{self.run.uri.partition('?')[0].rpartition('/')[2]} {self.checkpoint.name}"

    def load_module(self) -> nn.Module:
        """The task's module with the checkpoint's weights."""
        module = task_of(self.config).build()
        self.checkpoint.load_weights(module)
        return module

    def load_encoder(self) -> Encoder:
        """The encoder of a model of any task."""
        encoder = self.load_module().get_submodule("encoder")
        assert isinstance(encoder, Encoder)
        return encoder

    def load_model(self, decoder: DecoderConfig | None = None) -> PretrainingModel:
        """The same of a pretraining run; `decoder` in place of the run's if its parameters are the same."""
        config = self.pretraining
        model = build_model(config.model, decoder or config.decoder)
        self.checkpoint.load_weights(model)
        return model


def open_trained(source: str) -> Trained:
    """The newest complete checkpoint of the run `source`, or the checkpoint `source`: folders or URIs.

    Every part is compared with its digest. Raises ValueError if there is none, CheckpointError if it is damaged.
    """
    trained = open_state(source)
    trained.checkpoint.verify()
    return trained


def open_state(source: str) -> Trained:
    """As `open_trained`, but its parts are not looked at."""
    run, name = _find(source)
    return Trained(run, Checkpoint(run, name))


def read_weights(source: str) -> dict[str, torch.Tensor]:
    """An encoder's weights by our names: of a run or checkpoint, of an export, or in one of VideoMAE's layouts.

    Raises ValueError if there is none, CheckpointError if a checkpoint is damaged.
    """
    if is_file_or_folder_of_weights(source):
        return read_encoder(source)
    weights = open_trained(source).load_module().state_dict()
    return {
        name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")
    }


def read_classifier(source: str) -> dict[str, torch.Tensor]:
    """All weights of the classifier at `source`, by the names of `model.classifier.Classifier`.

    `source`: a run of finetune, one of its checkpoints, or a VideoMAEForVideoClassification folder. Raises
    ValueError if it is none, CheckpointError if a checkpoint is damaged.
    """
    if is_file_or_folder_of_weights(source):
        try:
            return read_classifier_weights(source)
        except ValueError as error:
            raise ValueError(f"{shown(source)}: {shown(error)}") from error
    trained = open_trained(source)
    trained.finetuning  # noqa: B018  # raises if it is of another task
    return trained.load_module().state_dict()


READERS = Readers(encoder=read_weights, classifier=read_classifier)


def classifier_of(source: str) -> tuple[ClassifierConfig, Trained | None]:
    """The configuration of the classifier at `source` (see `read_classifier`), and what it is a checkpoint of."""
    if not is_file_or_folder_of_weights(source):
        trained = open_state(source)
        return trained.finetuning.model, trained
    found = geometry_of(source)
    folder = Storage(source)
    content = json.loads(folder.read_bytes("config.json")) if found else {}
    if content.get("architectures") != ["VideoMAEForVideoClassification"] or "encoder" not in found:
        raise ValueError(
            f"{source} holds no classifier: give a run of finetune, one of its checkpoints, or a folder of "
            "transformers' VideoMAEForVideoClassification in one of the sizes of model.encoder"
        )
    return ClassifierConfig(**found, classes=len(content["id2label"])), None


def geometry_of(source: str) -> dict[str, Any]:
    """Fields of `EncoderConfig` that the encoder at `source` decides; a file of weights does not say.

    Raises ValueError if there is no encoder.
    """
    if not is_file_or_folder_of_weights(source):
        model = open_state(source).config.model
        return {name: getattr(model, name) for name in ("encoder", "frames", "image_size", "tubelet")}
    if is_weights_file(source) or not (folder := Storage(source)).exists("config.json"):
        return {}
    config = json.loads(folder.read_bytes("config.json"))
    size = (config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"])
    names = [name for name, known in ENCODER_SIZES.items() if known == size]
    patch = config["patch_size"]
    return {
        **({"encoder": names[0]} if names else {}),
        "frames": config["num_frames"],
        "image_size": config["image_size"],
        "tubelet": (config["tubelet_size"], patch, patch),
    }


def is_file_or_folder_of_weights(source: str) -> bool:
    """Whether `source` is not a run or one of its checkpoints, by what stands there."""
    if is_weights_file(source):
        return True
    above, _, name = source.partition("?")[0].rstrip("/").rpartition("/")
    if above.endswith(FOLDER) and name.startswith("step-"):
        return False
    return not complete_checkpoints(Storage(source))


def _find(source: str) -> tuple[Storage, str]:
    """The run and the name of the checkpoint that `source` names."""
    path, mark, query = source.partition("?")  # of an address in object storage
    *above, folder, name = ["", "", *path.rstrip("/").split("/")]
    if folder == FOLDER:
        run = Storage(("/".join(above[2:]) or ("/" if source.startswith("/") else ".")) + mark + query)
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
