"""Slots of shared memory: used again, never while a tensor over them is alive."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

from arvideo_dist.data import shared
from arvideo_dist.data.loader import ClipSamples
from arvideo_dist.data.shared import SlotFile
from arvideo_dist.storage import Storage
from tests.data.test_loader import batches, make_loader, seen  # noqa: F401  # make_loader is a fixture


def test_a_slot_is_free_when_the_last_tensor_over_it_is_gone() -> None:
    slots = SlotFile(1000)
    number = slots.take()
    assert number is not None
    part = slots.slot(number)[10:20].view(2, 5)
    taken = [slots.take() for _ in range(shared.SLOTS - 1)]
    assert sorted([number, *taken]) == list(range(shared.SLOTS))
    assert slots.take() is None
    gc.collect()
    assert slots.take() is None  # `part` is alive
    del part
    assert slots.take() == number


def test_batches_lie_in_few_slots_and_a_kept_one_stays_as_it_is(
    dataset: Storage,
    make_loader: Callable,  # noqa: F811
) -> None:
    places: set[int] = set()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    for number, batch in enumerate(batches(make_loader(dataset, workers=2, stop_position=140))):
        (slots,) = shared._FILES.values()
        offset = batch.clips.data_ptr() - slots._bytes.ctypes.data
        assert 0 <= offset < slots._bytes.size  # where the worker wrote it
        places.add(offset // slots.slot_bytes)
        if number in (2, 9):
            kept.append((batch.clips, batch.clips.clone()))
    assert len(places) < 16  # of 80 batches
    for clips, copy in kept:
        assert torch.equal(clips, copy)


def test_without_a_slot_that_is_free_or_large_enough_clips_are_the_same(
    dataset: Storage,
    make_loader: Callable,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = seen(make_loader(dataset))
    loader = make_loader(dataset, workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(ClipSamples, "batch_bytes", lambda samples, clips: 64)
        assert seen(loader) == expected
    monkeypatch.setattr(SlotFile, "take", lambda slots: None)
    assert seen(loader) == expected
