"""Whether two checkouts train alike, bit for bit: `python -m benchmarks.same_losses --before DIR [--json PATH]`.

Both run the same pretraining, steps of the demo's configuration and of the paper's clip geometry, each in the
processes that a user would start. Compared are all points of MLflow that the data and the weights decide. Both
checkouts must have what the configuration needs; the packages are those of the python that runs this.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from arvideo_dist.hardware import environment, write_json

HERE = Path(__file__).resolve().parents[1]
STEPS = 20
COMPARED = ("loss/train", "gradient_norm", "learning_rate", "epoch", "loss/val", "loss/constant_predictor")
DATA = {
    "demo": ["--width", "64", "--height", "64", "--frames", "32"],
    "paper": ["--width", "320", "--height", "256", "--frames", "80"],
}
RUNS = {
    "demo": ["--config", str(HERE / "jobs/demo.yaml"), "--validation.every_steps", "10"],
    # Table 6's clusters of a 16 x 224 x 224 clip with a narrow encoder, so that two cores take minutes.
    "paper": [
        *("--model.encoder", "tiny", "--decoder.width", "192", "--decoder.depth", "2"),
        *("--train.global_batch", "4", "--train.micro_batch", "1", "--optim.warmup_epochs", "1"),
        *("--cluster.workers", "2", "--cluster.device", "cpu", "--data.workers", "1"),
        *("--validation.every_steps", "10", "--validation.max_clips", "4"),
    ],
}


def python(checkout: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{checkout}: {' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def points(checkout: Path, case: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a run of `case` logs, by metric."""
    uri = f"sqlite:///{folder}/mlflow.db"
    data = folder.parent / f"data-{case}"
    python(
        checkout,
        *("arvideo_dist.pretrain", *RUNS[case], "--data.path", str(data), "--run.name", case),
        *("--run.storage_path", str(folder), "--tracking.uri", uri),
        *("--train.steps", str(STEPS), "--train.log_every_steps", "1"),
    )
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("arvideo")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
        for name in COMPARED
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result to this file")
    given = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as top:
        for case, size in DATA.items():
            for split, number in (
                (("train", "96"), ("val", "16")) if case == "demo" else (("train", "8"), ("val", "4"))
            ):
                out = ["--out", f"{top}/data-{case}", "--split", split, "--num-videos", number]
                python(HERE, "data_prep", "synthetic", *out, *size)
            found = {}
            for name, checkout in (("before", given.before.resolve()), ("after", HERE)):
                folder = Path(top) / f"{case}-{name}"
                folder.mkdir()
                found[name] = points(checkout, case, folder)
            same = {metric: found["before"][metric] == found["after"][metric] for metric in COMPARED}
            last = {name: losses["loss/train"][-1][1] for name, losses in found.items()}
            steps = len(found["after"]["loss/train"])
            figures[case] = {"steps": steps, "bit_equal": same, "last_loss": last}
            print(json.dumps({case: figures[case]}, indent=1), flush=True)
    result = {
        "subject": "same losses",
        **environment(),
        "configuration": {**RUNS, "demo": ["--config", "jobs/demo.yaml", *RUNS["demo"][2:]]},
        "figures": figures,
    }
    if given.json is not None:
        write_json(given.json, result)
    if not all(all(case["bit_equal"].values()) for case in figures.values()):
        sys.exit("they differ")


if __name__ == "__main__":
    main()
