"""Features of videos: `python -m arvideo_dist.embed SOURCE --data PATH [--split val] [--pooling mean|tokens]`.

The encoder of any run makes them: of each view the mean over its tokens, or all tokens. What is not given is taken
from the run: its data set and held-out split, its sampling, and a folder beside its checkpoints for the features.
"""

from __future__ import annotations

import argparse

from arvideo_dist.command import start_run
from arvideo_dist.config.commands import EmbedConfig
from arvideo_dist.of_run import begin, name_by_default
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.embedding import Embedding
from arvideo_dist.train.trained import READERS, geometry_of, is_file_or_folder_of_weights, open_state


def main(argv: list[str] | None = None) -> None:
    start_run(EmbedConfig, __doc__ or "", argv, of_source, add_source)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The flags that no configuration has."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="run of any training (its newest checkpoint), one of its checkpoints, a folder of transformers' "
        "VideoMAE, or a file of weights; such a file does not say its geometry: set model.encoder, model.frames, "
        "model.image_size and model.tubelet if they are not the defaults",
    )


def of_source(config: EmbedConfig, flags: argparse.Namespace) -> EmbedConfig:
    """The configuration with what the encoder at `flags.source` says. Raises ValueError if there is none."""
    source = Storage(flags.source).address
    trained = None if is_file_or_folder_of_weights(source) else open_state(source)
    model = geometry_of(source)
    if said := config.model.model_fields_set & {"init_from", *model}:
        fields = ", ".join(f"model.{name}" for name in sorted(said))
        raise ValueError(f"{fields}: SOURCE says its own; leave these unset")
    given, source = begin(config, source, trained, "embeddings")
    given["model"] = {**given.get("model", {}), **model, "init_from": source}
    chosen = config.embedding
    choices = [chosen.views, chosen.pooling, *({chosen.format} - {"parquet"})]
    given["run"].setdefault("name", name_by_default(config, given, trained, "embedding", *choices))
    config = EmbedConfig.model_validate(given)
    if trained is None:  # settings may not fit the weights: better known before any worker is
        task = Embedding(config)
        task.load(task.build(), READERS)
    return config


if __name__ == "__main__":
    main()
