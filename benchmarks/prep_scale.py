"""What a large set costs `data_prep` beside the videos: memory for its rows, requests for its slices.

    python -m benchmarks.prep_scale [--rows 1000000] [--slices 10000] [--s3-slices 1000] [--json PATH]

A Kinetics annotation of `--rows` rows is read, whose videos are all there (imagined, in 1000 folders); then a run
of which every slice of `--slices` is done, and nothing published, is resumed from the slices' records and
published. Both happen in a process of its own, which tells the peak of its resident memory over what it had after
doing the same for a hundred rows, and its CPU seconds. Beside them stand the sizes of the finished index, and of
all its rows in memory. Then `--s3-slices` slices of imagined videos go to an S3 server on this machine (moto's),
which counts the requests of making them and of resuming from them. `--before FILE` puts the figures of another run
beside the new ones.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import webdataset  # noqa: F401  (imports torch, which is not what is measured)

from arvideo_dist import storage as storage_module
from arvideo_dist.data.index import ShardEntry, shard_name
from arvideo_dist.hardware import environment, write_json
from arvideo_dist.storage import PatientStorage, Storage
from data_prep import datasets
from data_prep import prepare as prepare_module
from data_prep.items import Inputs, Item
from data_prep.prepare import prepare
from data_prep.shards import Outcome, Sample, SliceRecord, record_name

FOLDERS = 1000
LABELS = [f"label {number}" for number in range(400)]


class Imagined:
    """An executor that takes no video: every tenth input is a reject, a shard is one byte."""

    slots = 64

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def video(self, item: Item) -> Future[Outcome]:
        digest = hashlib.sha256(item.source.encode()).hexdigest()
        if int(digest[:4], 16) % 10 == 0:
            return _done(Outcome(item.source, reason="damaged: it was imagined so"))
        shape = {"width": 340, "height": 256, "fps": 25.0, "frames": 250, "duration": 10.0}
        names = {"key": item.key, "source": item.source, "label": item.label, "label_name": item.label_name}
        return _done(Outcome(item.source, sample=Sample(size=200_000, sha256=digest, **shape, **names)))

    def shard(self, number: int, videos: list[Any]) -> Future[SliceRecord]:
        outcomes = [video if isinstance(video, Outcome) else video.result() for video in videos]
        samples = [outcome.sample for outcome in outcomes if outcome.sample]
        rejects = [(outcome.source, outcome.reason or "") for outcome in outcomes if not outcome.sample]
        name = shard_name("train", number)
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / name).write_bytes(b"x")
            self._storage.put_file(Path(scratch) / name, name)
        rows = [
            sample.model_dump(exclude={"extra"}) | {"shard": name, "offset": 200_704 * place}
            for place, sample in enumerate(samples)
        ]
        entry = ShardEntry(name=name, size=1, sha256="0" * 64, samples=len(rows))
        record = SliceRecord(shard=entry, rows=rows, rejects=rejects)
        self._storage.write_bytes(record_name("train", number), record.model_dump_json().encode())
        return _done(record)

    def wait(self, handles: set[Future[Any]]) -> set[Future[Any]]:
        return set(handles)

    def outcome(self, handle: Future[Outcome]) -> Outcome:
        return handle.result()

    def record(self, handle: Future[SliceRecord]) -> SliceRecord:
        return handle.result()


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future


class _Entry:
    """What `os.scandir` would say of a file."""

    def __init__(self, folder: str, name: str) -> None:
        self.name, self.path = name, os.path.join(folder, name)

    def is_dir(self) -> bool:
        return False


class _Listing:
    """What `os.scandir` gives: iterated at once by some, entered by others."""

    def __init__(self, entries: Iterator[_Entry]) -> None:
        self._entries = entries

    def __enter__(self) -> Iterator[_Entry]:
        return self._entries

    def __exit__(self, *_: object) -> None:
        pass

    def __iter__(self) -> Iterator[_Entry]:
        return self._entries


def _stem(number: int) -> str:
    return (
        f"{hashlib.sha256(str(number).encode()).hexdigest()[:11]}_{number % 300:06d}_{number % 300 + 10:06d}"
    )


def imagine(top: Path, rows: int) -> None:
    """The annotation in `top`, and from now on its videos, for who lists the folders below `top`/videos."""
    with open(top / "rows.csv", "w") as file:
        file.write("label,youtube_id,time_start,time_end,split\n")
        for number in range(rows):
            name, start, end = _stem(number).split("_")
            file.write(f"{LABELS[number % len(LABELS)]},{name},{int(start)},{int(end)},train\n")
    for folder in range(FOLDERS):
        (top / "videos" / f"{folder:04d}").mkdir(parents=True)


def _see(top: Path, rows: int) -> None:
    scandir, videos = os.scandir, str(top / "videos")

    def seeing(path: Any = ".") -> Any:
        folder = "" if isinstance(path, int) else os.fspath(path)
        if os.path.dirname(folder) != videos:
            return scandir(path)
        numbers = range(int(os.path.basename(folder)), rows, FOLDERS)
        return _Listing(_Entry(folder, f"{_stem(number)}.mp4") for number in numbers)

    os.scandir = seeing  # type: ignore[assignment]


def read(top: Path) -> Inputs:
    return datasets.kinetics("kinetics400", str(top / "rows.csv"), str(top / "videos"), None)


def run(inputs: Inputs, storage: Storage, slices: int, stop: bool = False) -> None:
    """Prepare and publish `inputs`; with `stop` end just before publishing, as a run that is killed there."""
    settings = {"shard_size": -(-len(inputs.items) // slices), "seed": 0, "inputs": inputs.digest()}

    @contextlib.contextmanager
    def executor() -> Iterator[Imagined]:
        yield Imagined(storage)

    publish = prepare_module.publish
    if stop:
        prepare_module.publish = lambda *_: sys.exit()
    try:
        with (
            contextlib.suppress(SystemExit),
            open(os.devnull, "w") as quiet,
            contextlib.redirect_stderr(quiet),
        ):
            prepare(inputs, storage, "train", settings, executor)
    finally:
        prepare_module.publish = publish


def leave_records(storage: Storage, rows: int, slices: int) -> None:
    """What a run of `rows` inputs leaves that ended just before it published: one in ten is a reject."""
    size = -(-rows // slices)
    fixed = {"size": 200_000, "width": 340, "height": 256, "fps": 25.0, "frames": 250, "duration": 10.0}
    for number in range(slices):
        name = shard_name("train", number)
        Path(storage.path(name)).write_bytes(b"x")
        samples, rejects = [], []
        for place in range(number * size, min(rows, (number + 1) * size)):
            source, label = _stem(place), place % len(LABELS)
            if place % 10 == 9:
                rejects.append((source, "damaged: it was imagined so"))
                continue
            named = {
                "key": f"{source}-{place:012x}",
                "source": source,
                "sha256": f"{place:064x}",
                "shard": name,
            }
            samples.append(
                fixed | named | {"label": label, "label_name": LABELS[label], "offset": 200_704 * place}
            )
        entry = ShardEntry(name=name, size=1, sha256="0" * 64, samples=len(samples))
        record = {"shard": entry.model_dump(), "rows": samples, "rejects": rejects}
        Path(storage.path(record_name("train", number))).write_text(json.dumps(record))


def _left(top: Path, rows: int, slices: int) -> Storage:
    imagine(top, rows)
    storage = Storage(f"{top}/out")
    Path(storage.path("progress-train")).mkdir(parents=True)
    leave_records(storage, rows, slices)
    return storage


def _phases(top: Path, storage: Storage, slices: int, sender: Any) -> None:
    def status(name: str) -> float:
        lines = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(dict(lines)[name].split()[0]) / 1024

    with tempfile.TemporaryDirectory() as small:
        _left(Path(small), 100, 10)
        run(read(Path(small)), Storage(f"{small}/out"), 10)
    kept: list[Inputs] = []
    start, figures = status("VmRSS"), {}
    phases = {
        "reading the annotation": lambda: kept.append(read(top)),
        "resuming from the records, and publishing": lambda: run(kept[0], storage, slices),
    }
    for name, action in phases.items():
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        cpu, wall = time.process_time(), time.perf_counter()
        action()
        figures[name] = {
            "peak_mib_above_start": status("VmHWM") - start,
            "mib_above_start_at_its_end": status("VmRSS") - start,
            "cpu_s": time.process_time() - cpu,
            "wall_s": time.perf_counter() - wall,
        }
    sender.send(figures)


def memory(rows: int, slices: int) -> dict[str, Any]:
    """Memory and time of reading `rows` rows and of resuming and publishing them."""
    storage_module.sync = lambda path: None  # the disk's own time is not what is measured
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        storage = _left(top, rows, slices)
        _see(top, rows)
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_phases, args=(top, storage, slices, sender))
        process.start()
        sender.close()
        figures: dict[str, Any] = receiver.recv()
        process.join()
        index = Path(storage.path("index-train.parquet"))
        figures["index file, MiB"] = index.stat().st_size / 2**20
        figures["index rows as Arrow, MiB"] = pq.read_table(index).nbytes / 2**20
        figures["samples"] = pq.read_metadata(index).num_rows
    return figures


def requests(slices: int) -> dict[str, Any]:
    """HTTP requests to a store, by method."""
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    seen: Counter[str] = Counter()
    WSGIRequestHandler.log_request = lambda self, *_: seen.update([self.command])  # type: ignore
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        import boto3

        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(
            Bucket="sets"
        )
        storage = PatientStorage(
            f"s3://sets/one?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        )
        items = [Item(f"{number}.mp4", path=f"{number}.mp4") for number in range(10 * slices)]
        inputs = Inputs(items, [], {})
        figures: dict[str, Any] = {"slices": slices}
        for name, stop in (("making the slices", True), ("resuming from them and publishing", False)):
            seen.clear()
            began = time.perf_counter()
            run(inputs, storage, slices, stop)
            figures[name] = {
                "requests": sum(seen.values()),
                "a slice": sum(seen.values()) / slices,
                "by method": dict(sorted(seen.items())),
                "wall_s": time.perf_counter() - began,
            }
        return figures
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--slices", type=int, default=10_000)
    parser.add_argument("--s3-slices", type=int, default=1000)
    parser.add_argument(
        "--before", type=Path, metavar="FILE", help="figures of another commit, to put beside"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file")
    given = parser.parse_args()
    result = {
        "configuration": {"rows": given.rows, "slices": given.slices, "s3_slices": given.s3_slices},
        "figures": {"memory": memory(given.rows, given.slices), "requests": requests(given.s3_slices)},
    } | environment()
    if given.before:
        result["before"] = json.loads(given.before.read_text())
    print(json.dumps(result, indent=1))
    if given.json:
        write_json(given.json, result)


if __name__ == "__main__":
    main()
