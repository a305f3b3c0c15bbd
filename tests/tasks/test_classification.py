"""Fine-tuning as a task: what is drawn for a clip, how it is trained, and every value of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from arvideo_dist.config.commands import FinetuneConfig
from arvideo_dist.data.index import SampleRow, open_index
from arvideo_dist.data.loader import Batch
from arvideo_dist.data.order import PAD, places_of_rank
from arvideo_dist.model.classifier import Classifier, layer_of
from arvideo_dist.model.vit import ENCODER_SIZES
from arvideo_dist.tasks.classification import Classification
from arvideo_dist.tasks.kinds import task_of
from tests.data.conftest import FRAMES, write_dataset

CLASSES = 5
SMALL: dict[str, Any] = {
    "model": {"encoder": "demo", "frames": 4, "image_size": 32, "tubelet": [2, 16, 16], "classes": CLASSES},
    "train": {"global_batch": 8, "micro_batch": 4},
}


def config(**sections: dict[str, Any]) -> FinetuneConfig:
    merged = {name: {**SMALL.get(name, {}), **sections.get(name, {})} for name in {*SMALL, *sections}}
    return FinetuneConfig.model_validate(merged)


def row(label: int) -> SampleRow:
    return SampleRow("key", "shard", 0, 0, "", 64, 64, 25.0, 20, 0.8, label, None, "source")


def batch(task: Classification, places: list[int], labels: list[int], seed: int = 0) -> Batch:
    """What the loader makes of these places: clips that depend on the place alone."""
    draw, model = task.draw(), task.config.model
    drawn = [draw(seed, max(place, 0), row(label)) for place, label in zip(places, labels, strict=True)]
    inputs = {name: torch.from_numpy(np.stack([each[name] for each in drawn])) for name in drawn[0]}
    shape = (3, model.frames, model.image_size, model.image_size)
    clips = np.stack(
        [np.random.default_rng(max(p, 0)).integers(0, 256, shape, dtype=np.uint8) for p in places]
    )
    weights = torch.tensor([0.0 if place == PAD else 1.0 for place in places])
    found = Batch(torch.from_numpy(clips), inputs, weights, torch.tensor(places), [])
    return found.to(torch.device("cpu"))


def built(task: Classification) -> Classifier:
    torch.manual_seed(0)
    module = task.build()
    with torch.no_grad():
        module.head.weight.mul_(1000)  # so that logits differ
    return module.train()


def test_losses_of_places_do_not_depend_on_the_world_size() -> None:
    task = task_of(config(data={"repeats": 2}))
    module, labels = built(task), {place: place // 2 % CLASSES for place in range(8)}
    found: dict[int, dict[int, torch.Tensor]] = {}
    for world in (1, 2, 3):
        found[world] = {}
        for rank in range(world):
            for places in places_of_rank(0, 8, 4, rank, world, task.batch_unit):
                losses = task.loss(module, batch(task, places, [labels.get(p, 0) for p in places]))
                found[world] |= {p: loss for p, loss in zip(places, losses, strict=True) if p != PAD}
    assert found[1].keys() == set(range(8))
    for world in (2, 3):
        assert found[world].keys() == set(range(8))
        for place, loss in found[world].items():
            torch.testing.assert_close(loss, found[1][place], rtol=1e-6, atol=1e-6)


def test_a_pair_shares_its_share_and_box_and_nothing_else() -> None:
    task = task_of(config(data={"repeats": 2}, augment={"mixup": 0.8, "cutmix": 1.0}))
    draw = task.draw()
    for place in (0, 1, 4, 5):
        one, other = draw(0, place, row(0)), draw(0, place + 2, row(0))
        for name in ("share", "box"):
            assert np.array_equal(one[name], other[name]), name
        assert not np.array_equal(one["noise_key"], other["noise_key"])


def test_the_plain_loss_is_cross_entropy_and_smoothing_spreads_a_share_over_all_classes() -> None:
    off = {"rand_augment_operations": 0, "flip": 0, "erase": 0, "mixup": 0, "cutmix": 0}
    plain = task_of(config(augment={**off, "label_smoothing": 0}, model={"drop_path": 0}))
    module, labels = built(plain), [0, 3, 1, 4]
    given = batch(plain, [0, 1, 2, 3], labels)
    logits = module(given.clips)
    expected = nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="none")
    torch.testing.assert_close(plain.loss(module, given), expected)
    smooth = task_of(config(augment={**off, "label_smoothing": 0.2}, model={"drop_path": 0}))
    expected = nn.functional.cross_entropy(
        logits, torch.tensor(labels), reduction="none", label_smoothing=0.2
    )
    torch.testing.assert_close(smooth.loss(module, given), expected)


def test_every_parameter_is_in_one_group_of_its_layers_rate_and_matrices_alone_decay() -> None:
    task = task_of(config(optim={"layer_decay": 0.5, "weight_decay": 0.1}))
    module, depth = task.build(), ENCODER_SIZES["demo"].depth
    groups = task.parameter_groups(module)
    found = {id(p): group for group in groups for p in group.parameters}
    assert sum(len(group.parameters) for group in groups) == len(found) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        group = found[id(parameter)]
        assert group.weight_decay == (0.1 if parameter.ndim > 1 else 0.0), name
        assert group.lr_scale == 0.5 ** (depth + 1 - layer_of(name, depth)), name
    assert found[id(module.head.weight)].lr_scale == 1.0
    assert found[id(module.encoder.patch_embed.proj.weight)].lr_scale == 0.5 ** (depth + 1)


def test_metrics_of_a_validation_are_those_of_its_usable_clips() -> None:
    task = task_of(config())
    module = built(task).eval()
    given = batch(task, [0, 1, PAD, 2], [0, 3, 0, 1])
    measured = task.measure(module, given, picture=True)
    logits, labels = module(given.clips)[[0, 1, 3]].double(), torch.tensor([0, 3, 1])
    metrics = task.metrics(measured.sums)
    assert metrics["loss/val"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert metrics["accuracy/top1"] == float((logits.argmax(1) == labels).double().mean())
    assert metrics["accuracy/top5"] == 1.0  # of five classes
    nothing = task.measure(module, batch(task, [PAD, PAD], [0, 0]), picture=False)
    assert task.metrics(nothing.sums) == {}


def test_the_defaults_are_videomaes_recipe_for_kinetics() -> None:
    """Of recipes: "Fine-tuning recipe", K400-B after 800 epochs."""
    found = FinetuneConfig()
    assert (found.optim.betas, found.optim.weight_decay, found.optim.layer_decay) == (
        (0.9, 0.999),
        0.05,
        0.75,
    )
    assert (found.optim.base_lr, found.optim.base_min_lr, found.optim.warmup_epochs) == (1e-3, 1e-6, 5)
    assert (found.train.global_batch, found.data.repeats, found.train.epochs) == (512, 1, 100)
    assert (found.model.drop_path, found.model.head_init_scale, found.model.head_dropout) == (0.1, 0.001, 0)
    augment = found.augment
    assert (augment.mixup, augment.cutmix, augment.mix_prob, augment.mix_switch_prob) == (0.8, 1.0, 1.0, 0.5)
    assert (augment.rand_augment_level, augment.rand_augment_operations) == (7, 4)
    assert (augment.rand_augment_level_std, augment.rand_augment_prob) == (0.5, 0.5)
    assert (augment.crop_scale, augment.crop_ratio) == ((0.08, 1.0), (0.75, 1.3333))
    assert (augment.erase, augment.label_smoothing, augment.flip) == (0.25, 0.1, 0.5)
    assert (found.data.sampling, found.data.stride) == ("window", 4)


def test_batches_that_would_part_pairs_are_refused_with_a_size_that_does_not() -> None:
    with pytest.raises(ValueError, match=r"train\.micro_batch 6 is no multiple of 4.*set it to 4"):
        config(data={"repeats": 2}, train={"global_batch": 8, "micro_batch": 6})
    unmixed = {"mixup": 0, "cutmix": 0}
    assert config(data={"repeats": 2}, train={"micro_batch": 3}, augment=unmixed).batch_unit == 1


def test_samples_without_a_label_of_the_classes_stop_the_run_and_one_is_named(tmp_path: Path) -> None:
    storage = write_dataset(tmp_path / "data", [b"x"] * 3, FRAMES[:3])
    index = open_index(storage, "train", tmp_path / "cache")
    assert set(index.table["label"].to_pylist()) == {-1}
    with pytest.raises(
        ValueError, match=r"3 of 3 samples have no label from 0 to 4; the first one is .* with -1"
    ):
        task_of(config()).check([index])
