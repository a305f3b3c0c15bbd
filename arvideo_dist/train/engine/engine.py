"""The DeepSpeed engine around the model: ZeRO stage, precision, optimiser, accumulation of a global batch.

Parameters are fp32 at every stage; bf16 is DeepSpeed's torch autocast over them. (DeepSpeed's own `bf16` mode
takes a dummy Adam step at stage 0 in 0.19.8; autocast is right at stages 0 to 3 and makes a checkpoint mean
the same at all of them.)

Gradients are summed over ranks, and ZeRO-3's weights gathered, in fp32. For linear layers DeepSpeed's default
under autocast is bf16, which rounds sums over ranks; and if ZeRO-3 gathers anew what it had kept whole, weights
that are used in fp32 are rounded too, so that a run that was resumed was not bit-equal to one that was not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from arvideo_dist.config.optim import OptimConfig, TrainConfig, resolve_precision
from arvideo_dist.train.health.activity import activity

if TYPE_CHECKING:  # the loader wants packages that a bare GPU machine does not have (benchmarks/gpu_check.py)
    from arvideo_dist.data.loader import Batch
from arvideo_dist.tasks.task import Forward, ParameterGroup
from arvideo_dist.train.engine.timing import ForwardTime

Loss = Callable[[Forward, "Batch"], torch.Tensor]


@dataclass(frozen=True)
class Update:
    """What became of a step's gradients; the same on all ranks."""

    applied: bool  # False: the norm is not finite, and weights, moments and the optimiser's step count stay
    gradient_norm: torch.Tensor | float  # over all ranks, before clipping; a tensor is still on the device


class Engine:
    """One rank's share of the data-parallel training of a module."""

    # Of the newest `accumulate`: float32 [B] of each micro batch, on the device.
    sample_losses: list[torch.Tensor]

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        groups: Sequence[ParameterGroup],
        train: TrainConfig,
        optim: OptimConfig,
        device: torch.device,
        accumulation_steps: int,
    ) -> None:
        """The process group must exist; `module` holds the start weights on every rank.

        `loss(forward, batch)`: of each clip of a batch on the device, float32 [B]. Parameters in none of `groups`
        are frozen.
        """
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # after the accelerator is named: it chooses one at import

        # Else the CPU accelerator compiles a shared-memory op at start, which needs g++ and can hang on a lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer = torch.optim.AdamW(
            [
                {"params": group.parameters, "weight_decay": group.weight_decay, "lr_scale": group.lr_scale}
                for group in groups
            ],
            lr=0.0,  # set before every step from the schedule
            betas=optim.betas,
            eps=optim.eps,
            fused=device.type == "cuda",
        )
        grouped = {id(parameter) for group in groups for parameter in group.parameters}
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in grouped)
        self._loss = loss
        self.stage = train.zero_stage
        self.device = device
        self.world_size = dist.get_world_size()
        self.forward_time = ForwardTime(device)  # of the last step
        self._deepspeed, *_ = deepspeed.initialize(
            model=module.to(device),
            optimizer=optimizer,
            config=_deepspeed_config(train, optim, device, accumulation_steps),
            dist_init_required=False,
        )
        self._deepspeed.train()

    @property
    def module(self) -> nn.Module:
        return self._deepspeed.module

    @property
    def zero_optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer (stages 1 to 3) or the plain AdamW (stage 0)."""
        return self._deepspeed.optimizer

    def accumulate(self, batches: Sequence[Batch], total_weight: float) -> torch.Tensor:
        """Forward and backward of this rank's micro batches of one step.

        `total_weight`: sum of the weights of the whole global batch over all ranks, so that the gradient is
        that of the weighted mean loss at any world size. Returns the weighted sum of the local losses
        (float32 scalar on the device). A loss that is not finite makes all gradients NaN.
        """
        # A global batch without a usable sample gives zero gradients, not a division by zero.
        scale = self.world_size / max(total_weight, 1.0)
        loss_sum = torch.zeros((), device=self.device)
        self.sample_losses = []
        self.forward_time = ForwardTime(self.device)
        for index, host_batch in enumerate(batches):
            activity.together(f"forward and backward of micro batch {index + 1} of {len(batches)}")
            batch = host_batch.to(self.device)
            with self.forward_time:
                loss_b = self._loss(self.forward, batch)
                weighted = (loss_b * batch.weights).sum()
            self.sample_losses.append(loss_b.detach())
            # A square that overflows to Inf can have a finite gradient. The gate makes it NaN without asking the
            # device, so that the check of the gradients, which asks it anyway, finds every loss that is not finite.
            gate = torch.where(weighted.detach().isfinite(), 1.0, torch.nan)
            # DeepSpeed averages over ranks; accumulation is already in total_weight.
            self._deepspeed.backward(weighted * gate * scale, scale_wrt_gas=False)
            if index < len(batches) - 1:
                self._deepspeed.step()  # counts the micro batch; weights change in `apply` only
            loss_sum += weighted.detach()
        return loss_sum

    def apply(self, learning_rate: float) -> Update:
        """The optimiser step at `learning_rate`, left out if the gradients' norm is not finite.

        ZeRO's stages look at their norm themselves, at every precision (DeepSpeed 0.19.8), which costs the one
        wait for the device of a step; at stage 0 it is done here.
        """
        for group in self.zero_optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        activity.together("optimiser step")
        if self.stage == 0:
            return self._apply_plain()
        self._deepspeed.step()
        return Update(self._deepspeed.was_step_applied(), self._deepspeed.get_global_grad_norm())

    def _apply_plain(self) -> Update:
        # DeepSpeed keeps no norm at stage 0 in fp32; gradients are whole and reduced there.
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if math.isfinite(norm):
            self._deepspeed.step()
            return Update(True, norm)
        self._deepspeed.zero_grad()
        # So that `step` counts the micro batch only.
        self._deepspeed.set_gradient_accumulation_boundary(False)
        self._deepspeed.step()
        self._deepspeed.set_gradient_accumulation_boundary(None)  # as before: every so many micro batches
        return Update(False, norm)

    def forward(self, *inputs: Any) -> Any:
        """The module, called so that ZeRO-3 gathers its weights."""
        return self._deepspeed(*inputs)

    def set_training(self, training: bool) -> None:
        self._deepspeed.train(training)


def _deepspeed_config(
    train: TrainConfig, optim: OptimConfig, device: torch.device, accumulation_steps: int
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": optim.clip_grad_norm or 0.0,
        "zero_optimization": {"stage": train.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,  # the loop prints progress itself
    }
    if resolve_precision(train.precision, device.type) == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
