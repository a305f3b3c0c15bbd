"""Pretrain ARVideo: `python -m arvideo_dist.pretrain [--config FILE.yaml] [--section.field value ...]`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import NoReturn

from arvideo_dist.checks.start import check_driver
from arvideo_dist.config import RunConfig
from arvideo_dist.derived import Derived, derive
from arvideo_dist.settings import exit_with, read_config
from arvideo_dist.storage import lasts, shown
from arvideo_dist.train.launch import (
    Finished,
    check_initial_weights,
    check_resume,
    derive_checked,
    launch,
    run_folder,
    with_absolute_paths,
)
from arvideo_dist.train.lease import LeaseLostError, acquire
from arvideo_dist.train.nodes import check_own_ray
from arvideo_dist.train.preemption import Signals
from arvideo_dist.train.stop import CrashLoopError, RunInterruptedError, RunStoppedError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m arvideo_dist.pretrain", description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration and print the derived numbers as JSON"
    )
    try:
        config, flags = read_config(sys.argv[1:] if argv is None else argv, parser)
        check_initial_weights(config)
        if flags.dry_run:
            derived = derive(config, None) if config.data.path is None else derive_checked(config)
            print(json.dumps(asdict(derived)))
            return
        with Signals() as signals:
            config = with_absolute_paths(config)
            check_own_ray(config)
            check_driver(config)
            derived = derive_checked(config)
            with acquire(run_folder(config), config.run.lease_s) as lease:
                check_resume(config)
                _print_start(config, derived)
                finished = launch(config, derived, lease, signals)
    except ValueError as error:
        exit_with(error, 2)
    except RunStoppedError as error:
        exit_with(error, os.EX_TEMPFAIL if error.passing else 1)
    except (CrashLoopError, LeaseLostError) as error:
        exit_with(error, 1)
    except RunInterruptedError as error:
        exit_with(error, os.EX_TEMPFAIL)
    except OSError as error:
        _exit_with_failed_storage(error)
    _print_end(config, finished)


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


def _print_start(config: RunConfig, derived: Derived) -> None:
    clusters = ""
    if derived.clusters is not None:
        clusters = f"{derived.clusters} clusters, {derived.kept_tokens_per_cluster} kept tokens each; "
    print(
        f"run {config.run.name}: {config.model.encoder} encoder, {derived.parameters / 1e6:.1f} M parameters, "
        f"{derived.gflops_per_clip:.1f} GFLOP and {derived.activation_mb_per_clip:.0f} MB of fp32 activations "
        "a clip\n"
        f"tokens: {clusters}{derived.encoder_tokens} encoder tokens, {derived.decoder_queries} decoder queries\n"
        f"{derived.batch_line()}\n"
        f"schedule: {derived.total_steps} steps over {derived.samples} samples, warm-up "
        f"{derived.warmup_steps:.0f} steps, learning rate {derived.peak_lr:.3g} to {derived.min_lr:.3g}",
        flush=True,
    )


def _print_end(config: RunConfig, finished: Finished) -> None:
    from arvideo_dist.tracking import dashboard_command

    metrics = finished.metrics
    print(f"\nrun         {finished.run_folder}")
    print(f"checkpoint  {finished.checkpoint}")
    if "loss/val" in metrics:
        below = 1 - metrics["loss/val"] / metrics["loss/constant_predictor"]
        print(f"picture     {finished.run_folder}/pictures/")
        print(
            f"validation  loss {metrics['loss/val']:.4f}, best constant predictor "
            f"{metrics['loss/constant_predictor']:.4f} ({abs(below):.1%} {'below' if below >= 0 else 'above'} it)"
        )
        if "loss/val_other_context" in metrics:
            worse = metrics["loss/val_other_context"] / metrics["loss/val"] - 1
            print(
                f"            with another clip's context {metrics['loss/val_other_context']:.4f} ({worse:+.1%})"
            )
    print(f"mlflow      run {finished.mlflow_run_id}; dashboard: {dashboard_command(config)}")


if __name__ == "__main__":
    main()
