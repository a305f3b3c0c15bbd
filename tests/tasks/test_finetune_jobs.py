"""Every file of jobs/paper/finetune/ and jobs/finetune-*.yaml: valid, VideoMAE's recipe, fit for its encoder."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from arvideo_dist.config.commands import FinetuneConfig, PretrainConfig
from arvideo_dist.config.settings import read_config
from arvideo_dist.model.kinds import build_model
from arvideo_dist.tasks.classification import build_classifier
from arvideo_dist.tasks.derived import derive

JOBS = Path(__file__).resolve().parents[2] / "jobs"
PAPER = JOBS / "paper"
FINETUNE = PAPER / "finetune"


class Recipe(NamedTuple):
    """As VideoMAE's scripts have it: batches and learning rates go by videos, not by clips."""

    videos: int  # of the training split: VideoMAE V2's lists, the paper's numbers to the digit
    classes: int
    batch: int  # videos of a step
    repeats: int
    base_lr: float  # per 256 videos of a step
    epochs: int
    sampling: str = "window"
    flip: float = 0.5
    min_lr: float = 1e-6  # per 256 videos of a step
    layer_decay: float = 0.75
    drop_path: float = 0.1
    head_dropout: float = 0.0


K400, SSV2, HMDB51 = (240_436, 400), (168_913, 174), (3_570, 51)
K400_800 = Recipe(*K400, batch=512, repeats=1, base_lr=1e-3, epochs=100)
K400_1600 = Recipe(*K400, batch=384, repeats=2, base_lr=5e-4, epochs=75)
SSV2_800 = Recipe(*SSV2, batch=512, repeats=1, base_lr=5e-4, epochs=50, sampling="segments", flip=0)
SSV2_2400 = Recipe(*SSV2, batch=384, repeats=2, base_lr=5e-4, epochs=30, sampling="segments", flip=0)
# Chosen: VideoMAE's script for UCF101.
OF_UCF101 = Recipe(
    *HMDB51,
    batch=128,
    repeats=2,
    base_lr=5e-4,
    epochs=100,
    min_lr=1e-5,
    layer_decay=0.7,
    drop_path=0.2,
    head_dropout=0.5,
)
# Recipe, and the pretraining file that the encoder is from.
ROWS = {
    "arvideo-k400-800": (K400_800, "arvideo-k400-800"),
    "arvideo-k400-1600": (K400_1600, "arvideo-k400-1600"),
    "arvideo-ssv2-800": (SSV2_800, "arvideo-ssv2-800"),
    "arvideo-ssv2-2400": (SSV2_2400, "arvideo-ssv2-2400"),
    "videomae-k400-800": (K400_800, "videomae-k400-800"),
    "videomae-k400-1600": (K400_1600, "videomae-k400-1600"),
    "videomae-ssv2-800": (SSV2_800, "videomae-ssv2-800"),
    "videomae-ssv2-2400": (SSV2_2400, "videomae-ssv2-2400"),
    "tokengpt-k400-800": (K400_800, "tokengpt-k400-800"),
    "tokengpt-ssv2-800": (SSV2_800, "tokengpt-ssv2-800"),
    "igpt-k400-800": (K400_800, "igpt-k400-800"),
    "igpt-ssv2-800": (SSV2_800, "igpt-ssv2-800"),
    "randsac-k400-800": (K400_800, "randsac-k400-800"),
    "randsac-ssv2-800": (SSV2_800, "randsac-ssv2-800"),
    "arvideo-hmdb51": (OF_UCF101, "arvideo-k400-1600"),
    "videomae-hmdb51": (OF_UCF101, "videomae-k400-1600"),
}
USERS = {"finetune-k400": K400_800, "finetune-ssv2": SSV2_800, "finetune-hmdb51": OF_UCF101}
FILES = {
    **{FINETUNE / f"{name}.yaml": recipe for name, (recipe, _) in ROWS.items()},
    **{JOBS / f"{name}.yaml": recipe for name, recipe in USERS.items()},
}
GEOMETRY = ("encoder", "frames", "image_size", "tubelet")

each_file = pytest.mark.parametrize("file", sorted(FILES), ids=lambda file: f"{file.parent.name}-{file.stem}")


@pytest.fixture(autouse=True)
def _no_outer_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARVIDEO_CONFIG", raising=False)


def read(file: Path) -> FinetuneConfig:
    return read_config(FinetuneConfig, ["--config", str(file)])[0]


def test_the_tables_name_every_file() -> None:
    names = {file.stem for file in FINETUNE.glob("*.yaml")}
    assert names == set(ROWS)
    linked = set(re.findall(r"\]\(finetune/([\w-]+)\.yaml\)", (PAPER / "README.md").read_text()))
    assert linked == names
    assert {file.stem for file in JOBS.glob("finetune-*.yaml")} == set(USERS)


