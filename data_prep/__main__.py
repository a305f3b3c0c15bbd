"""Command line: `python -m data_prep SOURCE ... --out DIR --split NAME`, `verify`, `stats`."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from arvideo_dist.storage import PatientStorage, Storage
from data_prep.arguments import Arguments, options, parser
from data_prep.errors import UserError
from data_prep.prepare import prepare, run_settings, sole_writer, summary
from data_prep.worker import LocalPool


def _splits(storage: Storage, asked: str | None) -> list[str]:
    if asked:
        return [asked]
    stems = (re.fullmatch(r"dataset-(\w+)\.json", name) for name in storage.names())
    splits = [stem[1] for stem in stems if stem]
    if not splits:
        raise UserError(f"{storage.uri} holds no finished split (dataset-<split>.json)")
    return splits


def run_verify(arguments: Arguments) -> int:
    """Check splits; 0 if every promise holds, 1 if not."""
    from data_prep.verify import verify

    if arguments.decode != "all" and not arguments.decode.isdigit():
        raise UserError(f"--decode {arguments.decode}: a number or all")
    storage = PatientStorage(arguments.out)
    decode = None if arguments.decode == "all" else int(arguments.decode)
    reports = [
        verify(storage, split, decode, arguments.workers) for split in _splits(storage, arguments.split)
    ]
    for report in reports:
        for problem in report.problems[:50]:
            print(f"{report.split}: {problem}")
        if len(report.problems) > 50:
            print(f"{report.split}: ... and {len(report.problems) - 50} more (--report FILE has all)")
        read = f"{report.shards} shards, {report.samples} samples, {report.decoded} decoded"
        print(f"{report.split}: {read}: {len(report.problems) or 'no'} problem(s)")
    if arguments.report:
        Path(arguments.report).write_text(json.dumps([asdict(report) for report in reports], indent=1))
    return 1 if any(report.problems for report in reports) else 0


def run_stats(arguments: Arguments) -> int:
    """Print the figures of splits and write their pictures."""
    from data_prep.stats import stats

    storage = PatientStorage(arguments.out)
    for split in _splits(storage, arguments.split):
        print(stats(storage, split))
    return 0


def run(arguments: Arguments) -> int:
    """Prepare one split; returns the exit code."""
    started = time.monotonic()
    chosen = options(arguments)
    storage = PatientStorage(arguments.out)
    inputs = arguments.read(arguments)
    shard_size = chosen.shard_size(len(inputs.items))
    settings = run_settings(inputs, chosen.transcode, shard_size, arguments.shuffle_seed)
    pool = (storage, chosen.split, chosen.transcode, chosen.limits)

    def executor() -> AbstractContextManager[Any]:
        if arguments.ray_address:
            from data_prep.cluster import RayPool  # Ray takes a second to import

            return RayPool(arguments.ray_address, *pool)
        return LocalPool(chosen.workers, *pool)

    with sole_writer(storage, chosen.split):
        manifest, worked = prepare(inputs, storage, chosen.split, settings, executor, arguments.retry_rejects)
    print(summary(storage, manifest, inputs.remarks, time.monotonic() - started if worked else None))
    return 0 if manifest.samples else 1


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def main() -> int:
    arguments = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return {"verify": run_verify, "stats": run_stats}.get(arguments.command, run)(arguments)
    except ValidationError as error:
        first = error.errors()[0]
        flag = str(first["loc"][0]).replace("_", "-")
        _fail(f"--{flag} {first['input']}: {first['msg']}", 2)
    except ValueError as error:
        _fail(str(error), 2)
    except OSError as error:
        _fail(f"{error}; finished shards are kept: run the same command again once this is mended", 1)
    except sqlite3.Error as error:  # of the lists of inputs and results
        _fail(
            f"a file in the temporary folder: {error}; let TMPDIR name a folder with more room. "
            "Finished shards are kept: the same command continues",
            1,
        )
    except KeyboardInterrupt:
        _fail("interrupted; finished shards are kept: the same command continues", 130)


if __name__ == "__main__":
    sys.exit(main())
