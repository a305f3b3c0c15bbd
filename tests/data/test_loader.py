"""The loader's invariants: exactly once, the same clips at any world size and worker count, exact resume,
bad samples counted and named, store failures never taken for them."""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arvideo_dist.data import loader as loader_module
from arvideo_dist.data.cache import ShardCache
from arvideo_dist.data.decode import BadSample
from arvideo_dist.data.index import index_name, load_manifest, open_index, shard_name
from arvideo_dist.data.loader import Batch, ClipLoader, ClipSource, LoaderOptions
from arvideo_dist.data.order import PAD, places_of_rank
from arvideo_dist.data.reader import DataReadError, MemberReader
from arvideo_dist.data.transforms import MultiScaleCrop
from arvideo_dist.storage import Storage
from tests.data.conftest import FRAMES
from tests.services.relays import Requests, SlowStore
from tests.services.s3 import S3

SAMPLES = 11


@pytest.fixture(scope="module")
def make_loader(draw: Callable) -> Callable[..., ClipLoader]:
    def make(storage: Storage, **changes: Any) -> ClipLoader:
        source = {"split": "train", "stride": 2, "crop": MultiScaleCrop((1.0, 0.875, 0.75, 0.66))}
        source |= {name: changes.pop(name) for name in list(changes) if name in source}
        options = {f.name: changes.pop(f.name) for f in fields(LoaderOptions) if f.name in changes}
        arguments: dict[str, Any] = {
            "sources": [ClipSource(storage, **source)],
            "options": LoaderOptions(**options),
            "clip_frames": 4,
            "image_size": 32,
            "draw": draw,
            "seed": 5,
            "position": 0,
            "global_batch": 7,
            "micro_batch": 2,
            "rank": 0,
            "world_size": 1,
            "workers": 0,
            "stop_position": 3 * SAMPLES,
        }
        return ClipLoader(**(arguments | changes))

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
            ids = (
                tuple(batch.inputs["context_ids"][i].tolist()),
                tuple(batch.inputs["target_ids"][i].tolist()),
            )
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
    assert batch.inputs["context_ids"].shape == (2, 6)
    assert batch.inputs["context_ids"].dtype == torch.int64
    assert batch.inputs["target_ids"].shape == (2, 10)
    assert batch.inputs["target_ids"].dtype == torch.int64
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
    order = make_loader(dataset).samples.order
    for epoch in range(3):
        located = order.locate(range(epoch * SAMPLES, (epoch + 1) * SAMPLES))
        assert sorted(at.row for at in located) == list(range(SAMPLES))
        assert {at.epoch for at in located} == {epoch}
    assert len({digest for digest, *_ in expected.values()}) == 3 * SAMPLES  # fresh crops in each epoch


@pytest.mark.parametrize(
    ("world_size", "workers"), [(1, 1), (1, 3), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 3)]
)
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
        return list(batches(make_loader(dataset, crop=None, shuffle=False, stop_position=SAMPLES, seed=seed)))

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
    loader = make_loader(fresh_dataset, stop_position=SAMPLES, workers=workers, verify_checksums=True)
    reasons = bad_rows(loader)
    assert set(reasons) == {"video002", "video009", "video010"}
    assert reasons["video002"].startswith("checksum: sha256 is ")
    assert reasons["video009"].startswith("short read: 50 of ")
    assert reasons["video010"].startswith("short read: 0 of ")


