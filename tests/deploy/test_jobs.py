"""The paper's recipes in jobs/: valid, and equal to the defaults but for what the data set changes. The demo: its
parts fit together, and what compares them reads what an evaluation writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arvideo_dist.config.commands import FinetuneConfig, PretrainConfig
from arvideo_dist.config.settings import read_config
from arvideo_dist.tasks.derived import derive

JOBS = Path(__file__).resolve().parents[2] / "jobs"


def recipe(name: str) -> PretrainConfig:
    return read_config(PretrainConfig, ["--config", str(JOBS / name)])[0]


def test_k400_recipe_is_the_default_configuration() -> None:
    assert recipe("pretrain-k400.yaml") == PretrainConfig()


def test_ssv2_recipe_differs_from_k400_in_name_and_stride_only() -> None:
    changed = {
        f"{section}.{field}": value
        for section, fields in recipe("pretrain-ssv2.yaml").model_dump().items()
        for field, value in fields.items()
        if value != getattr(getattr(PretrainConfig(), section), field)
    }
    assert changed == {"run.name": "arvideo-vit-b-ssv2", "data.stride": 2}


@pytest.mark.parametrize("name", ["pretrain-k400.yaml", "pretrain-ssv2.yaml"])
def test_recipes_leave_places_to_the_environment(name: str) -> None:
    """The environment would win over the file anyway: a place in it could only mislead."""
    given = recipe(name)
    assert given.data.path is None
    assert given.run.storage_path == PretrainConfig().run.storage_path
    assert given.tracking.uri is None
    assert given.cluster == PretrainConfig().cluster


@pytest.mark.parametrize("name", ["pretrain-k400.yaml", "pretrain-ssv2.yaml"])
def test_recipes_derive_the_papers_numbers(name: str) -> None:
    """Table 5's encoder tokens, section 3.3's queries, VideoMAE's learning rates; 8 GPUs need no padding."""
    derived = derive(recipe(name), samples=None)
    assert (derived.clusters, derived.encoder_tokens, derived.decoder_queries) == (16, 300, 1470)
    assert (derived.peak_lr, derived.min_lr) == pytest.approx((1.2e-3, 8e-5))
    assert (derived.world_size, derived.accumulation_steps, derived.padding_per_step) == (8, 8, 0)


def demo_commands() -> list[list[str]]:
    """Words of the commands of `make demo`, from the module or script on; without the set-up."""
    said = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=JOBS.parent, capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in said.stdout.splitlines() if line.startswith(".venv/bin/python ")]
    return [words[2:] if words[1] == "-m" else words[1:] for words in lines]


def named(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_demos_classifier_has_the_geometry_of_the_encoder_that_the_demo_pretrains() -> None:
    """From a run the run's geometry is taken, from random weights the file's own: the two ways must be alike."""
    pretrained = recipe("demo.yaml")
    given = read_config(FinetuneConfig, ["--config", str(JOBS / "demo-finetune.yaml")])[0]
    for field in ("encoder", "frames", "image_size", "tubelet"):
        assert getattr(given.model, field) == getattr(pretrained.model, field), field
    assert given.model.init_from is None
    assert given.data.path == pretrained.data.path
    assert given.data.val_split == pretrained.data.val_split


def test_the_demo_compares_two_trainings_that_differ_in_their_start_weights_alone() -> None:
    commands = demo_commands()
    trained = [words for words in commands if words[0] == "arvideo_dist.finetune"]
    names = [named(words, "--run.name") for words in trained]
    weights = [named(words, "--init-from") for words in trained]
    assert weights == [f"runs/{recipe('demo.yaml').run.name}", "none"]
    assert len(set(names)) == 2
    alike = [[word for word in words if word not in (*names, *weights)] for words in trained]
    assert alike[0] == alike[1]
    evaluated = [words for words in commands if words[0] == "arvideo_dist.evaluate"]
    assert [words[1] for words in evaluated] == [f"runs/{name}" for name in names]
    assert evaluated[0][2:] == evaluated[1][2:]
    assert commands[-1] == ["jobs/compare.py", *(f"runs/{name}" for name in names)]


def test_the_demo_makes_the_splits_that_its_files_read_and_no_two_alike() -> None:
    made = [words for words in demo_commands() if words[0] == "data_prep"]
    seeds = {named(words, "--split"): named(words, "--seed") for words in made}
    assert len(set(seeds.values())) == len(made)
    for root, name in ((PretrainConfig, "demo.yaml"), (FinetuneConfig, "demo-finetune.yaml")):
        data = read_config(root, ["--config", str(JOBS / name)])[0].data
        assert {data.split, data.val_split} <= set(seeds)
        assert {named(words, "--out") for words in made} == {data.path}


def evaluated(run: Path, name: str, **result: float) -> Path:
    """A run's folder with an evaluation of four classes as `arvideo_dist.evaluate` leaves it."""
    folder = run / "evaluations" / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "classes.txt").write_text("accuracy  videos  class  taken for\n" + "  25.00%  25  a  b\n" * 4)
    return run


def compare(*runs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(JOBS / "compare.py"), *map(str, runs)]
    return subprocess.run(command, capture_output=True, text=True)


def test_compare_shows_each_evaluation_with_its_standard_error_and_chance(tmp_path: Path) -> None:
    shares = {"accuracy/top1": 0.5, "accuracy/mean_class": 0.475}
    one = evaluated(tmp_path / "one", "step-1-val-1x1", videos=100.0, **shares)
    evaluated(one, "step-1-val-5x3", videos=400.0, **shares)
    other = evaluated(
        tmp_path / "other", "step-2-val-1x1", videos=100.0, **{"accuracy/top1": 0.2, "accuracy/top5": 0.9}
    )
    done = compare(one, other)
    assert done.returncode == 0, done.stderr
    header, *rows = [line.split() for line in done.stdout.splitlines()]
    assert " ".join(header) == "run evaluation top-1 top-5 mean class standard error videos chance"
    assert rows == [
        ["one", "step-1-val-1x1", "50.0%", "-", "47.5%", "5.0%", "100", "25.0%"],
        ["one", "step-1-val-5x3", "50.0%", "-", "47.5%", "2.5%", "400", "25.0%"],
        ["other", "step-2-val-1x1", "20.0%", "90.0%", "-", "4.0%", "100", "25.0%"],
    ]


def test_compare_says_what_a_run_without_accuracies_lacks(tmp_path: Path) -> None:
    whole = evaluated(tmp_path / "whole", "step-1-val-1x1", videos=9.0, **{"accuracy/top1": 1.0})
    unread = evaluated(tmp_path / "unread", "step-1-val-1x1", videos=0.0)  # no view could be read
    broken = evaluated(tmp_path / "broken", "step-1-val-1x1")
    (broken / "evaluations" / "step-1-val-1x1" / "result.json").write_text("{")
    for run, said in (
        (tmp_path / "missing", "is no folder"),
        (unread, f"python -m arvideo_dist.evaluate {unread}"),
        (broken, "is no JSON"),
    ):
        done = compare(whole, run)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert str(run) in done.stderr
        assert "Traceback" not in done.stderr
