"""Fine-tune an encoder: `python -m arvideo_dist.finetune [--config FILE.yaml] --init-from SOURCE`.

SOURCE is a run of this project or one of its checkpoints, an export, VideoMAE's weights, or none. What is known of
its encoder (size, frames, pixels, tubelet) is taken over unless the configuration says otherwise.
"""

from __future__ import annotations

import argparse

from arvideo_dist.command import start_run
from arvideo_dist.config.commands import FinetuneConfig
from arvideo_dist.config.finetuning import ClassifierConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.train.checkpoint.layout import complete_checkpoints
from arvideo_dist.train.trained import geometry_of


def main(argv: list[str] | None = None) -> None:
    start_run(FinetuneConfig, __doc__ or "", argv, with_geometry)


def with_geometry(config: FinetuneConfig, flags: argparse.Namespace) -> FinetuneConfig:
    """The configuration with the geometry of `model.init_from` if it does not give its own."""
    source, given = config.model.init_from, config.model.model_fields_set
    if source is None:
        return config
    run = run_folder(config)
    if complete_checkpoints(run):  # it goes on from its own, and what it began from may be gone
        source = run.address
    found = {name: value for name, value in geometry_of(source).items() if name not in given}
    model = ClassifierConfig.model_validate({**config.model.model_dump(exclude_unset=True), **found})
    return config.model_copy(update={"model": model})


if __name__ == "__main__":
    main()