def test_undecodable_members_and_wrong_frame_counts_are_bad_samples(
    tmp_path: Path, videos: list[bytes], make_dataset: Callable, make_loader: Callable
) -> None:
    broken = [videos[0], b"no video at all", videos[2][: len(videos[2]) // 3], b"", videos[4]]
    storage = make_dataset(tmp_path, broken, [40, 40, 64, 64, 500])
    loader = make_loader(storage, stop_position=5, clip_frames=16, stride=8, crop=None, shuffle=False)
    reasons = bad_rows(loader)
    assert set(reasons) == {"video001", "video002", "video003", "video004"}
    assert reasons["video001"].startswith("decode: ")
    assert "the file has 50" in reasons["video004"]


def test_a_missing_shard_is_an_error_that_names_it(
    fresh_dataset: Storage, make_loader: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh_dataset.delete(shard_name("train", 1))
    loader = make_loader(fresh_dataset)
    loader.samples.readers = [MemberReader(fresh_dataset, "", retries=2, first_delay=0.01)]
    with pytest.raises(DataReadError, match=r"shard train-000001.tar of .* 3 attempts"):
        list(batches(loader))


def test_the_error_of_a_worker_reaches_the_rank_with_its_type(
    fresh_dataset: Storage, make_loader: Callable
) -> None:
    fresh_dataset.delete(shard_name("train", 1))
    loader = make_loader(fresh_dataset, workers=1, read_retries=0)
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
    loader.samples.readers = [MemberReader(flaky, "", retries=3, first_delay=0.01)]
    assert seen(loader) == expected
    assert flaky.failures == 0


def test_reading_past_the_shards_end_is_short_not_a_store_failure(fresh_dataset: Storage) -> None:
    row = open_index(fresh_dataset, "train")[0]
    with open(fresh_dataset.path(row.shard), "r+b") as file:
        file.truncate(row.offset + 10)
    with pytest.raises(BadSample, match="short read: 10 of"):
        MemberReader(fresh_dataset, "").read(row)


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
        from arvideo_dist.data.loader import ClipLoader, ClipSource
        from arvideo_dist.storage import Storage
        from tests.data.in_workers import draw_ids

        loader = ClipLoader(
            [ClipSource(Storage(sys.argv[1]), "train", stride=2, crop=None)],
            clip_frames=4, image_size=32, draw=draw_ids, seed=0, position=0, global_batch=2, micro_batch=2,
            rank=0, world_size=1, workers=2, stop_position=None,
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
    root = Path(__file__).parents[2]
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


# --- repeats, mixtures, device transforms ---------------------------------------------------------------


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("windows", [False, True])
def test_repeats_come_from_one_decode_and_depend_on_their_place_only(
    dataset: Storage, make_loader: Callable, repeats: int, windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"repeats": repeats, "repeat_windows": windows, "stop_position": 2 * SAMPLES * repeats}
    decodes = []
    decode_rgb = loader_module.decode_rgb
    monkeypatch.setattr(loader_module, "decode_rgb", lambda *a: decodes.append(1) or decode_rgb(*a))
    whole = seen(make_loader(dataset, micro_batch=2 * repeats, global_batch=4 * repeats, **options))
    assert len(decodes) == 2 * SAMPLES
    assert sorted(whole) == list(range(2 * SAMPLES * repeats))
    assert len({value[0] for value in whole.values()}) > SAMPLES * repeats  # repeats differ from each other
    parts: dict[int, tuple] = {}
    for rank in range(3):  # cuts through visits
        parts |= seen(make_loader(dataset, rank=rank, world_size=3, **options))
    assert parts == whole


def test_repeated_crops_share_their_window_and_repeated_windows_do_not(
    dataset: Storage, make_loader: Callable
) -> None:
    def windows(apart: bool) -> list[set[tuple]]:
        samples = make_loader(dataset, repeats=4, repeat_windows=apart).samples
        visits = samples.plan(list(range(4 * SAMPLES)))
        assert len(visits) == SAMPLES
        return [{tuple(clip.window.tolist()) for clip in visit.clips} for visit in visits]

    assert all(len(drawn) == 1 for drawn in windows(apart=False))
    assert sum(len(drawn) for drawn in windows(apart=True)) > 3 * SAMPLES


def test_a_mixture_draws_each_source_by_its_own_rules(
    dataset: Storage, tmp_path: Path, videos: list[bytes], make_dataset: Callable, make_loader: Callable
) -> None:
    other = make_dataset(tmp_path, videos[6:9], [64, 38, 80])
    sources = [
        ClipSource(dataset, "train", stride=2, crop=MultiScaleCrop((1.0,)), weight=0.7),
        ClipSource(other, "train", stride=8, crop=None, weight=0.3),
    ]
    loader = make_loader(dataset, sources=sources, stop_position=40)
    assert loader.places_per_epoch == SAMPLES + 3
    visits = loader.samples.plan(list(range(40)))
    assert [visit.located.source for visit in visits].count(1) == 12
    for visit in visits:
        (clip,) = visit.clips
        steps = set((clip.window[1:] - clip.window[:-1]).tolist())
        assert max(steps) == (2 if visit.located.source == 0 else 8)
    assert len(seen(loader)) == 40


def test_a_bad_sample_of_a_mixture_is_named_with_its_data_set(
    dataset: Storage, tmp_path: Path, make_dataset: Callable, make_loader: Callable
) -> None:
    other = make_dataset(tmp_path, [b"nothing"], [40])
    sources = [ClipSource(storage, "train", 2, None) for storage in (dataset, other)]
    bad = [
        record
        for batch in batches(make_loader(dataset, sources=sources, stop_position=4))
        for record in batch.bad
    ]
    assert {record.shard for record in bad} == {f"{other.uri}/train-000000.tar"}
    assert len(bad) == 2


def test_segments_take_one_frame_from_each_part_of_the_video(dataset: Storage, make_loader: Callable) -> None:
    source = ClipSource(dataset, "train", 2, MultiScaleCrop((1.0,)), sampling="segments")
    for visit in make_loader(dataset, sources=[source]).samples.plan(list(range(SAMPLES))):
        length = visit.row.frames // 4
        if length:
            assert (visit.clips[0].window // length).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("scales", [(1.0, 0.875, 0.75, 0.66), None])
def test_device_transforms_give_the_hosts_clips_within_one_grey_level(
    dataset: Storage, make_loader: Callable, workers: int, scales: tuple[float, ...] | None
) -> None:
    cpu = torch.device("cpu")
    crop = None if scales is None else MultiScaleCrop(scales)
    host = batches(make_loader(dataset, crop=crop))
    device = batches(make_loader(dataset, crop=crop, device_transforms=True, workers=workers))
    for one, other in zip(host, device, strict=True):
        assert other.clips.numel() == 0
        made = other.to(cpu)
        assert made.planes is None
        assert made.clips.dtype == torch.uint8
        assert made.clips.shape == one.clips.shape
        assert (made.clips.int() - one.clips.int()).abs().max() <= 1
        assert torch.equal(made.places, one.places)
        assert torch.equal(made.weights, one.weights)


def test_bad_samples_and_padding_are_zeros_under_device_transforms(
    tmp_path: Path, videos: list[bytes], make_dataset: Callable, make_loader: Callable
) -> None:
    storage = make_dataset(tmp_path, [videos[0], b"no video"], [40, 40])
    loader = make_loader(storage, device_transforms=True, stop_position=2, global_batch=3, micro_batch=3)
    (batch,) = batches(loader)
    made = batch.to(torch.device("cpu"))
    assert sorted(made.weights.tolist()) == [0.0, 0.0, 1.0]
    for clip, weight in zip(made.clips, made.weights, strict=True):
        assert clip.any() == bool(weight)


@given(st.data())
@settings(max_examples=60)
def test_any_chain_of_stops_and_world_sizes_consumes_each_place_once(data: st.DataObject) -> None:
    """Property over random stops: a run that is stopped after any step and goes on at another world size."""
    global_batch = data.draw(st.integers(1, 12))
    consumed: list[int] = []
    position = 0
    while position < 3 * SAMPLES:
        world_size = data.draw(st.integers(1, 4))
        micro_batch = data.draw(st.integers(1, 4))
        steps = data.draw(st.integers(1, 4))
        for _ in range(steps):
            for rank in range(world_size):
                for places in places_of_rank(position, global_batch, micro_batch, rank, world_size):
                    consumed += [place for place in places if place != PAD]
            position += global_batch
    assert sorted(consumed) == list(range(position))


# --- stores and caches ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_dataset(dataset: Storage, s3: S3) -> Storage:
    """The data set in an S3 store."""
    s3.make_bucket("clips")
    return s3.put(dataset, "clips/set")


@pytest.fixture
def slow_store(s3_dataset: Storage, s3: S3) -> Iterator[SlowStore]:
    store = SlowStore(s3.address)
    yield store
    store.close()


def test_a_store_that_is_slow_for_a_while_changes_nothing(
    s3: S3, slow_store: SlowStore, make_loader: Callable, expected: dict
) -> None:
    """Answers that come late, within the client's limit of 3 s; and some requests that outlast it."""
    loader = make_loader(Storage(s3.uri("clips/set", through=slow_store.address)))
    slow_store.delays.extend([0.2, 0.2, None, 0.2, None, None, 0.2])
    assert seen(loader) == expected
    assert slow_store.unanswered == 3
    assert all(weight == 1 for *_, weight in expected.values())


def test_a_store_that_accepts_and_never_answers_ends_in_an_error_that_names_the_shard(
    s3: S3, slow_store: SlowStore, make_loader: Callable
) -> None:
    loader = make_loader(Storage(s3.uri("clips/set", through=slow_store.address)), read_retries=0)
    slow_store.hangs = True
    with pytest.raises(
        DataReadError, match=r"shard train-00000\d\.tar of .* 1 attempts .*Timeout was reached"
    ):
        list(batches(loader))
    assert slow_store.unanswered >= 3  # the client's own repetitions


@pytest.mark.parametrize("workers", [0, 1])
def test_an_object_store_gives_the_same_clips(
    s3_dataset: Storage, make_loader: Callable, expected: dict, workers: int
) -> None:
    assert seen(make_loader(s3_dataset, workers=workers)) == expected


def test_a_clip_is_one_request_to_an_object_store(s3_dataset: Storage, s3: S3, make_loader: Callable) -> None:
    relay = Requests(s3.address)
    loader = make_loader(Storage(s3.uri("clips/set", through=relay.address)))
    loader.samples = pickle.loads(pickle.dumps(loader.samples))  # as it comes to a decode worker
    relay.seen.clear()
    assert sum(float(batch.weights.sum()) for batch in batches(loader)) == 3 * SAMPLES
    read = Counter(request.rpartition("/")[2] for request in relay.seen if request.startswith("GET "))
    assert read == {shard_name("train", 0): 12, shard_name("train", 1): 12, shard_name("train", 2): 9}
    assert len(relay.seen) == 3 * SAMPLES, "nothing but these"
    relay.close()


def test_opening_a_data_set_reads_its_manifest_once(
    s3_dataset: Storage, s3: S3, make_loader: Callable
) -> None:
    open_index(s3_dataset, "train")  # made on this node before
    relay = Requests(s3.address)
    make_loader(Storage(s3.uri("clips/set", through=relay.address)))
    assert relay.seen == ["GET /clips/set/dataset-train.json"]
    relay.close()


def test_what_is_sent_to_a_decode_worker_does_not_grow_with_shards_or_rows(
    tmp_path: Path, make_dataset: Callable, make_loader: Callable
) -> None:
    sent = []
    for shards in (3, 1000):
        storage = make_dataset(tmp_path / str(shards), [b"no video"] * shards, [40] * shards, per_shard=1)
        loader = make_loader(storage, shard_cache=tmp_path / "cache", shard_cache_gib=1)
        sent.append(len(pickle.dumps(loader.samples)))
    assert abs(sent[1] - sent[0]) < 100


def test_a_shard_cache_gives_the_same_clips_and_stays_within_its_bound(
    s3_dataset: Storage, make_loader: Callable, tmp_path: Path
) -> None:
    shards = load_manifest(s3_dataset, "train").shards
    two = sum(sorted(shard.size for shard in shards)[-2:])
    options = {"shuffle_block_shards": 1, "shard_cache": tmp_path, "shard_cache_gib": two / 2**30}
    plain = seen(make_loader(s3_dataset, shuffle_block_shards=1))
    assert seen(make_loader(s3_dataset, **options)) == plain
    assert seen(make_loader(s3_dataset, workers=2, **options)) == plain
    kept = {path.name: path.stat().st_size for path in tmp_path.glob("*.tar")}
    assert sum(kept.values()) <= two
    assert {name[-len(shards[0].name) :]: size for name, size in kept.items()}.items() <= {
        shard.name: shard.size for shard in shards
    }.items()
    assert not list(tmp_path.glob("*.partial"))


def test_cached_shards_are_fetched_once(s3_dataset: Storage, tmp_path: Path) -> None:
    shards = load_manifest(s3_dataset, "train").shards
    cache = ShardCache(tmp_path, sum(shard.size for shard in shards))
    reader = MemberReader(s3_dataset, "digest", retries=0, cache=cache)
    rows = [open_index(s3_dataset, "train")[row] for row in range(SAMPLES)]
    first = [reader.read(row) for row in rows]
    for shard in shards:
        s3_dataset.fs.move(s3_dataset.path(shard.name), s3_dataset.path("away-" + shard.name))
    try:
        assert [reader.read(row) for row in rows] == first
        with pytest.raises(DataReadError, match="could not be read in 1 attempts"):
            replace(reader, cache=None).read(rows[0])
    finally:
        for shard in shards:
            s3_dataset.fs.move(s3_dataset.path("away-" + shard.name), s3_dataset.path(shard.name))


def test_a_cache_fetch_that_was_killed_leaves_room_for_the_next(s3_dataset: Storage, tmp_path: Path) -> None:
    (tmp_path / "deadbeef.partial").write_bytes(bytes(10_000_000))
    shard = load_manifest(s3_dataset, "train").shards[0]
    cache = ShardCache(tmp_path, shard.size)
    file = cache.open(s3_dataset, shard.name, "digest")
    assert file
    with file:
        assert len(file.read()) == shard.size
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == [f"digest-{shard.name}"]


def test_reads_pass_a_cache_that_fetches_of_others_fill_by_the_store(
    s3_dataset: Storage, tmp_path: Path
) -> None:
    """The bound holds also while shards are on their way: what has no room beside them is not kept."""
    row = open_index(s3_dataset, "train")[0]
    cache = ShardCache(tmp_path, s3_dataset.size(row.shard))
    reader = MemberReader(s3_dataset, "digest", retries=0, cache=cache)
    with cache._lock("another"):  # held by the process that fetches it
        (tmp_path / "another.partial").write_bytes(bytes(1000))
        assert reader.read(row) == replace(reader, cache=None).read(row)
        assert not list(tmp_path.glob("*.tar"))
    assert reader.read(row) == replace(reader, cache=None).read(row)
    assert len(list(tmp_path.glob("*.tar"))) == 1


def test_a_shard_larger_than_the_cache_is_a_clear_error(s3_dataset: Storage, tmp_path: Path) -> None:
    shard = load_manifest(s3_dataset, "train").shards[0]
    with pytest.raises(
        ValueError, match=r"does not fit into the shard cache of 10 bytes: raise data\.shard_cache_gib"
    ):
        ShardCache(tmp_path, 10).open(s3_dataset, shard.name, "digest")


def test_a_truncated_remote_shard_is_short_not_a_store_failure(s3_dataset: Storage, dataset: Storage) -> None:
    row = open_index(dataset, "train")[0]
    s3_dataset.write_bytes("cut.tar", dataset.read_bytes(row.shard)[: row.offset + 10])
    for offset, size in ((row.offset, 10), (row.offset + 5000, 0)):
        with pytest.raises(BadSample, match=f"short read: {size} of"):
            MemberReader(s3_dataset, "", retries=0).read(replace(row, shard="cut.tar", offset=offset))


def test_an_index_that_is_not_the_manifests_is_refused(fresh_dataset: Storage, tmp_path: Path) -> None:
    name = index_name("train")
    fresh_dataset.write_bytes(name, fresh_dataset.read_bytes(name) + b"x")
    with pytest.raises(ValueError, match=r"index-train\.parquet does not match dataset-train\.json"):
        open_index(fresh_dataset, "train", cache=tmp_path / "fresh")


def test_an_index_of_other_shards_gives_bad_samples_not_other_clips(
    tmp_path: Path, videos: list[bytes], make_dataset: Callable, make_loader: Callable
) -> None:
    """Shards made again while the index stayed: the bytes at its offsets are not what it says."""
    storage = make_dataset(tmp_path / "one", videos[:4], FRAMES[:4])
    other = make_dataset(tmp_path / "two", videos[4:8], FRAMES[4:8])
    storage.put_file(Path(other.path(shard_name("train", 0))), shard_name("train", 0))
    reasons = bad_rows(make_loader(storage, stop_position=4, verify_checksums=True))
    assert len(reasons) == 4
    assert all(reason.startswith(("checksum: ", "short read: ")) for reason in reasons.values())
