"""Where a run keeps what it makes."""

from __future__ import annotations

from arvideo_dist.config.commands import RunConfig
from arvideo_dist.storage import Storage


def run_folder(config: RunConfig) -> Storage:
    return Storage(config.run.storage_path).child(config.run.name)
