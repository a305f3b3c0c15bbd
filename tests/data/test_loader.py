"""The loader's invariants: exactly once, the same clips at any world size and worker count, exact resume,
bad samples counted and named, store failures never taken for them."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from arvideo_dist.data import loader as loader_module
from arvideo_dist.data.decode import BadSample
from arvideo_dist.data.index import open_index, shard_name
from arvideo_dist.data.loader import Batch, ClipLoader
from arvideo_dist.data.order import PAD
from arvideo_dist.data.reader import DataReadError, MemberReader
from arvideo_dist.storage import Storage

SAMPLES = 11


@pytest.fixture(scope="module")
def make_loader(sequence: Callable) -> Callable[..., ClipLoader]:
    def make(storage: Storage, **changes: Any) -> ClipLoader:
        arguments: dict[str, Any] = {
            "split": "train",
            "clip_frames": 4,
            "stride": 2,
            "image_size": 32,
            "crop_scales": (1.0, 0.875, 0.75, 0.66),
            "sequence": sequence,
            "seed": 5,
            "position": 0,
            "global_batch": 7,
            "micro_batch": 2,
            "rank": 0,
            "world_size": 1,
            "workers": 0,
            "stop_position": 3 * SAMPLES,
        }
        return ClipLoader(storage, **(arguments | changes))

    return make


def batches(loader: ClipLoader, steps: int | None = None) -> Iterator[Batch]:
    for step in itertools.islice(loader, steps):
        yield from step


def seen(loader: ClipLoader) -> dict[int, tuple]:
    """Digest of the clip, ids and weight that the loader gave at each place; no place may come twice."""
    result: dict[int, tuple] = {}
    for batch in batches(loader):
        for i, place in enumerate(batch.places.tolist()):
            if place == PAD:
                assert batch.weights[i] == 0
                assert not batch.clips[i].any()
                continue
            assert place not in result
            digest = hashlib.sha256(batch.clips[i].contiguous().numpy().tobytes()).hexdigest()
            ids = (tuple(batch.context_ids[i].tolist()), tuple(batch.target_ids[i].tolist()))
            result[place] = (digest, *ids, float(batch.weights[i]))
    return result


@pytest.fixture(scope="module")
def expected(dataset: Storage, make_loader: Callable) -> dict[int, tuple]:
    """Three epochs read in one process by one rank."""
    return seen(make_loader(dataset))


def test_batch_has_the_stated_shapes_and_types(dataset: Storage, make_loader: Callable) -> None:
    batch = next(batches(make_loader(dataset)))
    assert batch.clips.shape == (2, 3, 4, 32, 32)
    assert batch.clips.dtype == torch.uint8
    assert batch.context_ids.shape == (2, 6)
    assert batch.context_ids.dtype == torch.int64
    assert batch.target_ids.shape == (2, 10)
    assert batch.target_ids.dtype == torch.int64
    assert batch.weights.tolist() == [1.0, 1.0]
    assert batch.weights.dtype == torch.float32
    assert batch.places.tolist() == [0, 1]
    assert batch.places.dtype == torch.int64
    assert batch.clips.contiguous().float().std() > 10  # pictures, not zeros


def test_three_epochs_hold_each_place_and_each_sample_exactly_once(
    dataset: Storage, make_loader: Callable, expected: dict
) -> None:
    assert sorted(expected) == list(range(3 * SAMPLES))
    assert all(weight == 1.0 for *_, weight in expected.values())
    order = make_loader(dataset).micro_batches.order
    for epoch in range(3):
        rows = [order.locate(place)[1] for place in range(epoch * SAMPLES, (epoch + 1) * SAMPLES)]
        assert sorted(rows) == list(range(SAMPLES))
    assert len({digest for digest, *_ in expected.values()}) == 3 * SAMPLES  # fresh crops in each epoch


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 2), (2, 0), (2, 1), (3, 0), (4, 0), (4, 2)])
def test_clips_depend_on_their_place_only(
    dataset: Storage, make_loader: Callable, expected: dict, world_size: int, workers: int
) -> None:
    got: dict[int, tuple] = {}
    for rank in range(world_size):
        part = seen(make_loader(dataset, rank=rank, world_size=world_size, workers=workers))
        assert not part.keys() & got.keys()
        got |= part
    assert got == expected


@pytest.mark.parametrize(("stop", "world_size"), [(1, 2), (7, 3), (13, 1), (20, 4), (32, 2)])
def test_resume_at_any_position_and_world_size_gives_the_remaining_places(
    dataset: Storage, make_loader: Callable, expected: dict, stop: int, world_size: int
) -> None:
    got: dict[int, tuple] = {}
    for rank in range(world_size):
        got |= seen(make_loader(dataset, position=stop, rank=rank, world_size=world_size, micro_batch=3))
    assert got == {place: value for place, value in expected.items() if place >= stop}


def test_all_ranks_take_the_same_number_of_micro_batches(dataset: Storage, make_loader: Callable) -> None:
    steps = [[len(step) for step in make_loader(dataset, rank=rank, world_size=3)] for rank in range(3)]
    assert steps == [[2] * 5] * 3  # 33 places in steps of 7; ceil(7 / (3 x 2)) micro batches a step


def test_validation_reads_the_index_in_order_once(dataset: Storage, make_loader: Callable) -> None:
    def run(seed: int) -> list[Batch]:
        return list(
            batches(make_loader(dataset, crop_scales=None, shuffle=False, stop_position=SAMPLES, seed=seed))
        )

    places = torch.cat([batch.places for batch in run(0)])
    assert places[places != PAD].tolist() == list(range(SAMPLES))
    assert sum(float(batch.weights.sum()) for batch in run(0)) == SAMPLES
    for one, other in zip(run(0), run(1), strict=True):
        assert torch.equal(one.clips, other.clips)  # middle window, centre crop: nothing is drawn


def test_loading_leaves_the_ranks_random_state_alone(dataset: Storage, make_loader: Callable) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    next(batches(make_loader(dataset, workers=1)))
    assert torch.equal(torch.get_rng_state(), state)


def damage(storage: Storage, row: int, data: bytes, at: int = 0) -> None:
    sample = open_index(storage, "train")[row]
    with open(storage.path(sample.shard), "r+b") as file:
        file.seek(sample.offset + at)
        file.write(data)


def bad_rows(loader: ClipLoader) -> dict[str, str]:
    """key -> reason over one epoch; checks that weight, clip and record agree."""
    reasons = {}
    for batch in batches(loader):
        named = {record.place: record for record in batch.bad}
        for i, place in enumerate(batch.places.tolist()):
            assert (batch.weights[i] == 0) == (place == PAD or place in named)
            if batch.weights[i] == 0:
                assert not batch.clips[i].any()
        for record in batch.bad:
            assert record.shard == shard_name("train", int(record.key[-3:]) // 4)
            reasons[record.key] = record.reason
    return reasons


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_members_get_weight_zero_and_a_record(
    fresh_dataset: Storage, make_loader: Callable, workers: int
) -> None:
    damage(fresh_dataset, 2, b"\0" * 64, at=100)
    with open(fresh_dataset.path(shard_name("train", 2)), "r+b") as file:
        file.truncate(open_index(fresh_dataset, "train")[9].offset + 50)  # also cuts off all of sample 10
    reasons = bad_rows(make_loader(fresh_dataset, stop_position=SAMPLES, workers=workers))
    assert set(reasons) == {"video002", "video009", "video010"}
    assert reasons["video002"].startswith("checksum: sha256 is ")
    assert reasons["video009"].startswith("short read: 50 of ")
    assert reasons["video010"].startswith("short read: 0 of ")


def test_undecodable_members_and_wrong_frame_counts_are_bad_samples(
    tmp_path: Path, videos: list[bytes], make_dataset: Callable, make_loader: Callable
) -> None:
    broken = [videos[0], b"no video at all", videos[2][: len(videos[2]) // 3], b"", videos[4]]
    storage = make_dataset(tmp_path, broken, [40, 40, 64, 64, 500])
    loader = make_loader(storage, stop_position=5, clip_frames=16, stride=8, crop_scales=None, shuffle=False)
    reasons = bad_rows(loader)
    assert set(reasons) == {"video001", "video002", "video003", "video004"}
    assert reasons["video001"].startswith("decode: ")
    assert "the file has 50" in reasons["video004"]


def test_a_missing_shard_is_an_error_that_names_it(
    fresh_dataset: Storage, make_loader: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh_dataset.delete(shard_name("train", 1))
    loader = make_loader(fresh_dataset)
    loader.micro_batches.reader = MemberReader(fresh_dataset, retries=2, first_delay=0.01)
    with pytest.raises(DataReadError, match=r"shard train-000001.tar of .* 3 attempts"):
        list(batches(loader))


def test_the_error_of_a_worker_reaches_the_rank_with_its_type(
    fresh_dataset: Storage, make_loader: Callable
) -> None:
    fresh_dataset.delete(shard_name("train", 1))
    loader = make_loader(fresh_dataset, workers=1)
    loader.micro_batches.reader = MemberReader(fresh_dataset, retries=0)
    with pytest.raises(DataReadError, match=r"shard train-000001\.tar"):
        list(batches(loader))


class FlakyStorage(Storage):
    """Fails a number of reads, as a store does that is away for a while."""

    def __init__(self, uri: str, failures: int) -> None:
        super().__init__(uri)
        self.failures = failures

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if self.failures:
            self.failures -= 1
            raise OSError("503 slow down")
        return super().read_range(name, offset, size)


def test_a_store_that_fails_for_a_while_loses_no_sample(
    dataset: Storage, make_loader: Callable, expected: dict
) -> None:
    loader = make_loader(dataset)
    flaky = FlakyStorage(dataset.uri, failures=3)
    loader.micro_batches.reader = MemberReader(flaky, retries=3, first_delay=0.01)
    assert seen(loader) == expected
    assert flaky.failures == 0


def test_reading_past_the_shards_end_is_short_not_a_store_failure(fresh_dataset: Storage) -> None:
    row = open_index(fresh_dataset, "train")[0]
    with open(fresh_dataset.path(row.shard), "r+b") as file:
        file.truncate(row.offset + 10)
    with pytest.raises(BadSample, match="short read: 10 of"):
        MemberReader(fresh_dataset, retries=0).read(row)


def test_missing_split_is_a_clear_error(dataset: Storage, make_loader: Callable) -> None:
    with pytest.raises(ValueError, match=r"dataset-test.json is missing \(splits found there: train\)"):
        make_loader(dataset, split="test")


@pytest.mark.parametrize("ending", [signal.SIGKILL, "break"])
def test_workers_end_with_their_rank(dataset: Storage, tmp_path: Path, ending: Any) -> None:
    """No orphans, whether the rank is killed in the middle of a read or leaves the iteration; and the rank's
    main module runs once, not again in each worker."""
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import psutil
        print("main runs", flush=True)
        from arvideo_dist.data.loader import ClipLoader
        from arvideo_dist.storage import Storage
        from ids import draw

        loader = ClipLoader(
            Storage(sys.argv[1]), "train", clip_frames=4, stride=2, image_size=32, crop_scales=None,
            sequence=draw, seed=0, position=0, global_batch=2, micro_batch=2, rank=0, world_size=1, workers=2,
            stop_position=None,
        )
        for number, step in enumerate(loader):
            if number == 3:
                below = psutil.Process().children(recursive=True)
                print("ready", *(f"{child.pid}:{child.ppid()}" for child in below), flush=True)
                if sys.stdin.readline() == "break\\n":
                    break
        print("left", flush=True)
        sys.stdin.readline()
        """)
    )
    (tmp_path / "ids.py").write_text(
        "import numpy as np\ndef draw(rng):\n    return np.arange(3), np.arange(4)\n"
    )
    root = Path(loader_module.__file__).parents[2]
    rank = subprocess.Popen(
        [sys.executable, str(script), dataset.uri],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert rank.stdin is not None
    assert rank.stdout is not None
    try:
        assert rank.stdout.readline() == "main runs\n"
        word, *below = rank.stdout.readline().split()
        assert word == "ready"
        parents = {int(pid): int(parent) for pid, parent in (entry.split(":") for entry in below)}
        workers = [psutil.Process(pid) for pid, parent in parents.items() if parent != rank.pid]
        assert len(workers) == 2  # below the fork server, which stays for the rank's next loader
        if ending == "break":
            rank.stdin.write("break\n")
            rank.stdin.flush()
            assert rank.stdout.readline() == "left\n"
        else:
            workers = [psutil.Process(pid) for pid in parents]  # the fork server goes as well
            rank.send_signal(ending)
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
    finally:
        rank.kill()
        rank.communicate()
