"""Checkpoints on storage: visible when complete, damage is named, S3 as well as disk, no pickle."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.config.optim import TrainConfig
from arvideo_dist.model.arvideo import ARVideo
from arvideo_dist.storage import Storage
from arvideo_dist.train.checkpoint import parts
from arvideo_dist.train.checkpoint import reader as checkpoint_module
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST, complete_checkpoints
from arvideo_dist.train.checkpoint.manifest import CheckpointError
from arvideo_dist.train.checkpoint.reader import Checkpoint, open_newest_whole
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.health.activity import activity
from arvideo_dist.train.run.stop import RunStoppedError
from tests.services.relays import Counts
from tests.services.s3 import S3
from tests.train.distributed import make_saver, run_ranks
from tests.train.engines import engine_of

MODEL = ModelConfig(encoder="demo", frames=4, image_size=16, tubelet=(2, 8, 8), cluster=(1, 1, 2))
DECODER = DecoderConfig(width=64, depth=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, s3: S3) -> tuple[Path, Storage, Storage]:
    """Four saves by two ranks at ZeRO-2, the newest two kept: the local folder, and both storages."""
    local = tmp_path_factory.mktemp("run")
    s3.make_bucket("checkpoints")
    remote = s3.uri("checkpoints/one")
    assert run_ranks(2, _save, str(local), remote) == [None, None]
    return local, Storage(str(local)), Storage(remote)


def _new_engine(model: ARVideo, stage: int) -> Engine:
    train = TrainConfig(zero_stage=stage, micro_batch=1, global_batch=dist.get_world_size())
    return engine_of(model, train)


def _save(*uris: str) -> None:
    torch.manual_seed(3)
    engine = _new_engine(ARVideo(MODEL, DECODER), stage=2)
    for uri in uris:
        saver = make_saver(Storage(uri), engine, keep_last=2)
        for step in (1, 2, 3, 4):
            saver.request(step, {"position": step})
        saver.finish()


def _part(run: Path, step: int, rank: int) -> Path:
    (part,) = (run / FOLDER / f"step-{step:08d}").glob(f"part-{rank:05d}-of-00002-*.safetensors")
    return part


def _member(run: Storage, step: int, rank: int) -> str:
    """The same in any storage, as the name of a member."""
    folder = f"{FOLDER}/step-{step:08d}"
    (name,) = (name for name in run.names(folder) if name.startswith(f"part-{rank:05d}-of-00002-"))
    return f"{folder}/{name}"


def _weights(run: Storage) -> dict[str, torch.Tensor]:
    model = ARVideo(MODEL, DECODER)
    checkpoint = Checkpoint(run, complete_checkpoints(run)[-1])
    checkpoint.verify()
    checkpoint.load_weights(model)
    return model.state_dict()


def test_the_newest_are_kept_and_hold_the_weights_on_disk_and_on_s3(
    saved: tuple[Path, Storage, Storage],
) -> None:
    torch.manual_seed(3)
    expected = ARVideo(MODEL, DECODER).state_dict()
    for run in saved[1:]:
        assert complete_checkpoints(run) == ["step-00000003", "step-00000004"]
        weights = _weights(run)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def _count_reads(s3: S3, stage: int) -> dict[str, int]:
    """What a rank at `stage` gets from the store for weights and for moments, and what it has of them."""
    relay = Counts(s3.address)
    checkpoint = Checkpoint(Storage(s3.uri("checkpoints/one", through=relay.address)), "step-00000004")
    opened, model = relay.received, ARVideo(MODEL, DECODER)
    checkpoint.load_weights(model, dist.group.WORLD)
    weights = relay.received - opened
    engine = _new_engine(model, stage)
    checkpoint.load_optimizer(engine)
    relay.close()
    return {
        "weights": weights,
        "moments": relay.received - opened - weights,
        "own": sum(2 * 4 * (f.stop - f.start) for f in zero_state.held_fragments(engine)),
    }


def _count_all_reads(s3: S3) -> list[dict[str, int]]:
    return [_count_reads(s3, stage) for stage in (1, 3)]


def test_the_store_gives_the_weights_once_and_each_rank_its_own_moments(
    saved: tuple[Path, Storage, Storage], s3: S3
) -> None:
    """Three ranks at ZeRO-1 and ZeRO-3 read what two ranks wrote at ZeRO-2, which is 12 bytes an element."""
    weights = 4 * sum(p.numel() for p in ARVideo(MODEL, DECODER).parameters())
    more = 1.1  # headers, HTTP, holes that are not worth a request of their own
    for rank, by_stage in enumerate(run_ranks(3, _count_all_reads, s3)):
        for read in by_stage:
            assert weights <= read["weights"] < more * weights if rank == 0 else read["weights"] == 0
            assert read["own"] <= read["moments"] < more * read["own"]
            assert 0.9 * 2 * weights / 3 < read["own"] < 1.1 * 2 * weights / 3


@pytest.mark.parametrize(("request_bytes", "hole_bytes"), [(4000, 0), (10_000, 5000)])
def test_values_are_the_same_however_they_are_cut_into_requests(
    saved: tuple[Path, Storage, Storage],
    monkeypatch: pytest.MonkeyPatch,
    request_bytes: int,
    hole_bytes: int,
) -> None:
    whole = _weights(saved[1])
    monkeypatch.setattr(parts, "_REQUEST_BYTES", request_bytes)
    monkeypatch.setattr(parts, "_HOLE_BYTES", hole_bytes)
    cut = _weights(saved[1])
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("store", ["local", "s3"])
def test_each_piece_of_a_part_that_is_verified_is_progress(
    saved: tuple[Path, Storage, Storage], monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    checkpoint = Checkpoint(saved[1] if store == "local" else saved[2], "step-00000004")
    (part, *_), ticks = checkpoint.manifest.parts, []
    monkeypatch.setattr(checkpoint_module, "_PIECE_BYTES", part.size // 3)
    monkeypatch.setattr(activity, "tick", lambda: ticks.append(1))
    checkpoint.verify([part])
    assert len(ticks) > 3


def test_nothing_is_unpickled_on_load(
    saved: tuple[Path, Storage, Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    monkeypatch.setattr(torch, "load", refuse)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert _weights(saved[1])


def test_folder_without_a_manifest_is_no_checkpoint(
    saved: tuple[Path, Storage, Storage], tmp_path: Path
) -> None:
    local, run, _ = saved
    manifest = local / FOLDER / "step-00000004" / MANIFEST
    hidden = tmp_path / MANIFEST
    manifest.rename(hidden)
    try:
        assert complete_checkpoints(run) == ["step-00000003"]
    finally:
        hidden.rename(manifest)


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "missing"])
@pytest.mark.parametrize("store", ["local", "s3"])
def test_damaged_part_is_named(saved: tuple[Path, Storage, Storage], store: str, damage: str) -> None:
    run = saved[1] if store == "local" else saved[2]
    part = _member(run, 4, 1)
    whole = run.read_bytes(part)
    if damage == "missing":
        run.delete(part)
    else:
        flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
        run.write_bytes(part, whole[:-1] if damage == "truncated" else flipped)
    try:
        checkpoint = Checkpoint(run, "step-00000004")
        with pytest.raises(CheckpointError, match=rf"step-00000004: {Path(part).name} is (damaged|missing)"):
            checkpoint.verify()
    finally:
        run.write_bytes(part, whole)


def _open(folder: str) -> tuple[str | None, str]:
    control = dist.group.WORLD
    assert control is not None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            found = open_newest_whole(Storage(folder), control)
        except RunStoppedError as error:
            return "stopped", str(error)
    return (found.name if found else None), said.getvalue()


def _open_all(folders: list[str]) -> list[tuple[str | None, str]]:
    return [_open(folder) for folder in folders]


def test_damaged_newest_is_named_and_the_one_before_it_used_on_all_ranks(
    saved: tuple[Path, Storage, Storage], tmp_path: Path
) -> None:
    for name in ("one", "both"):
        shutil.copytree(saved[0], tmp_path / name)
    damaged = [("one", 4, 0), ("both", 4, 1), ("both", 3, 0)]
    for folder, step, part in damaged:
        file = _part(tmp_path / folder, step, part)
        file.write_bytes(file.read_bytes()[:-1])
    folders = [str(tmp_path / name) for name in ("one", "both", "none")]
    remote = saved[2]
    part = _member(remote, 4, 0)
    whole = remote.read_bytes(part)
    remote.write_bytes(part, whole[:-1])
    try:
        opened = run_ranks(2, _open_all, [*folders, remote.address])
    finally:
        remote.write_bytes(part, whole)
    for rank, (one, both, none, on_s3) in enumerate(opened):
        for found, damaged_part in ((one, _part(saved[0], 4, 0).name), (on_s3, Path(part).name)):
            assert found[0] == "step-00000003"
            assert (f"step-00000004: {damaged_part} is damaged" in found[1]) == (rank == 0)
        assert both[0] == "stopped"
        assert "all checkpoints" in both[1]
        assert none == (None, "")


def test_damaged_state_is_refused(saved: tuple[Path, Storage, Storage]) -> None:
    local, run, _ = saved
    state = local / FOLDER / "step-00000004" / "state.json"
    whole = state.read_text()
    state.write_text(json.dumps({**json.loads(whole), "position": 999}))
    try:
        with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
            Checkpoint(run, "step-00000004")
    finally:
        state.write_text(whole)


def test_weights_of_another_model_are_refused_with_the_names(saved: tuple[Path, Storage, Storage]) -> None:
    other = ARVideo(MODEL, DecoderConfig(width=128, depth=1))
    with pytest.raises(ValueError, match=r"another model.*decoder\.blocks\.0\..*another run\.name"):
        Checkpoint(saved[1], "step-00000004").load_weights(other)
