"""What a machine must have, and what is said where it has not."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arvideo_dist.checks import machine
from arvideo_dist.checks.finding import Level
from arvideo_dist.checks.machine import (
    check_device,
    check_disk,
    check_room,
    check_shared_memory,
    check_versions,
    versions,
)
from arvideo_dist.checks.memory import NOTHING
from arvideo_dist.checks.needs import Needs, needs_of
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.data.shared import SLOTS
from arvideo_dist.tasks.derived import derive
from arvideo_dist.train.checkpoint.layout import FOLDER

MIB = 2**20
NONE = Needs(shm=0, shm_for_large_batches=0, memory=NOTHING, device_memory=NOTHING, index=0, shard_cache=0)


def _needs(*, cuda: bool = False, **sections: dict[str, object]) -> Needs:
    config = PretrainConfig.model_validate(sections)
    return needs_of(config, derive(config, None), cuda=cuda)


@pytest.fixture
def small_shm(tmp_path: Path) -> Path:
    """A mounted tmpfs of 16 MiB; skips where mounting is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)]
    if (mounted := subprocess.run(mount, capture_output=True)).returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_too_small_shared_memory_is_named_with_what_is_needed(small_shm: Path) -> None:
    needs = replace(NONE, shm=10 * MIB)
    assert check_shared_memory(needs, 1, cuda=False, folder=small_shm).level is Level.OK
    found = check_shared_memory(needs, 2, cuda=False, folder=small_shm)
    assert found.level is Level.ERROR
    assert found.message.startswith("16 MiB of 16 MiB free, 2 workers need 20 MiB: give the container more")
    assert "sizeLimit" in found.message
    assert not found.passing
    (small_shm / "left-behind").write_bytes(b"x" * 12 * MIB)
    assert check_shared_memory(needs, 1, cuda=False, folder=small_shm).level is Level.ERROR, "free, not all"


def test_kubernetes_64_mib_are_too_few_for_eight_gpus_that_share_a_node(small_shm: Path) -> None:
    assert 8 * _needs(cuda=True).shm > 64 * MIB
    assert check_shared_memory(_needs(cuda=True), 8, cuda=True, folder=small_shm).level is Level.ERROR


def test_shared_memory_without_room_for_batches_that_outgrow_their_slot_is_a_warning(small_shm: Path) -> None:
    needs = replace(NONE, shm=MIB, shm_for_large_batches=20 * MIB)
    assert check_shared_memory(needs, 1, cuda=False, folder=small_shm).level is Level.WARNING


def test_only_what_finds_no_slot_needs_shared_memory() -> None:
    """Slots are a memfd's, which the size of /dev/shm does not bound."""
    train = {"global_batch": 2048, "micro_batch": 8}
    few = _needs(train=train, data={"workers": 8}, cluster={"workers": 8})  # 32 of a step, 16 prefetched
    clip = 16 * 3 * 224 * 224
    assert dict(few.memory.parts)["batches"] == (32 + 16) * 8 * clip
    assert few.shm == MIB
    many = _needs(train=train, data={"workers": 8}, cluster={"workers": 1})  # 256 of a step, 16 prefetched
    assert many.shm == MIB + (256 + 16 - SLOTS) * 8 * clip


def test_index_tensors_too_large_for_the_pipe_need_shared_memory() -> None:
    pixels = {
        "tubelet": [1, 1, 1],
        "cluster": [1, 1, 1],
        "target_norm": "none",
        "image_size": 32,
        "frames": 8,
    }
    train = {"global_batch": 64, "micro_batch": 32}
    found = _needs(model=pixels, train=train, data={"workers": 1}, cluster={"workers": 1})
    config = PretrainConfig.model_validate({"model": pixels, "train": train})
    derived = derive(config, None)
    ids = [8 * 32 * derived.encoder_tokens, 8 * 32 * derived.decoder_queries]
    assert found.shm == MIB + 4 * sum(size for size in ids if size > MIB)
    assert found.shm > MIB


def _run_on(folder: Path) -> PretrainConfig:
    run = {"name": "run", "storage_path": str(folder), "keep_last": 2}
    return PretrainConfig.model_validate({"run": run})


