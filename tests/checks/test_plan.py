"""Plans that work and are seldom meant are said with the setting to change."""

from __future__ import annotations

from typing import Any

import pytest

from arvideo_dist.checks.plan import check_pace, check_plan
from arvideo_dist.config.commands import PretrainConfig
from arvideo_dist.tasks.derived import derive


def _config(**sections: Any) -> PretrainConfig:
    return PretrainConfig.model_validate({"optim": {"warmup_epochs": 0}, **sections})


def test_a_global_batch_above_the_number_of_samples_is_said() -> None:
    config = _config(train={"steps": 10})
    (found,) = check_plan(derive(config, 240))
    assert found.message.startswith("train.global_batch 2048 is more than the 240 clips of an epoch")
    assert "sees each video 8.5 times; lower train.global_batch to at most 240" in found.message
    assert check_plan(derive(config, 2048)) == []


def test_a_warm_up_longer_than_the_run_is_refused_with_what_would_do() -> None:
    config = _config(optim={"warmup_epochs": 40}, train={"steps": 10, "global_batch": 64})
    with pytest.raises(
        ValueError, match=r"optim\.warmup_epochs 40 is 625 steps, the whole run is 10: set .* below"
    ):
        derive(config, 1000)


def test_a_first_line_hours_away_is_said_by_a_bound_that_no_device_beats() -> None:
    config = _config(cluster={"workers": 2, "device": "cpu"})
    (found,) = check_pace(config, derive(config, None), cuda=False)
    hours = 10 * 2048 / 2 * 279 / 100 / 3600
    assert (
        f"comes after {hours:.1f} hours or later: train.log_every_steps 10 x train.global_batch 2048"
        in found.message
    )
    assert "lower train.log_every_steps" in found.message
    assert check_pace(config, derive(config, None), cuda=True) == []
    few = _config(cluster={"workers": 2, "device": "cpu"}, train={"log_every_steps": 1, "global_batch": 64})
    assert check_pace(few, derive(few, None), cuda=False) == []
