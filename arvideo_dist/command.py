"""What commands that start a run share: configuration, checks, exit codes, first and last lines on the terminal."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import NoReturn, TypeVar

from arvideo_dist.checks.start import check_driver, check_run
from arvideo_dist.config.commands import PretrainConfig, RunConfig, SequenceConfig, TrainingConfig
from arvideo_dist.config.folder import run_folder
from arvideo_dist.config.settings import exit_with, read_config
from arvideo_dist.launch.driver import Finished, launch
from arvideo_dist.launch.finished import already_finished
from arvideo_dist.launch.nodes import check_own_ray
from arvideo_dist.launch.preemption import Signals
from arvideo_dist.launch.start import (
    check_initial_weights,
    check_resume,
    derive_checked,
    wait_for_checkpoints,
    with_absolute_paths,
)
from arvideo_dist.storage import lasts, shown
from arvideo_dist.tasks.derived import Derived, Viewed, Workload, derive
from arvideo_dist.tasks.kinds import sequence_of, task_of
from arvideo_dist.train.checkpoint.layout import FOLDER, checkpoint_name, newest_step
from arvideo_dist.train.checkpoint.manifest import CheckpointError
from arvideo_dist.train.checkpoint.reader import Checkpoint
from arvideo_dist.train.engine.schedule import plan_of
from arvideo_dist.train.run.lease import LeaseLostError, acquire
from arvideo_dist.train.run.stop import CrashLoopError, RunInterruptedError, RunStoppedError
from arvideo_dist.train.samples.bad_samples import ARTIFACT

Root = TypeVar("Root", bound=RunConfig)


def start_run(
    root: type[Root],
    description: str,
    argv: list[str] | None,
    complete: Callable[[Root, argparse.Namespace], Root] = lambda config, flags: config,
    add_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Run the command of configuration `root` to the end of its run; `argv`: without the program's name.

    `complete`: gives a configuration what follows from what it names and from the flags of `add_flags`. Exits with
    2 for what the user set wrong, 75 if the same command goes on, 1 if the run failed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m arvideo_dist.{root.command}", description=description)
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration and print the derived numbers as JSON"
    )
    add_flags(parser)
    try:
        config, flags = read_config(root, sys.argv[1:] if argv is None else argv, parser)
        config = complete(config, flags)
        if flags.dry_run:
            print(json.dumps(asdict(_dry_run(config))))
            return
        config, finished = _run(config)
    except ValueError as error:
        exit_with(error, 2)
    except RunStoppedError as error:
        exit_with(error, os.EX_TEMPFAIL if error.passing else 1)
    except (CheckpointError, CrashLoopError, LeaseLostError) as error:
        exit_with(error, 1)
    except RunInterruptedError as error:
        exit_with(error, os.EX_TEMPFAIL)
    except OSError as error:
        _exit_with_failed_storage(error)
    _print_end(config, finished)


def _dry_run(config: RunConfig) -> Workload:
    check_initial_weights(config)
    if isinstance(config, TrainingConfig) and config.data.path is None:
        return derive(config, None)
    return derive_checked(config)


def _run(config: Root) -> tuple[Root, Finished]:
    """The run of `config`, completed, from its checks to its end."""
    with Signals() as signals:
        config = with_absolute_paths(config)
        if isinstance(config, TrainingConfig):
            config = task_of(config).settled()
        finished = already_finished(config)
        if finished is None:
            check_own_ray(config)
            check_driver(config)
            seen = wait_for_checkpoints(config)
            check_initial_weights(config)
            derived = derive_checked(config)
            check_run(config, derived)
            with acquire(run_folder(config), config.run.lease_s, newest_step) as lease:
                lease.saw(seen)
                _print_start(config, derived, check_resume(config))
                finished = launch(config, derived, lease, signals)
    return config, finished


def _exit_with_failed_storage(error: OSError) -> NoReturn:
    """A store, or whatever else the run reaches through the network, failed for longer than anybody waits."""
    text = " ".join(shown(error).split())
    if lasts(error):  # to start again by itself would meet the same
        exit_with(
            OSError(f"storage or network failed: {text}; mend that, then the same command continues"), 1
        )
    exit_with(
        OSError(f"storage or network failed: {text}; the same command continues once it is back"),
        os.EX_TEMPFAIL,
    )


def _print_start(config: RunConfig, derived: Workload, checkpoint: Checkpoint | None) -> None:
    """`checkpoint`: that the run goes on from."""
    print(
        f"run {config.run.name}: {config.model.encoder} encoder, {derived.parameters / 1e6:.1f} M parameters, "
        f"{derived.gflops_per_clip:.1f} GFLOP and {derived.activation_mb_per_clip:.0f} MB of fp32 activations "
        "a clip",
    )
    if isinstance(config, TrainingConfig) and isinstance(derived, Derived):
        print("\n".join(_training_lines(config, derived, checkpoint)), flush=True)
    elif isinstance(derived, Viewed):
        print(f"{derived.batch_line()}\n{derived.samples} videos, {derived.total_places} views", flush=True)


def _training_lines(config: TrainingConfig, derived: Derived, checkpoint: Checkpoint | None) -> list[str]:
    plan = plan_of(config, derived, checkpoint.state if checkpoint is not None else None)
    steps, others = plan.steps_left(0), ""
    if checkpoint is not None and plan.total_places != derived.total_places:
        steps = checkpoint.state["step"] + plan.steps_left(checkpoint.state["position"])
        others = (
            f" ({checkpoint.state['step']} of them done, some with another train.global_batch: the run keeps the "
            f"{plan.total_places} clips that it was planned for)"
        )
    clusters = ""
    if derived.clusters is not None:
        clusters = f"{derived.clusters} clusters, {derived.kept_tokens_per_cluster} kept tokens each; "
    queries = f", {derived.decoder_queries} decoder queries" if derived.decoder_queries else ""
    return [
        f"tokens: {clusters}{derived.encoder_tokens} encoder tokens{queries}",
        derived.batch_line(),
        f"schedule: {steps} steps{others} over {derived.samples} samples, warm-up "
        f"{derived.warmup_steps:.0f} steps, learning rate {derived.peak_lr:.3g} to {derived.min_lr:.3g}",
    ]


def _print_end(config: RunConfig, finished: Finished) -> None:
    from arvideo_dist.train.tracking.runs import dashboard_command

    print(f"\nrun         {finished.run_folder}")
    if isinstance(config, TrainingConfig):
        print("\n".join(_trained_lines(config, finished)))
    elif isinstance(config, SequenceConfig):
        print("\n".join(_viewed_lines(config, finished)))
    print(f"mlflow      run {finished.mlflow_run_id}; dashboard: {dashboard_command(config)}")


def _trained_lines(config: TrainingConfig, finished: Finished) -> list[str]:
    metrics, lines = finished.metrics, [f"checkpoint  {finished.checkpoint}"]
    if "best_step" in metrics:
        best = f"{finished.run_folder}/{FOLDER}/{checkpoint_name(int(metrics['best_step']))}"
        lines.append(f"best        {best} ({task_of(config).best_metric} {metrics['best_value']:.4f})")
    if "loss/val" in metrics:
        if isinstance(config, PretrainConfig):
            lines.append(f"picture     {finished.run_folder}/pictures/")
        lines.append(f"validation  {task_of(config).result_lines(metrics)}")
    elif config.data.val_split is not None:
        lines.append(
            f"validation  no loss: no clip of split {config.data.val_split!r} could be used, or the loss is not "
            f"finite; {finished.run_folder}/{ARTIFACT} lists bad samples"
        )
    return lines


def _viewed_lines(config: SequenceConfig, finished: Finished) -> list[str]:
    lines = sequence_of(config).result_lines(finished.metrics, finished.run_folder)
    if bad := finished.metrics.get("bad_samples"):
        lines.append(f"bad views   {bad:.0f}, listed in {finished.run_folder}/{ARTIFACT}")
    return lines