def test_storage_must_hold_one_checkpoint_more_than_are_kept(small_shm: Path) -> None:
    def found(checkpoint: int) -> Level:
        (storage,) = check_room(_run_on(small_shm), checkpoint)
        assert "the run's checkpoints" in storage.message
        return storage.level

    assert found(5 * MIB) is Level.OK
    assert found(6 * MIB) is Level.ERROR
    kept = small_shm / "run" / FOLDER / "step-00000001"
    kept.mkdir(parents=True)
    (kept / "part").write_bytes(b"x" * 5 * MIB)
    assert found(5 * MIB) is Level.OK, "what is there already is no further need"


def test_full_scratch_disk_is_named_with_its_folder(small_shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(small_shm))
    scratch, *_ = check_disk(_run_on(small_shm), replace(NONE, index=17 * MIB))
    assert scratch.level is Level.ERROR
    assert f"{small_shm}: 16 MiB free, 17 MiB wanted for the data set's index: set TMPDIR" in scratch.message


def test_shard_cache_that_the_disk_cannot_hold_is_refused(small_shm: Path) -> None:
    data = {"shard_cache": str(small_shm), "shard_cache_gib": 1, "shuffle_block_shards": 4}
    config = _run_on(small_shm).model_copy(
        update={"data": PretrainConfig.model_validate({"data": data}).data}
    )
    found = check_disk(config, _needs(data=data))[1]
    assert found.level is Level.ERROR
    assert "lower data.shard_cache_gib" in found.message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_named_and_a_cpu_run_does_not_ask_for_one() -> None:
    found = check_device(cuda=True)
    assert found.level is Level.ERROR
    assert "sees no usable GPU; no NVIDIA driver is found" in found.message
    assert check_device(cuda=False).level is Level.OK


def test_other_versions_than_the_drivers_are_named() -> None:
    assert check_versions(versions(), versions()).level is Level.OK
    found = check_versions(versions(), versions() | {"torch": "2.12.0"})
    assert found.level is Level.ERROR
    assert (
        f"torch {versions()['torch']} here, 2.12.0 on the driver: start driver and workers" in found.message
    )


def test_shard_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = {"shard_cache": str(tmp_path / "file/cache"), "shard_cache_gib": 1, "shuffle_block_shards": 4}
    config = _run_on(tmp_path).model_copy(update={"data": PretrainConfig.model_validate({"data": data}).data})
    found = check_disk(config, _needs(data=data))[1]
    assert found.level is Level.ERROR
    assert "cannot be written (Not a directory): set data.shard_cache" in found.message


@pytest.mark.parametrize("version", [1, 2])
def test_memory_that_the_control_group_leaves_counts_and_its_cache_yields(
    tmp_path: Path, version: int
) -> None:
    files = {
        1: {
            "memory/memory.limit_in_bytes": 300 * MIB,
            "memory/memory.usage_in_bytes": 250 * MIB,
            "memory/memory.stat": f"cache 9\ntotal_inactive_file {60 * MIB}",
        },
        2: {
            "memory.max": 300 * MIB,
            "memory.current": 250 * MIB,
            "memory.stat": f"anon 9\ninactive_file {60 * MIB}",
        },
    }
    (tmp_path / "memory").mkdir()
    for name, content in files[version].items():
        (tmp_path / name).write_text(f"{content}\n")
    assert machine.free_memory(tmp_path) == 110 * MIB


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_a_control_group_without_a_limit_leaves_what_the_machine_has(tmp_path: Path, limit: str) -> None:
    folder = tmp_path if limit == "max" else tmp_path / "memory"
    names = (
        ("memory.max", "memory.current")
        if limit == "max"
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    folder.mkdir(exist_ok=True)
    for name, content in zip(
        (*names, "memory.stat"), (limit, 0, "inactive_file 0\ntotal_inactive_file 0"), strict=True
    ):
        (folder / name).write_text(f"{content}\n")
    assert machine.free_memory(tmp_path) > 300 * MIB
