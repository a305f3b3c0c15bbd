"""Frozen parameters and persistent buffers: kept by every checkpoint, exact in any layout, and gone back to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from arvideo_dist.config.optim import OptimConfig, TrainConfig
from arvideo_dist.data.loader import Batch
from arvideo_dist.data.order import places_of_rank
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.task import ParameterGroup
from arvideo_dist.train.checkpoint.layout import FOLDER
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.run.stop import RunStoppedError
from tests.train.distributed import make_saver, run_ranks
from tests.train.keyed import GLOBAL_BATCH, MICRO_BATCH, micro_batch, rate, state_at, weight_of

STEPS, STOP = 6, 3
LAYOUTS = [(world_size, stage) for world_size in (1, 2, 3) for stage in range(4)]  # world size, ZeRO stage
TO_ZERO_3 = [(before, (2, 3)) for before in LAYOUTS if before[0] < 3]
FROM_ZERO_3 = [((2, 3), after) for after in LAYOUTS if after[0] != 2]


class Probe(nn.Module):
    """A trained head over a frozen body, with buffers of several types that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body, self.head = nn.Linear(16, 11), nn.Linear(11, 1)
        self.scale = nn.Parameter(torch.randn(7).bfloat16())
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3, 2).t())  # not contiguous
        self.register_buffer("odd", torch.tensor([True, False, False]))
        self.register_buffer("cache", torch.ones(2), persistent=False)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            self.mean.mul_(0.9).add_(self.calls)
            self.odd.logical_not_()
        hidden = self.body(clips.flatten(1)[:, :16].float() / 255) * self.scale.float().sum()
        return self.head(hidden).squeeze(1) + self.mean.mean()


def loss_of(forward: Any, batch: Batch) -> torch.Tensor:
    return forward(batch.clips).square()


