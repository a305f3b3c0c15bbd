"""The paper's recipes in jobs/: valid, and equal to the defaults but for what the data set changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from arvideo_dist.config.commands import PretrainConfig
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
