"""Any ZeRO stage and world size goes on from any other's checkpoint.

Every layout trains without interruption and saves on the way; then every layout goes on from every other's
checkpoint. Both take one set of workers for each world size: pretraining's are Ray Train's, fine-tuning's are not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arvideo_dist.storage import Storage
from tests.train.distributed import run_ranks
from tests.train.runs import damage, make_data

STOP = 10
LONG = 50  # steps after the checkpoint
LAYOUTS = [(world_size, stage) for world_size in (1, 2, 3) for stage in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def ray_with_three_slots() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
        import ray

        # Without a dashboard Ray Train asks whichever one of this machine has the usual port whether its controller
        # is alive, and removes its workers when that one knows nothing of it.
        ray.init(address="local", num_cpus=3, include_dashboard=True, dashboard_port=0)
        yield ray
        ray.shutdown()


def _fit(folder: Path, world_size: int, resumed: bool) -> dict[str, list[float]]:
    """Losses by name of what workers of this world size did: `target` or `target<-source`."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    api: Any = ray.train
    trainer: Any = TorchTrainer(
        _worker,
        train_loop_config={"folder": str(folder), "resumed": resumed},
        scaling_config=api.ScalingConfig(num_workers=world_size, resources_per_worker={"CPU": 1}),
        torch_config=TorchConfig(backend="gloo", timeout_s=600),
        run_config=api.RunConfig(name=f"{world_size}-{resumed}", storage_path=str(folder / "ray")),
    )
    trainer.fit()
    return json.loads((folder / f"losses-{world_size}-{resumed}.json").read_text())


def _worker(payload: dict[str, Any]) -> None:
    import torch.distributed as dist

    from tests.train.distributed import make_saver
    from tests.train.keyed import new_engine, new_model, resumed_engine, train_steps

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    folder, resumed, world_size = payload["folder"], payload["resumed"], dist.get_world_size()
    end = STOP + LONG
    losses = {}
    for stage in range(4):
        target = _name((world_size, stage))
        if not resumed:
            engine = new_engine(new_model(), stage)
            saver = make_saver(Storage(f"{folder}/{target}"), engine)
            losses[target] = train_steps(engine, 0, end, end, saver, save_after=lambda step: step == STOP)
            saver.finish()
            continue
        for source in LAYOUTS:
            engine, first = resumed_engine(Storage(f"{folder}/{_name(source)}"), stage)
            assert first == STOP
            losses[f"{target}<-{_name(source)}"] = train_steps(engine, first, end, end)
    if dist.get_rank() == 0:
        Path(folder, f"losses-{world_size}-{resumed}.json").write_text(json.dumps(losses))


def _name(layout: tuple[int, int]) -> str:
    return "world{}-stage{}".format(*layout)


@pytest.mark.slow
def test_every_pair_of_stage_and_world_size_goes_on_as_if_nothing_had_been(
    ray_with_three_slots: Any, tmp_path: Path
) -> None:
    """Weight decay on some groups and none on others, warm-up and cosine, a bad sample, uneven places at 3 workers.

    Over 50 steps: bit-equal in the same layout, within 1e-5 in another.
    """
    whole: dict[str, list[float]] = {}
    resumed: dict[str, list[float]] = {}
    for world_size in (1, 2, 3):
        whole |= _fit(tmp_path, world_size, resumed=False)
    for world_size in (1, 2, 3):
        resumed |= _fit(tmp_path, world_size, resumed=True)
    _compare(whole, resumed)


def _compare(whole: dict[str, list[float]], resumed: dict[str, list[float]]) -> None:
    assert len(resumed) == len(LAYOUTS) ** 2
    worst = 0.0
    for target in map(_name, LAYOUTS):
        for source in map(_name, LAYOUTS):
            expected, found = whole[source][STOP:], resumed[f"{target}<-{source}"]
            assert len(found) == LONG
            if target == source:
                assert found == expected, f"{target} from its own checkpoint"
            off = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
            assert off < 1e-5, f"{target} from {source}: {off:.1e}"
            worst = max(worst, off)
    print(f"largest relative difference of a loss over {len(resumed)} pairs: {worst:.1e}")


@pytest.mark.slow
def test_fine_tuning_goes_on_alike_with_the_whole_recipe_on(tmp_path: Path) -> None:
    """Mixup and cutmix, drop path, dropout, RandAugment, erasing, layer decay, two clips of each video, and a video
    that cannot be read, over the end of several epochs; compared as pretraining is."""
    make_data(tmp_path / "data")
    damage(tmp_path / "data", "train", 1)
    whole: dict[str, list[float]] = {}
    resumed: dict[str, list[float]] = {}
    for world_size in (1, 2, 3):
        whole |= run_ranks(world_size, _finetune, str(tmp_path), False)[0]
    for world_size in (1, 2, 3):
        resumed |= run_ranks(world_size, _finetune, str(tmp_path), True)[0]
    _compare(whole, resumed)


def _finetune(folder: str, resume: bool) -> dict[str, list[float]]:
    import torch.distributed as dist

    from tests.train.distributed import make_saver
    from tests.train.keyed import train_steps
    from tests.train.keyed_finetuning import Finetuning

    task, world_size, end = Finetuning(f"{folder}/data"), dist.get_world_size(), STOP + LONG
    of_task: dict[str, Any] = {"batches_of": task.batches_of_rank, "state_of": task.state_at}
    losses = {}
    for stage in range(4):
        target = _name((world_size, stage))
        if not resume:
            engine = task.new_engine(task.new_model(), stage)
            saver = make_saver(Storage(f"{folder}/{target}"), engine)
            losses[target] = train_steps(
                engine, 0, end, end, saver, save_after=lambda step: step == STOP, **of_task
            )
            saver.finish()
            continue
        for source in LAYOUTS:
            engine, first = task.resumed_engine(Storage(f"{folder}/{_name(source)}"), stage)
            assert first == STOP
            losses[f"{target}<-{_name(source)}"] = train_steps(engine, first, end, end, **of_task)
    return losses
