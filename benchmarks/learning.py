"""Does each method learn with normalised targets? The training parts of a run, without Ray and MLflow.

    python -m data_prep synthetic --out build/learning-data --split train --num-videos 1536 --seed 1 \\
        --width 64 --height 64 --frames 32                                    (and --split val ... 128, --seed 2)
    python benchmarks/learning.py jobs/learning/arvideo.yaml jobs/learning/videomae.yaml --seeds 0 1 --json PATH

One process, on the GPU where there is one. Every run ends at its configuration's last step; the learned share
is 1 - loss / (loss of the best constant cube on the same validation targets). Needs what the loader needs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare machine has no installed package

from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.config.settings import read_config
from arvideo_dist.config.sources import (
    clips_per_epoch,
    loader_options,
    pretraining_sources,
    validation_options,
    validation_source,
)
from arvideo_dist.data.index import load_manifest
from arvideo_dist.data.loader import ClipLoader, ClipSource, LoaderOptions
from arvideo_dist.hardware import environment, write_json
from arvideo_dist.tasks.derived import derive
from arvideo_dist.tasks.kinds import task_of
from arvideo_dist.train.engine.engine import Engine
from arvideo_dist.train.engine.schedule import learning_rate
from arvideo_dist.train.evaluation import validate


def learn(config: PretrainConfig, device: torch.device) -> dict[str, Any]:
    """One run from random weights; its validation curve and what it took."""
    derived = derive(config, clips_per_epoch(config.data))
    assert derived.total_steps is not None
    assert derived.warmup_steps is not None
    batch, pin = derived.global_batch, device.type == "cuda"
    torch.manual_seed(config.run.seed)
    task = task_of(config)
    model = task.build()
    engine = Engine(
        model,
        task.loss,
        task.parameter_groups(model),
        config.train,
        config.optim,
        device,
        derived.accumulation_steps,
    )

    def loader(sources: list[ClipSource], stop: int, shuffle: bool, options: LoaderOptions) -> ClipLoader:
        return ClipLoader(
            sources,
            clip_frames=config.model.frames,
            image_size=config.model.image_size,
            draw=task.draw(),
            seed=config.run.seed,
            position=0,
            global_batch=batch,
            micro_batch=config.train.micro_batch,
            rank=0,
            world_size=1,
            workers=config.data.workers,
            stop_position=stop,
            shuffle=shuffle,
            options=options,
        )

    held_out = validation_source(config.data)
    clips = min(load_manifest(held_out.storage, held_out.split).samples, config.validation.max_clips)
    curve, waited, began = [], 0.0, time.perf_counter()
    batches = iter(
        loader(
            pretraining_sources(config.data),
            derived.total_steps * batch,
            True,
            loader_options(config.data, pin_memory=pin),
        )
    )
    for step in range(derived.total_steps):
        asked = time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter() - asked
        total_weight = sum(float(b.weights.sum()) for b in micro_batches)
        rate = learning_rate(
            step,
            total_steps=derived.total_steps,
            warmup_steps=derived.warmup_steps,
            peak=derived.peak_lr,
            final=derived.min_lr,
        )
        loss_sum = engine.accumulate(micro_batches, total_weight)
        engine.apply(rate)
        if (step + 1) % config.validation.every_steps == 0 or step + 1 == derived.total_steps:
            held_out_batches = loader(
                [held_out], clips, False, validation_options(config.data, pin_memory=pin)
            )
            metrics = validate(engine, held_out_batches, config.model, dist.group.WORLD).metrics
            curve.append({"step": step + 1, "loss/train": float(loss_sum) / total_weight, **metrics})
            print(config.run.name, config.run.seed, json.dumps(curve[-1]), flush=True)
    seconds = time.perf_counter() - began
    return {
        "learned_share": 1 - curve[-1]["loss/val"] / curve[-1]["loss/constant_predictor"],
        "seconds": seconds,
        "clips_per_second": derived.total_steps * batch / seconds,
        "data_wait_share": waited / seconds,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", type=Path, metavar="YAML", help="one method each")
    parser.add_argument("--data", help="data set in place of the configurations'")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="steps in place of the configurations'")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write curves, configurations and hardware here"
    )
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # validation sums on the host
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        runs = []
        for seed in given.seeds:
            for file in given.configs:
                arguments = ["--config", str(file), "--run.name", file.stem, "--run.seed", str(seed)]
                arguments += ["--data.path", given.data] if given.data else []
                arguments += ["--train.steps", str(given.steps)] if given.steps else []
                config, _ = read_config(PretrainConfig, arguments)
                result = learn(config, device)
                runs.append(
                    {
                        "method": file.stem,
                        "seed": seed,
                        **result,
                        "configuration": config.model_dump(mode="json", exclude_defaults=True),
                    }
                )
                if given.json:  # after each run: a machine that is taken away keeps what is done
                    write_json(given.json, {"subject": "learning", **environment(), "runs": runs})
        dist.destroy_process_group()
    for run in runs:
        print(f"{run['method']} seed {run['seed']}: {run['learned_share']:.1%} under the constant predictor")


if __name__ == "__main__":
    main()