@each_file
def test_what_no_recipe_changes_is_videomaes(file: Path) -> None:
    given, augment = read(file), read(file).augment
    assert (given.optim.betas, given.optim.weight_decay, given.optim.eps) == ((0.9, 0.999), 0.05, 1e-8)
    assert (given.optim.warmup_epochs, given.optim.clip_grad_norm) == (5, None)
    assert (augment.rand_augment_level, augment.rand_augment_operations) == (7, 4)
    assert (augment.rand_augment_level_std, augment.rand_augment_prob) == (0.5, 0.5)
    assert (augment.mixup, augment.cutmix, augment.mix_prob, augment.mix_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (augment.erase, augment.label_smoothing) == (0.25, 0.1)
    assert given.model.head_init_scale == 0.001
    assert given.data.repeat_windows is False


@each_file
def test_what_the_recipes_differ_in_is_the_rows(file: Path) -> None:
    given, recipe = read(file), FILES[file]
    assert given.model.classes == recipe.classes
    assert (given.model.drop_path, given.model.head_dropout) == (recipe.drop_path, recipe.head_dropout)
    assert (given.data.sampling, given.data.repeats) == (recipe.sampling, recipe.repeats)
    assert given.augment.flip == recipe.flip
    assert (given.optim.layer_decay, given.train.epochs) == (recipe.layer_decay, recipe.epochs)
    if recipe.sampling == "window":  # 64 source frames, as in pretraining on Kinetics-400
        assert given.model.frames * given.data.stride == 64


@each_file
def test_rates_steps_and_passes_over_the_videos_are_videomaes(file: Path) -> None:
    """VideoMAE leaves out the videos that fill no batch at an epoch's end; here the next epoch fills it."""
    given, recipe = read(file), FILES[file]
    derived = derive(given, recipe.repeats * recipe.videos)
    assert derived.global_batch == recipe.batch * recipe.repeats
    assert derived.peak_lr == pytest.approx(recipe.base_lr * recipe.batch / 256)
    assert derived.min_lr == pytest.approx(recipe.min_lr * recipe.batch / 256)
    assert derived.total_steps is not None
    assert derived.total_places is not None
    theirs = recipe.epochs * (recipe.videos // recipe.batch)
    assert theirs <= derived.total_steps < theirs + recipe.epochs
    assert derived.warmup_steps == pytest.approx(5 * recipe.videos / recipe.batch)
    passes = derived.total_places / (recipe.repeats * recipe.videos)
    assert passes == pytest.approx(recipe.epochs, rel=1e-3)
    assert (derived.world_size, derived.padding_per_step) == (8, 0)
    assert derived.encoder_tokens == 1568


@each_file
def test_files_leave_weights_and_places_to_the_command_line(file: Path) -> None:
    given = read(file)
    assert given.model.init_from is None
    assert given.data.path is None
    assert given.tracking == FinetuneConfig().tracking
    assert given.cluster == FinetuneConfig().cluster
    assert given.run == FinetuneConfig().run.model_copy(update={"name": given.run.name})


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_has_the_geometry_of_the_encoder_that_it_starts_from(name: str) -> None:
    given = read(FINETUNE / f"{name}.yaml")
    pretrained = read_config(PretrainConfig, ["--config", str(PAPER / f"{ROWS[name][1]}.yaml")])[0]
    for field in GEOMETRY:
        assert getattr(given.model, field) == getattr(pretrained.model, field), field
    assert given.model.model_fields_set >= set(GEOMETRY), "what a file of weights does not say, the row does"
    assert given.run.name == f"{name}-finetune"


@pytest.mark.parametrize("method", ["arvideo", "videomae", "tokengpt", "igpt", "randsac"])
def test_the_pretrained_encoder_fits_into_the_classifier_but_for_its_final_norm(method: str) -> None:
    given = read(FINETUNE / f"{method}-k400-800.yaml")
    pretrained = shapes_of_pretrained(method)
    with torch.device("meta"):
        classifier = build_classifier(given.model, 400)
    fresh = {name: value.shape for name, value in classifier.encoder.state_dict().items()}
    assert pretrained.items() - fresh.items() == {(f"norm.{kind}", (768,)) for kind in ("weight", "bias")}
    assert fresh.items() <= pretrained.items()


@cache
def shapes_of_pretrained(method: str) -> dict[str, torch.Size]:
    config = read_config(PretrainConfig, ["--config", str(PAPER / f"{method}-k400-800.yaml")])[0]
    with torch.device("meta"):
        model = build_model(config.model, config.decoder)
    return {name: value.shape for name, value in model.get_submodule("encoder").state_dict().items()}


@pytest.mark.parametrize("name", sorted(USERS))
def test_a_users_file_leaves_the_geometry_to_the_encoder_that_is_given(name: str) -> None:
    assert not read(JOBS / f"{name}.yaml").model.model_fields_set & set(GEOMETRY)


def test_the_file_for_kinetics_is_the_default_but_for_its_classes_and_validation() -> None:
    given, default = read(JOBS / "finetune-k400.yaml"), FinetuneConfig()
    model = given.model.model_copy(update={"classes": None})
    assert given.model_copy(update={"model": model, "validation": default.validation}) == default
