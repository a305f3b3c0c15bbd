"""DeepSpeed's partitions to parameter names and back: the only module that knows how ZeRO lays state out.

At every stage a rank holds, of each parameter, at most one contiguous run of its flattened elements, inside
some flat fp32 tensor that AdamW updates (the *partition*; its moments have the same layout). A Fragment says
which run stands where, so state can be written and read by name, whatever the stage and world size.

Layouts, as of DeepSpeed 0.19.8 (tests compare each with `deepspeed.utils.safe_get_full_*`):
stage 0      every rank holds every parameter whole;
stage 1, 2   each parameter group is one flat buffer cut evenly over the ranks (`round_robin_bit16_*` lists
             the parameters in the buffer and where they start);
stage 3      each parameter is cut evenly over the ranks (the last part padded); the parts of a sub-group
             stand one after the other in one flat tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from arvideo_dist.train.engine.engine import Engine

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of flattened parameter `name` = elements from `offset` of flat `partition`."""

    name: str
    start: int
    stop: int
    partition: torch.Tensor  # fp32; the key of the optimiser's state
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This fragment's view of `flat`, a tensor laid out like the partition."""
        return flat.view(-1)[self.offset : self.offset + self.stop - self.start]


def held_fragments(engine: Engine) -> list[Fragment]:
    """What this rank's optimiser updates, in a fixed order. At stage 0 that is everything, on every rank."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    layout = {0: _stage_0, 1: _stage_1_2, 2: _stage_1_2, 3: _stage_3}[engine.stage]
    return [fragment for fragment in layout(engine, names) if fragment.stop > fragment.start]


def owned_fragments(engine: Engine) -> list[Fragment]:
    """What this rank writes: over all ranks every element of every parameter exactly once."""
    held = held_fragments(engine)
    if engine.stage > 0:
        return held
    rank, world_size = dist.get_rank(), dist.get_world_size()
    shares = []
    for whole in held:
        start, stop = whole.stop * rank // world_size, whole.stop * (rank + 1) // world_size
        if stop > start:
            shares.append(Fragment(whole.name, start, stop, whole.partition, start))
    return shares


def frozen_parameters(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies on the host of the parameters that the optimiser does not update, on rank 0 alone. Collective."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        with _whole(engine, parameter):  # one at a time: together they may be more than a device has room for
            if dist.get_rank() == 0:
                found[name] = parameter.detach().to("cpu", copy=True)
    return found


def _whole(engine: Engine, parameter: torch.nn.Parameter) -> AbstractContextManager[None]:
    if engine.stage < 3:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter])
    return gathered


def state_of(engine: Engine, fragment: Fragment) -> dict[str, torch.Tensor]:
    """Views of the fragment's fp32 `weight`, `exp_avg` and `exp_avg_sq` (zeros before the first step)."""
    state = _adamw(engine).state.get(fragment.partition, {})
    views = {"weight": fragment.of(fragment.partition.detach())}
    for moment in MOMENTS:
        views[moment] = fragment.of(state[moment]) if moment in state else torch.zeros_like(views["weight"])
    return views


def optimizer_steps(engine: Engine) -> int:
    """Updates that AdamW has applied (its bias correction counts them)."""
    steps = {int(state["step"]) for state in _adamw(engine).state.values() if "step" in state}
    assert len(steps) <= 1, f"AdamW's partitions disagree on the step: {steps}"
    return steps.pop() if steps else 0


def create_moments(engine: Engine, steps: int) -> None:
    """Give every partition moments, to be filled, and `steps` applied updates.

    Moments that exist are kept for that, so that nothing is held twice. Each partition gets a `step` of its own:
    one tensor shared by stage 3's sub-groups would be advanced once for each of them.
    """
    optimizer = _adamw(engine)
    fused = bool(optimizer.defaults.get("fused"))
    for partition in {id(f.partition): f.partition for f in held_fragments(engine)}.values():
        state = optimizer.state[partition]
        state["step"] = torch.tensor(float(steps), device=partition.device if fused else "cpu")
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(partition)


@contextmanager
def weights_change(engine: Engine) -> Iterator[None]:
    """Within it the caller writes to the `weight` of all fragments that ranks hold; then the model has them too.

    Collective.
    """
    zero = engine.zero_optimizer
    if engine.stage == 3:
        zero._partition_all_parameters()  # else what is gathered now would stay as it is
    yield
    with torch.no_grad():
        if engine.stage == 3:
            for sub_group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        elif engine.stage:
            zero.update_lp_params()


def _adamw(engine: Engine) -> torch.optim.Optimizer:
    return engine.zero_optimizer if engine.stage == 0 else engine.zero_optimizer.optimizer


def _stage_0(engine: Engine, names: dict[int, str]) -> Iterator[Fragment]:
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            yield Fragment(names[id(parameter)], 0, parameter.numel(), parameter, 0)


def _stage_1_2(engine: Engine, names: dict[int, str]) -> Iterator[Fragment]:
    zero, rank = engine.zero_optimizer, dist.get_rank()
    for group, partition in enumerate(zero.single_partition_of_fp32_groups):
        begin = rank * partition.numel()
        end = begin + partition.numel()
        parameters, offsets = zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group]
        for parameter, position in zip(parameters, offsets, strict=True):
            first, last = max(begin, position), min(end, position + parameter.numel())
            name = names[id(parameter)]
            yield Fragment(name, first - position, last - position, partition, first - begin)


def _stage_3(engine: Engine, names: dict[int, str]) -> Iterator[Fragment]:
    zero, rank = engine.zero_optimizer, dist.get_rank()
    for parameters, partition in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = min(rank * share, parameter.ds_numel)
            stop = min(start + share, parameter.ds_numel)
            yield Fragment(names[id(parameter)], start, stop, partition, offset)
            offset += share
