"""What a large data set and an S3 store cost the run that reads them: memory, seconds at the start, requests.

    python -m benchmarks.scale [--rows N] [--shards N] [--before CHECKOUT] --json PATH

The data set is made up: a manifest and an index of so many rows and shards, and those shards that are read. The
store is moto's S3 server, the requests are counted on the way to it. With `--before` everything is also measured
with the package of another checkout, in turns with this one's; `benchmarks/scale_child.py` there must be one that
knows its package. Each measurement is a process of its own:

- start: a loader is made, on a node that has no copy of the index and on one that has; for one rank and for four at
  once. Seconds, requests, bytes of memory at the peak above what a small data set takes.
- workers: decode workers plan a thousand places each. PSS (shared pages are shared out) and USS (own pages), and
  how they grow from a small data set to the large one.
- requests: of clips, and of what a run does to its folder: look at the lease, renew it, save, restart.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.scale_child import CLIPS, MARK, PLANS, VIDEO_BYTES, WORKERS, samples_of

ROOT = Path(__file__).resolve().parent.parent
SMALL = (1000, 10)  # rows, shards
RANKS = 4


def make_data_set(folder: Path, rows: int, shards: int) -> None:
    """A manifest and an index, and no shards."""
    from arvideo_dist.data.index import (
        INDEX_SCHEMA,
        DatasetManifest,
        FileEntry,
        ShardEntry,
        index_name,
        manifest_name,
        shard_name,
    )

    folder.mkdir(parents=True)
    numbers, per_shard = np.arange(rows), rows // shards
    names = [shard_name("train", number) for number in range(shards)]
    columns = {
        "key": [f"class-{n % 400:03d}/{n:011d}_000001_000011" for n in range(rows)],
        "shard": pa.array(names).take(pa.array(numbers // per_shard)),
        "offset": pa.array(numbers % per_shard * VIDEO_BYTES),
        "size": pa.array(np.full(rows, VIDEO_BYTES)),
        "sha256": [hashlib.sha256(n.to_bytes(8, "little")).hexdigest() for n in range(rows)],
        "width": pa.array(np.full(rows, 340)),
        "height": pa.array(np.full(rows, 256)),
        "fps": pa.array(np.full(rows, 30.0)),
        "frames": pa.array(np.full(rows, 300)),
        "duration": pa.array(np.full(rows, 10.0)),
        "label": pa.array(numbers % 400),
        "label_name": [f"class {n % 400}" for n in range(rows)],
        "source": [f"class-{n % 400:03d}/{n:011d}_000001_000011.mp4" for n in range(rows)],
    }
    pq.write_table(pa.table(columns).cast(INDEX_SCHEMA), folder / index_name("train"))
    content = (folder / index_name("train")).read_bytes()
    index = FileEntry(name=index_name("train"), size=len(content), sha256=hashlib.sha256(content).hexdigest())
    entries = [
        ShardEntry(name=name, size=per_shard * VIDEO_BYTES, samples=per_shard, sha256=f"{number:064x}")
        for number, name in enumerate(names)
    ]
    manifest = DatasetManifest(
        split="train", samples=rows, rejects=0, labels=[], settings={}, fingerprint="0" * 64,
        index=index, rejects_file=index, shards=entries,
    )  # fmt: skip
    (folder / manifest_name("train")).write_text(manifest.model_dump_json())


class Bench:
    """The data sets in a store, and a way to measure them with a checkout's package."""

    def __init__(self, folder: Path, s3: Any, requests: Any, rows: int, shards: int) -> None:
        from arvideo_dist.storage import Storage

        self.folder, self.s3, self.requests = folder, s3, requests
        s3.make_bucket("scale")
        self.data = {}
        for name, size in (("small", SMALL), ("large", (rows, shards))):
            make_data_set(folder / name, *size)
            s3.put(Storage(str(folder / name)), f"scale/{name}")
            self.data[name] = s3.uri(f"scale/{name}", through=requests.address)
        samples = samples_of(str(folder / "large"))
        remote = Storage(s3.uri("scale/large"))
        content = bytes(rows // shards * VIDEO_BYTES)
        for row in {at.row for at in samples.order.locate(range(CLIPS))}:
            remote.write_bytes(samples.indexes[0][row].shard, content)
        self.runs = 0

    def child(
        self, checkout: Path, temporary: Path, *arguments: str
    ) -> tuple[dict[str, float], dict[str, dict[str, int]]]:
        """What the measurement gives, and the requests of each of its parts by method."""
        temporary.mkdir(exist_ok=True)
        environment = os.environ | {
            "PYTHONPATH": f"{checkout}:{checkout / 'benchmarks'}",
            "TMPDIR": str(temporary),
        }
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "import scale_child; scale_child.main()", *arguments]
        asked: dict[str, dict[str, int]] = {}
        part = "all"
        self.requests.seen.clear()
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=temporary
        ) as process:
            assert process.stdin
            assert process.stdout
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith(MARK):
                    asked[part] = self.take()
                    part = line.removeprefix(MARK).strip()
                    process.stdin.write("\n")
                    process.stdin.flush()
        if process.returncode:
            raise RuntimeError(f"{arguments} with {checkout} ended with exit code {process.returncode}")
        asked[part] = self.take()
        return json.loads(lines[-1]), asked

    def take(self) -> dict[str, int]:
        asked = dict(sorted(Counter(kind_of(each) for each in self.requests.seen).items()))
        self.requests.seen.clear()
        return asked | {"all": sum(asked.values())}

    def measure(self, checkout: Path) -> dict[str, Any]:
        self.runs += 1
        node = self.folder / f"node-{self.runs}"
        baseline, _ = self.child(checkout, node, "start", self.data["small"])
        result: dict[str, Any] = {"start": {}, "workers": {}, "requests": {}}
        for name in ("no copy of the index", "a copy of the index"):
            figures, asked = self.child(checkout, node, "start", self.data["large"])
            figures["peak_mb"] -= baseline["peak_mb"]
            result["start"][name] = figures | {"requests": asked["all"]}
        with ThreadPoolExecutor(RANKS) as ranks:
            at_once = [
                ranks.submit(
                    self.child, checkout, self.folder / f"shared-{self.runs}", "start", self.data["large"]
                )
                for _ in range(RANKS)
            ]
            figures_of = [each.result()[0] for each in at_once]
        result["start"][f"{RANKS} ranks at once, no copy"] = {
            "slowest_s": max(each["seconds"] for each in figures_of),
            "peak_mb_of_all": sum(each["peak_mb"] - baseline["peak_mb"] for each in figures_of),
        }
        small, large = (
            self.child(checkout, node, "workers", self.data[name])[0] for name in ("small", "large")
        )
        grown = {f"{name}_grown": large[name] - small[name] for name in ("pss_mb", "uss_mb")}
        result["workers"] = large | grown
        figures, asked = self.child(checkout, node, "clips", self.data["large"])
        result["clips"] = figures | {"requests_a_clip": asked["clips"]["all"] / CLIPS}
        address = self.s3.uri(f"scale/run-{self.runs}", through=self.requests.address)
        _, asked = self.child(checkout, node, "run_folder", address)
        result["requests"] = {part: asked[part] for part in asked if part not in ("all", "end")}
        return result


