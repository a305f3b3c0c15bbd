"""What a worker takes of memory is counted in full, and the largest micro batch that fits is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from arvideo_dist.checks import machine
from arvideo_dist.checks.finding import Level
from arvideo_dist.checks.machine import check_memory, judge_device_memory
from arvideo_dist.checks.memory import NOTHING, Memory, memory_of
from arvideo_dist.checks.needs import needs_of
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.tasks.derived import Derived, derive

GIB = 2**30


def _memory(*, cuda: bool = False, **sections: Any) -> tuple[Memory, Memory, Derived]:
    config = PretrainConfig.model_validate(sections)
    derived = derive(config, None)
    return *memory_of(config, derived, cuda=cuda), derived


def test_everything_that_a_cpu_worker_holds_is_counted() -> None:
    host, device, derived = _memory(
        train={"zero_stage": 0, "global_batch": 64, "micro_batch": 8},
        cluster={"workers": 2},
        data={"workers": 4},
    )
    parts, whole = dict(host.parts), 4 * derived.parameters
    clip = 16 * 3 * 224 * 224
    assert device is NOTHING
    assert parts["weights"] == whole
    assert parts["gradients"] == 2 * whole
    assert parts["AdamW's moments"] == 2 * whole
    activations = 8 * derived.activation_mb_per_clip + derived.activation_mb_per_pass
    assert parts["activations of 8 clips"] == pytest.approx(1e6 * activations, abs=2)
    assert parts["the copy that saves take"] == 12 * derived.parameters // 2
    assert parts["batches"] == (4 + 2 * 4) * 8 * clip
    assert parts["processes"] > 0
    assert host.total == sum(parts.values())


def test_zero_divides_by_the_workers_what_its_stage_divides() -> None:
    def parts(stage: int, workers: int) -> dict[str, float]:
        host, _, derived = _memory(train={"zero_stage": stage}, cluster={"workers": workers})
        return {what: number / (4 * derived.parameters) for what, number in host.parts}

    assert [parts(stage, 4)["AdamW's moments"] for stage in (0, 1, 2, 3)] == pytest.approx([2, 0.5, 0.5, 0.5])
    assert [parts(stage, 4)["weights"] for stage in (0, 1, 2, 3)] == pytest.approx([1, 1.25, 1.25, 1.5])
    assert parts(2, 4)["gradients"] < parts(1, 4)["gradients"]
    assert parts(1, 8)["the copy that saves take"] == pytest.approx(3 / 8)


def test_on_a_gpu_training_takes_its_memory_and_the_host_holds_pinned_batches_and_the_copy() -> None:
    host, device, derived = _memory(cuda=True)
    assert [what for what, _ in device.parts] == [
        "weights", "gradients", "AdamW's moments", f"activations of {derived.micro_batch} clips", "CUDA",
    ]  # fmt: skip
    assert [what for what, _ in host.parts] == [
        "batches", "their pinned copies", "the copy that saves take", "processes",
    ]  # fmt: skip
    full = dict(_memory(cuda=True, train={"precision": "fp32"})[1].parts)
    kept = dict(device.parts)["activations of 32 clips"] / full["activations of 32 clips"]
    assert kept == pytest.approx(0.75)


def test_object_storage_holds_a_save_twice() -> None:
    remote = "s3://bucket/runs?region=us-east-1"
    local, _, _ = _memory()
    there, _, _ = _memory(run={"storage_path": remote})
    key = "the copy that saves take"
    assert dict(there.parts)[key] == 2 * dict(local.parts)[key]


def test_the_largest_micro_batch_is_the_largest_that_fits() -> None:
    sections: dict[str, Any] = {"train": {"global_batch": 256, "micro_batch": 32}, "cluster": {"workers": 2}}
    host, _, _ = _memory(**sections)
    for room in (0.9 * host.total, 0.5 * host.total, 0.3 * host.total):
        largest = host.largest_micro_batch(room)
        assert 0 < largest < 32

        def total(micro: int) -> int:
            train = {**sections["train"], "micro_batch": micro}
            return _memory(**{**sections, "train": train})[0].total

        # Of a micro batch that does not divide the global batch, the padding comes on top.
        padding = largest * 16 * 3 * 224 * 224
        assert total(largest) <= room + padding
        assert total(largest + 1) > room
    assert host.largest_micro_batch(0) == 0
    assert host.largest_micro_batch(host.total) == 32


def _check(free: float, monkeypatch: pytest.MonkeyPatch, workers_here: int = 2, **train: Any) -> Any:
    monkeypatch.setattr(machine, "free_memory", lambda: int(free))
    config = PretrainConfig.model_validate(
        {
            "train": {"global_batch": 256, "micro_batch": 32, **train},
            "cluster": {"workers": 2, "device": "cpu"},
        }
    )
    return check_memory(needs_of(config, derive(config, None), cuda=False), workers_here)


def test_a_run_that_needs_29_gib_is_not_ok_with_7(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two CPU workers of the defaults' ViT-B: of batches alone they keep some 2 GiB each."""
    found = _check(7 * GIB, monkeypatch)
    assert found.level is Level.ERROR
    assert "7.0 GiB free, 2 workers take up to" in found.message
    for what in ("weights", "gradients", "AdamW's moments", "activations of 32 clips", "the copy", "batches"):
        assert what in found.message
    assert "no train.micro_batch fits" in found.message
    smaller = _check(20 * GIB, monkeypatch)
    assert smaller.level is Level.ERROR
    assert "lower train.micro_batch to " in smaller.message
    assert _check(60 * GIB, monkeypatch).level is Level.OK


def test_an_estimate_refuses_a_gpu_only_beyond_all_of_its_memory() -> None:
    memory = Memory((("weights", 10 * GIB), ("activations of 8 clips", 40 * GIB)), 8, 5 * GIB)
    assert judge_device_memory(memory, 60 * GIB, 80 * GIB).level is Level.OK
    tight = judge_device_memory(memory, 46 * GIB, 80 * GIB)
    assert tight.level is Level.WARNING
    assert "lower train.micro_batch to 7, the largest that fits" in tight.message
    assert judge_device_memory(replace(memory, micro_batch=8), 40 * GIB, 40 * GIB).level is Level.ERROR
