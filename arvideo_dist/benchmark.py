"""Measurements: `python -m arvideo_dist.benchmark SUBJECT ... --json PATH`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arvideo_dist.config.settings import exit_with
from arvideo_dist.hardware import environment, write_json


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m arvideo_dist.benchmark", description=__doc__)
    subjects = parser.add_subparsers(dest="subject", required=True)
    loader = subjects.add_parser("loader", help="CPU time of a training clip against two other loaders")
    loader.add_argument("--data", required=True, help="data set that `data_prep folder` made")
    loader.add_argument("--split", default="train")
    loader.add_argument("--videos", required=True, type=Path, help="the folder it was made from")
    loader.add_argument(
        "--work", type=Path, default=Path("build/loader-benchmark"), help="for short-side-320 files"
    )
    loader.add_argument("--clips", type=int, default=128, help="clips a loader and round (default: 128)")
    loader.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    loader.add_argument("--micro-batch", type=int, default=8, help="clips a batch (default: 8)")
    loader.add_argument(
        "--gpu-clips-per-second", type=float, default=250, help="to feed one GPU (default: 250)"
    )
    order = subjects.add_parser("order", help="seconds and memory of the sample order over a large index")
    order.add_argument("--samples", type=int, default=10**8, help="rows of the index (default: 10^8)")
    order.add_argument("--seeks", type=int, default=50, help="random positions (default: 50)")
    checkpoint = subjects.add_parser("checkpoint", help="extra wall time of an asynchronous save")
    checkpoint.add_argument("--encoder", default="base", help="model.encoder (default: base)")
    checkpoint.add_argument(
        "--folder", type=Path, default=Path("build/checkpoint-benchmark"), help="on the disk to be measured"
    )
    checkpoint.add_argument("--rounds", type=int, default=6, help="(default: 6)")
    checkpoint.add_argument("--steps", type=int, default=8, help="after each save (default: 8)")
    checkpoint.add_argument(
        "--threads", type=int, default=1, help="as Ray gives a worker of cluster.cpus_per_worker (default: 1)"
    )
    restart = subjects.add_parser("restart", help="seconds from a worker's SIGKILL to the next applied step")
    restart.add_argument("--rounds", type=int, default=6, help="kills (default: 6)")
    restart.add_argument("--workers", type=int, default=2, help="of the run (default: 2)")
    restart.add_argument("--zero-stage", type=int, default=1, help="train.zero_stage (default: 1)")
    restart.add_argument("--seed", type=int, default=0, help="draws workers and steps (default: 0)")
    for subject in subjects.choices.values():
        subject.add_argument("--json", type=Path, required=True, help="result file")
    flags = parser.parse_args(argv)
    try:
        subject_of = {"loader": _loader, "order": _order, "checkpoint": _checkpoint, "restart": _restart}
        result = subject_of[flags.subject](flags)
    except ValueError as error:
        exit_with(error, 2)
    write_json(flags.json, {"subject": flags.subject} | environment() | result)
    print(f"written to {flags.json}")


def _order(flags: argparse.Namespace) -> dict[str, Any]:
    from arvideo_dist.bench.order import run

    configuration = {"samples": flags.samples, "seeks": flags.seeks}
    return {"configuration": configuration} | run(**configuration, say=print)


def _checkpoint(flags: argparse.Namespace) -> dict[str, Any]:
    from arvideo_dist.bench.checkpoint import Plan, run

    plan = Plan(flags.encoder, flags.folder, flags.rounds, flags.steps, flags.threads)
    result = run(plan, say=lambda line: print(line, flush=True))
    for kind in ("synchronous", "asynchronous"):
        extra = result[f"{kind}_extra_s"]
        print(f"{kind:<13} {extra['mean']:.2f} s a save (+- {extra['deviation']:.2f})")
    print(f"ratio         {result['asynchronous_to_synchronous']:.2f}")
    # The folder is that machine's own.
    configuration = {name: value for name, value in asdict(plan).items() if name != "folder"}
    return {"configuration": configuration} | result


def _restart(flags: argparse.Namespace) -> dict[str, Any]:
    from arvideo_dist.bench.restart import Plan, run

    plan = Plan(flags.rounds, flags.workers, flags.zero_stage, flags.seed)
    result = run(plan, say=lambda line: print(line, flush=True))
    for stage, seconds in result["seconds"].items():
        print(
            f"{stage:<13} {seconds['mean']:6.1f} (+- {seconds['deviation']:.1f}, at most {seconds['max']:.1f})"
        )
    return {"configuration": asdict(plan)} | result


def _loader(flags: argparse.Namespace) -> dict[str, Any]:
    from arvideo_dist.bench.loader import Plan, run

    plan = Plan(
        flags.data, flags.split, flags.videos, flags.work, flags.clips, flags.rounds, flags.micro_batch
    )
    result = run(plan, flags.gpu_clips_per_second, say=lambda line: print(line, flush=True))
    for name, figures in result["loaders"].items():
        ratio = figures.get("times_cheaper_than_videomae", {"mean": 1.0})
        print(
            f"{name:<9} {figures['cpu_ms']['mean']:7.2f} CPU-ms a clip (+- {figures['cpu_ms']['deviation']:.2f}), "
            f"{ratio['mean']:5.2f} times cheaper than videomae, {figures['cores_per_gpu']:6.1f} cores for "
            f"{flags.gpu_clips_per_second:g} clips/s"
        )
        if "rounds" in ratio:
            print("          each round: " + "  ".join(f"{times:.2f}" for times in ratio["rounds"]))
        if "split_cpu_ms" in figures:
            print(
                "          " + "  ".join(f"{stage} {ms:.2f}" for stage, ms in figures["split_cpu_ms"].items())
            )
    configuration = {key: str(value) for key, value in asdict(plan).items()}
    configuration["gpu_clips_per_second"] = str(flags.gpu_clips_per_second)
    return {"configuration": configuration} | result


if __name__ == "__main__":
    main()