def kind_of(request: str) -> str:
    """`GET`, or `LIST` for one that lists a folder."""
    method, _, target = request.partition(" ")
    return "LIST" if "list-type=2" in target else method


def mean_of(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds' means, leaf by leaf."""
    first = rounds[0]
    return {
        key: mean_of([each[key] for each in rounds])
        if isinstance(first[key], dict)
        else float(np.mean([each.get(key, 0) for each in rounds]))
        for key in first
    }


def git_commit(checkout: Path) -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--shards", type=int, default=10**4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--before", type=Path, help="another checkout, measured in turns with this one")
    parser.add_argument("--json", type=Path, required=True)
    flags = parser.parse_args()

    from arvideo_dist.hardware import environment, write_json
    from tests.services.relays import Requests
    from tests.services.s3 import s3_server

    checkouts = {"after": ROOT} if flags.before is None else {"before": flags.before.resolve(), "after": ROOT}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, s3_server() as s3:
        requests = Requests(s3.address)
        bench = Bench(Path(folder), s3, requests, flags.rows, flags.shards)
        for number in range(flags.rounds):
            for name, checkout in checkouts.items():
                measured[name].append(bench.measure(checkout))
                print(f"round {number + 1}, {name}: {json.dumps(measured[name][-1], indent=1)}", flush=True)
    configuration = {"rows": flags.rows, "shards": flags.shards, "rounds": flags.rounds}
    configuration |= {"clips": CLIPS, "workers": WORKERS, "places_planned_by_each": PLANS}
    results = {
        name: {"commit": git_commit(checkouts[name]), "mean": mean_of(rounds), "rounds": rounds}
        for name, rounds in measured.items()
    }
    write_json(flags.json, {"subject": "scale"} | environment() | {"configuration": configuration} | results)


if __name__ == "__main__":
    main()
