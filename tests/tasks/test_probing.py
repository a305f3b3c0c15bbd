"""Probes: heads of a grid are what each would be alone, and one is what scikit-learn finds at the same optimum."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression

from arvideo_dist.probe import main
from arvideo_dist.tasks.feature_files import FeatureRows, write_parquet
from arvideo_dist.tasks.probing import Labelled, grid, top1, train_probes

WIDTH, CLASSES, CPU = 16, 5, torch.device("cpu")
ABOUT: dict[str, Any] = {
    "source": "encoder",
    "model": {},
    "pooling": "mean",
    "shape": [WIDTH],
    "views": "1x1",
}


def clouds(seed: int, videos: int, spread: float = 1.5) -> Labelled:
    """Classes around points of a sphere, which overlap; features of other means and deviations."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, videos)
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
    values = centres[labels] + spread * rng.normal(size=(videos, WIDTH))
    values = values * np.linspace(0.1, 10, WIDTH) + np.linspace(-5, 5, WIDTH)
    return Labelled(torch.from_numpy(values.astype(np.float32)), torch.from_numpy(labels))


def test_heads_that_are_trained_together_are_what_each_is_alone() -> None:
    train, settings = clouds(1, 300), grid([1e-3, 1e-2, 0.1], [0.0, 10.0])
    given: dict[str, Any] = {"epochs": 3, "batch": 64, "seed": 0, "device": CPU}
    together, _ = train_probes(train, settings, **given)
    for head, each in enumerate(settings):
        alone, _ = train_probes(train, [each], **given)
        torch.testing.assert_close(together.weights[head], alone.weights[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together.biases[head], alone.biases[0], rtol=0, atol=1e-5)
    assert len({round(float(weight.detach().norm()), 4) for weight in together.weights}) == len(settings)


def test_a_head_is_scikit_learns_logistic_regression_at_its_optimum() -> None:
    train, held_out = clouds(2, 1000), clouds(3, 2000)
    probes, scaling = train_probes(train, grid([0.1], [0.0]), epochs=400, batch=1000, seed=0, device=CPU)
    expected = LogisticRegression(C=np.inf, max_iter=1000, tol=1e-6)
    expected.fit(scaling(train.values_nd).numpy(), train.labels_n.numpy())
    score = expected.score(scaling(held_out.values_nd).numpy(), held_out.labels_n.numpy())
    (found,) = top1(probes, scaling, held_out)
    assert 0.4 < score < 0.95, "neither chance nor too easy"
    assert found == pytest.approx(score, abs=0.005)


def test_weight_decay_is_of_the_weights_alone() -> None:
    train = clouds(4, 300)
    probes, _ = train_probes(train, grid([0.01], [0.0, 1.0, 30.0]), epochs=20, batch=300, seed=0, device=CPU)
    norms = [float(weight.detach().norm()) for weight in probes.weights]
    assert norms[0] > norms[1] > norms[2]
    assert float(probes.biases[2].detach().norm()) > 0.01


def write(path: Path, videos: Labelled, without_label: int = 0, name: str = "class", **about: Any) -> str:
    """As `embed` does; its address."""
    labels = videos.labels_n.numpy().astype(np.int32)
    labels[:without_label] = -1
    names = [None if label < 0 else f"{name} {label}" for label in labels]
    keys = [f"video{number}" for number in range(len(labels))]
    index: Any = SimpleNamespace(table=pa.table({"key": keys, "label": labels, "label_name": names}))
    rows = FeatureRows(
        np.arange(len(labels)), np.zeros(len(labels), dtype=np.int64), videos.values_nd.numpy()
    )
    write_parquet(path, [rows], index, {**ABOUT, **about})
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    sizes = {"train": 400, "val": 200, "test": 300}
    return {
        name: write(tmp_path / f"{name}.parquet", clouds(n, sizes[name])) for n, name in enumerate(sizes, 5)
    }


def test_the_best_head_on_the_held_out_videos_is_chosen_and_all_are_reported(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ("--learning-rates", "1e-6", "1e-2", "--weight-decays", "0", "0.1")
    more = (*rates, "--epochs", "20", "--out", str(tmp_path / "o"))
    main([files["train"], files["val"], "--test", files["test"], *more])
    result = json.loads((tmp_path / "o" / "probe.json").read_text())
    pairs = [(head["learning_rate"], head["weight_decay"]) for head in result["heads"]]
    assert pairs == [(1e-6, 0), (1e-6, 0.1), (1e-2, 0), (1e-2, 0.1)]
    shares = [head["top1_val"] for head in result["heads"]]
    assert result["best"] == shares.index(max(shares))
    assert shares[2] > shares[0], "a rate near 0 learns less"
    assert result["videos"] == {"train": 400, "val": 200, "test": 300}
    assert result["classes"] == {str(label): f"class {label}" for label in range(CLASSES)}
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith("best")] == [lines[1 + result["best"]]]
    assert lines[5].startswith("the best head has the largest of --learning-rates")
    head, test = load_file(tmp_path / "o" / "probe.safetensors"), clouds(7, 300)
    logits = ((test.values_nd - head["mean"]) / head["deviation"]) @ head["weight"].T + head["bias"]
    share = float((logits.argmax(1) == test.labels_n).double().mean())
    assert result["heads"][result["best"]]["top1_test"] == pytest.approx(share)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_does_not_belong_together_is_refused(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other.parquet", clouds(9, 50), source="another")
    assert "source 'another', not 'encoder'" in refused(capsys, files["train"], other)
    named = write(tmp_path / "named.parquet", clouds(9, 50), name="other name")
    assert "prepare both splits with one --label-map" in refused(capsys, files["train"], named)
    bare = write(tmp_path / "bare.parquet", clouds(9, 50), without_label=50)
    assert "no video has a label" in refused(capsys, files["train"], bare)
    assert "--epochs and --batch are at least 1" in refused(
        capsys, files["train"], files["val"], "--epochs", "0"
    )


def test_videos_without_a_label_have_no_part(files: dict[str, str], tmp_path: Path) -> None:
    some = write(tmp_path / "some.parquet", clouds(9, 50), without_label=20)
    main([files["train"], some, "--epochs", "1", "--out", str(tmp_path / "o")])
    assert json.loads((tmp_path / "o" / "probe.json").read_text())["videos"]["val"] == 30
