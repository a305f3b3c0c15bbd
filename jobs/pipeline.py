"""From raw videos to a table of accuracies: `python -m jobs.pipeline FILE [--address RAY]`.

FILE names the stages, which run one after the other, each a command as a person would type it:

    folder: runs/mine-pipeline          # where the pipeline keeps what it knows, and the table
    stages:
      train: data_prep folder --videos VIDEOS/train --out DATA --split train --labels-from-folders
      val: data_prep folder --videos VIDEOS/val --out DATA --split val --labels-from-folders
      pretrain: pretrain --data.path {train} --run.name mine
      finetune: finetune --data.path {train} --run.name mine-finetune --init-from {pretrain}
      accuracy: evaluate {finetune} --views 5x3

`{stage}` stands for what an earlier stage made: the folder of its data set or run; `$NAME` is from the environment.
A stage whose command, settings and inputs have not changed since it ended, and whose output is still there, is
skipped. (Raw videos are not looked at: give `data_prep` another --out, or delete its folder, when they change.) One
that ends with 75, such as when a store is away, is started again, and so is all of it by the same command: each
stage goes on where it was. With `--address` the stages are jobs of that Ray cluster, which must reach the same
folders.

Exits with 0 if all stages have ended, 2 for a faulty file, 75 if it was asked to leave, else with the code of the
stage that failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.runners import LocalRunner, RayRunner, Runner
from jobs.stages import Ledger, Pipeline, Stage, read_pipeline
from jobs.summary import summarise

_AGAIN = 75  # EX_TEMPFAIL: the same command goes on


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.pipeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--address", help="Ray cluster to submit to, such as http://127.0.0.1:8265")
    given = parser.parse_args(argv)
    try:
        pipeline = read_pipeline(given.file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    with LocalRunner() if given.address is None else RayRunner(given.address) as runner:
        sys.exit(run(pipeline, runner))


def run(pipeline: Pipeline, runner: Runner) -> int:
    """The stages in order; the exit code."""
    ledger = Ledger(pipeline.folder)
    for stage in pipeline.stages:
        try:
            stage = stage.resolved(ledger.made)
            stage.check()
            if ledger.is_complete(stage):
                print(f"== {stage.name}: nothing has changed, {ledger.made[stage.name].output}", flush=True)
                continue
            print(f"== {stage.name}: {stage}", flush=True)
            if code := _run_to_its_end(stage, runner, ledger):
                print(f"error: stage {stage.name} ended with exit code {code}", file=sys.stderr)
                return code
            ledger.ended(stage)
        except ValueError as error:
            print(f"error: stage {stage.name}: {error}", file=sys.stderr)
            return 2
    print(summarise(pipeline, ledger), flush=True)
    return 0


def _run_to_its_end(stage: Stage, runner: Runner, ledger: Ledger) -> int:
    """The stage's exit code; 75 if the pipeline was asked to leave."""
    while True:
        code = runner.run(stage, ledger)
        if code != _AGAIN or runner.leaving:
            return code
        print(f"== {stage.name}: ended early, started again", flush=True)
        if runner.pause():
            return _AGAIN


if __name__ == "__main__":
    main()
