"""What a checkpoint costs the training: extra wall time of a save, slower following steps included.

One rank trains a real model; a round runs the same number of steps three times, in an order that rotates from
round to round: without a save, with a plain save before them, and with this project's. The extra time is the
difference to the steps without a save of the same round. Whatever of the asynchronous save is not done when the
steps are done is waited for and counted.

none           the steps alone
synchronous    what a plain implementation does on the step loop's thread: safetensors' own save_file, fsync, rename
               over the file before; no digest
asynchronous   `Saver`: copy, digest, write, fsync, manifest; the checkpoint before is deleted. `request_s`: the
               step loop stands still; `visible_s`: from the request until a restart may use the checkpoint

Clips are small, so that the steps are short against a save; the state is that of the full model.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.config.optim import OptimConfig, TrainConfig
from arvideo_dist.config.run import RunConfigSection
from arvideo_dist.data.loader import Batch
from arvideo_dist.model.kinds import build_model
from arvideo_dist.storage import Storage, sync
from arvideo_dist.tasks.pretraining import pretraining_loss
from arvideo_dist.tasks.task import decay_matrices
from arvideo_dist.train.checkpoint.manifest import KINDS
from arvideo_dist.train.checkpoint.saver import Saver
from arvideo_dist.train.engine import zero_state
from arvideo_dist.train.engine.engine import Engine


@dataclass(frozen=True)
class Plan:
    encoder: str
    folder: Path  # checkpoints are written below it: the disk that is measured
    rounds: int
    steps: int  # after each save
    threads: int  # of the training's arithmetic
    clips: int = 1
    frames: int = 8
    image_size: int = 112
    zero_stage: int = 1


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Every round's seconds, the extra time of both kinds of save, and their ratio."""
    torch.set_num_threads(plan.threads)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    plan.folder.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tempfile.TemporaryDirectory(dir=plan.folder) as folder:
            return _run(plan, Path(folder), say)
    finally:
        dist.destroy_process_group()


def _run(plan: Plan, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    training = _Training(plan, folder)
    kinds = ["none", "synchronous", "asynchronous"]
    for kind in kinds:  # the first steps create AdamW's moments, the first saves the files
        training.seconds(kind)
    rounds: list[dict[str, float]] = []
    for number in range(plan.rounds):
        turned = kinds[number % 3 :] + kinds[: number % 3]
        seconds = {kind: training.seconds(kind) for kind in turned}
        figures = {f"{kind}_s": seconds[kind] for kind in kinds}
        for kind in ("synchronous", "asynchronous"):
            figures[f"{kind}_extra_s"] = seconds[kind] - seconds["none"]
        figures |= {
            "request_s": training.request_s,
            "visible_s": training.visible_s,
            "left_after_steps_s": training.left_s,
        }
        rounds.append(figures)
        say(f"round {number + 1}  " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    extra = {
        kind: [figures[f"{kind}_extra_s"] for figures in rounds] for kind in ("synchronous", "asynchronous")
    }
    return {
        "state_gb": 12 * sum(p.numel() for p in training.engine.module.parameters()) / 1e9,
        "seconds_a_step": mean(figures["none_s"] for figures in rounds) / plan.steps,
        **{
            f"{kind}_extra_s": {
                "mean": mean(values),
                "min": min(values),
                "max": max(values),
                "deviation": stdev(values) if len(values) > 1 else 0.0,
            }
            for kind, values in extra.items()
        },
        "asynchronous_to_synchronous": mean(extra["asynchronous"]) / mean(extra["synchronous"]),
        "rounds": rounds,
    }


class _Training:
    def __init__(self, plan: Plan, folder: Path) -> None:
        size = plan.image_size // 16
        model = ModelConfig.model_validate(
            {
                "encoder": plan.encoder,
                "frames": plan.frames,
                "image_size": plan.image_size,
                "cluster": (2, size, size),
            }
        )
        torch.manual_seed(0)
        module = build_model(model, DecoderConfig())
        drawn = [module.sequences.draw_sequence(np.random.default_rng(i)) for i in range(plan.clips)]
        shape = (plan.clips, 3, plan.frames, plan.image_size, plan.image_size)
        self._batch = Batch(
            clips=torch.randint(0, 256, shape, dtype=torch.uint8),
            inputs={
                "context_ids": torch.from_numpy(np.stack([context for context, _ in drawn])),
                "target_ids": torch.from_numpy(np.stack([target for _, target in drawn])),
            },
            weights=torch.ones(plan.clips),
            places=torch.arange(plan.clips),
            bad=[],
        )
        train = TrainConfig(
            global_batch=plan.clips, micro_batch=plan.clips, zero_stage=plan.zero_stage, precision="fp32"
        )
        self.engine = Engine(
            module,
            pretraining_loss,
            decay_matrices(module, 0.05),
            train,
            OptimConfig(),
            torch.device("cpu"),
            1,
        )
        options = RunConfigSection(keep_last=1)
        self._saver = Saver(Storage(str(folder)), self.engine, options, say=self._note_visible)
        self._plain = folder / "plain.safetensors"
        self._plan, self._step = plan, 0
        self.request_s = self.left_s = self.visible_s = 0.0
        self._began = 0.0

    def seconds(self, kind: str) -> float:
        """Wall time of a save of `kind` and the steps after it."""
        os.sync()  # nobody writes back what another left
        began = self._began = time.perf_counter()
        if kind == "synchronous":
            self._save_plainly()
        elif kind == "asynchronous":
            self._saver.request(self._step, {"position": self._step * self._plan.clips})
            self.request_s = time.perf_counter() - began
        for _ in range(self._plan.steps):
            self.engine.accumulate([self._batch], total_weight=float(self._plan.clips))
            self._saver.before_update()
            self.engine.apply(1e-4)
            self._step += 1
        done = time.perf_counter()
        self._saver.finish()
        ended = time.perf_counter()
        if kind == "asynchronous":
            self.left_s = ended - done
        return ended - began

    def _note_visible(self, line: str) -> None:
        """The saver's line about a checkpoint that is complete, or about a save that failed."""
        if "is complete" not in line:
            raise RuntimeError(line)
        self.visible_s = time.perf_counter() - self._began

    def _save_plainly(self) -> None:
        tensors = {}
        for fragment in zero_state.owned_fragments(self.engine):
            state = zero_state.state_of(self.engine, fragment)
            tensors.update({f"{kind}/{fragment.name}": state[kind].detach() for kind in KINDS})
        aside = self._plain.with_suffix(".partial")
        save_file(tensors, aside)
        sync(aside)
        os.replace(aside, self._plain)
        sync(self._plain.parent)
