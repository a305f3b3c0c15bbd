"""Pretrain ARVideo: `python -m arvideo_dist.pretrain [--config FILE.yaml] [--section.field value ...]`."""

from __future__ import annotations

from arvideo_dist.command import start_run
from arvideo_dist.config.commands import PretrainConfig


def main(argv: list[str] | None = None) -> None:
    start_run(PretrainConfig, __doc__ or "", argv)


if __name__ == "__main__":
    main()