def new_engine(module: Probe, stage: int) -> Engine:
    train = TrainConfig(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, zero_stage=stage)
    groups = [
        ParameterGroup([module.head.weight], weight_decay=0.05),
        ParameterGroup([module.head.bias], weight_decay=0.0, lr_scale=0.5),
    ]
    accumulation = -(-GLOBAL_BATCH // (MICRO_BATCH * dist.get_world_size()))
    return Engine(module, loss_of, groups, train, OptimConfig(), torch.device("cpu"), accumulation)


def train(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        places = places_of_rank(
            step * GLOBAL_BATCH, GLOBAL_BATCH, MICRO_BATCH, dist.get_rank(), dist.get_world_size()
        )
        loss = engine.accumulate([micro_batch(list(p)) for p in places], weight_of(step))
        engine.apply(rate(step, STEPS))
        dist.all_reduce(loss)
        losses.append(float(loss) / weight_of(step))
    return losses


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def begin(folder: str, layouts: list[tuple[int, int]]) -> dict[Any, Any]:
    """Train to the end with a checkpoint on the way; then go back to it and train again."""
    found = {}
    for layout in layouts:
        run, engine = Storage(f"{folder}/{layout}"), new_engine(Probe(), layout[1])
        losses = train(engine, 0, STOP)
        saver = make_saver(run, engine)
        saver.request(STOP, state_at(STOP))
        at_save = buffers_of(engine.module)
        # Forward changes buffers before the copy of the weights need be whole.
        engine.module(torch.zeros(1, 3, 4, 16, 16))
        saver.finish()
        checkpoint = Checkpoint(run, f"step-{STOP:08d}")
        checkpoint.restore(engine)
        back = buffers_of(engine.module)
        losses += train(engine, STOP, STEPS)
        first_losses = losses[STOP:]
        checkpoint.restore(engine)
        found[layout] = {
            "losses": losses,
            "again": (first_losses, train(engine, STOP, STEPS)),
            "at save": at_save,
            "back": back,
        }
    return found


def resume(folder: str, changes: list[tuple[tuple[int, int], tuple[int, int]]]) -> dict[Any, Any]:
    found = {}
    for before, after in changes:
        checkpoint = Checkpoint(Storage(f"{folder}/{before}"), f"step-{STOP:08d}")
        checkpoint.verify()
        module = Probe()
        with torch.no_grad():
            for tensor in [*module.parameters(), module.calls, module.mean, module.odd]:
                tensor.fill_(True if tensor.dtype == torch.bool else -1)
        checkpoint.load_weights(module, dist.group.WORLD)
        loaded = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        engine = new_engine(module, after[1])
        checkpoint.load_optimizer(engine)
        found[before, after] = {"loaded": loaded, "losses": train(engine, STOP, STEPS)}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("untrained")


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[Any, list[Any]]:
    """Layout to what each rank found."""
    found: dict[Any, list[Any]] = {}
    for world_size in (1, 2, 3):
        layouts = [layout for layout in LAYOUTS if layout[0] == world_size]
        by_rank = run_ranks(world_size, begin, str(folder), layouts)
        found |= {layout: [rank[layout] for rank in by_rank] for layout in layouts}
    return found


@pytest.fixture(scope="module")
def resumed(folder: Path, whole: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for world_size in (1, 2, 3):
        changes = [change for change in [*TO_ZERO_3, *FROM_ZERO_3] if change[1][0] == world_size]
        by_rank = run_ranks(world_size, resume, str(folder), changes)
        found |= {change: [rank[change] for rank in by_rank] for change in changes}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_that_goes_back_has_the_buffers_of_the_save_and_the_same_losses(
    whole: dict[Any, list[Any]], layout: tuple[int, int]
) -> None:
    for rank in whole[layout]:
        assert rank["at save"]["calls"] > 0
        for name, buffer in rank["at save"].items():
            assert torch.equal(rank["back"][name], buffer), name
        first, again = rank["again"]
        assert first == again


@pytest.mark.parametrize("change", [*TO_ZERO_3, *FROM_ZERO_3])
def test_what_is_not_trained_is_read_to_the_bit_at_any_stage_and_world_size(
    whole: dict[Any, list[Any]],
    resumed: dict[Any, list[Any]],
    change: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    start, before = Probe().state_dict(), whole[change[0]][0]
    for rank in resumed[change]:
        for name in ("body.weight", "body.bias", "scale"):
            assert torch.equal(rank["loaded"][name], start[name]), name
        for name in ("calls", "mean", "odd"):
            assert torch.equal(rank["loaded"][name], before["at save"][name]), name
        if (
            change[0][0] == change[1][0]
        ):  # the calls of forward are counted by rank: others at other world sizes
            assert rank["losses"] == pytest.approx(before["losses"][STOP:], rel=1e-6)


def save_what_differs(folder: str) -> list[str]:
    engine, said = new_engine(Probe(), 0), []
    engine.module.calls += dist.get_rank()
    saver = make_saver(Storage(folder), engine)
    saver._say = said.append
    for step in (1, 2):
        saver.request(step, state_at(step))
        saver.finish()
    return [line for line in said if "differ" in line]


def test_buffers_that_differ_between_ranks_are_said_once_and_rank_0s_are_kept(tmp_path: Path) -> None:
    said = run_ranks(2, save_what_differs, str(tmp_path))
    assert [len(lines) for lines in said] == [
        1,
        1,
    ]  # the saver gives its lines on all ranks; rank 0's are shown
    module = Probe()
    Checkpoint(Storage(str(tmp_path)), "step-00000002").load_weights(module)
    assert module.calls == 0


class Strange(Probe):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def save_strange(folder: str) -> str:
    with pytest.raises(RunStoppedError) as caught:
        make_saver(Storage(folder), new_engine(Strange(), 1))
    return str(caught.value)


def test_state_that_no_checkpoint_would_hold_is_refused_at_the_start(tmp_path: Path) -> None:
    (message,) = run_ranks(1, save_strange, str(tmp_path))
    assert "_extra_state" in message


def load_more_trained(folder: str) -> str:
    checkpoint = Checkpoint(Storage(folder), f"step-{STOP:08d}")
    module = Probe()
    checkpoint.load_weights(module)
    train_config = TrainConfig(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH, zero_stage=1)
    groups = [ParameterGroup([*module.head.parameters(), module.body.weight], weight_decay=0)]
    engine = Engine(module, loss_of, groups, train_config, OptimConfig(), torch.device("cpu"), GLOBAL_BATCH)
    with pytest.raises(ValueError, match="other parameters frozen") as caught:
        checkpoint.load_optimizer(engine)
    return str(caught.value)


def test_a_checkpoint_of_other_frozen_parameters_is_refused_by_name(
    folder: Path, whole: dict[Any, list[Any]]
) -> None:
    (message,) = run_ranks(1, load_more_trained, str(folder / "(1, 1)"))
    assert "body.weight" in message


def test_rank_0_alone_writes_what_is_not_trained(folder: Path, whole: dict[Any, list[Any]]) -> None:
    names = [path.name for path in (folder / "(2, 2)" / FOLDER / f"step-{STOP:08d}").iterdir()]
    assert sum(name.startswith("untrained-") for name in names) == 1
