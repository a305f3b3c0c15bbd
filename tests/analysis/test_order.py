"""The drawn order is the one that a run of the configuration trains with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from arvideo_dist.analysis.order import draw_orders, pages, strip
from arvideo_dist.analyze import main
from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.data.order import Stream, sample_generator
from arvideo_dist.model.arvideo import make_clusters
from arvideo_dist.tasks.picture import Page

PAPER, DECODER = ModelConfig(), DecoderConfig()


def first_of(drawn: np.ndarray, cluster: tuple[int, int, int]) -> np.ndarray:
    """One number for each cluster of the grid [T, H, W]; all its predicted tokens must share it."""
    k_t, k_h, k_w = cluster
    t, h, w = drawn.shape
    grouped = drawn.reshape(t // k_t, k_t, h // k_h, k_h, w // k_w, k_w).transpose(0, 2, 4, 1, 3, 5)
    grouped = grouped.reshape(t // k_t, h // k_h, w // k_w, -1)
    numbers = grouped.max(axis=-1)
    assert ((grouped == numbers[..., None]) | (numbers[..., None] == 0)).all()
    return numbers


def test_fixed_orders_are_the_papers() -> None:
    """Section 3.3.2: spatial-first ends a time before the next one, temporal-first a place."""
    drawn = draw_orders(PAPER, DECODER, seed=0)
    assert list(drawn) == ["random", "spatial_first", "temporal_first"]
    spatial = first_of(drawn["spatial_first"].predicted_thw, PAPER.cluster)
    assert np.array_equal(spatial.reshape(4, 4), np.arange(16).reshape(4, 4))
    temporal = first_of(drawn["temporal_first"].predicted_thw, PAPER.cluster)
    assert np.array_equal(temporal.reshape(4, 4), np.arange(16).reshape(4, 4).T)


def test_random_order_is_the_one_that_the_run_draws_at_the_place() -> None:
    clusters = make_clusters(PAPER, DECODER)
    order = clusters.draw_order(sample_generator(7, 5, Stream.SEQUENCE))
    found = first_of(draw_orders(PAPER, DECODER, seed=7, place=5)["random"].predicted_thw, PAPER.cluster)
    assert np.array_equal(np.argsort(found.reshape(-1)), order)
    other = draw_orders(PAPER, DECODER, seed=7, place=6)["random"].predicted_thw
    assert not np.array_equal(found, first_of(other, PAPER.cluster))


def test_seen_and_given_tokens_are_the_sequences() -> None:
    drawn = draw_orders(PAPER, DECODER, seed=0)["random"]
    assert drawn.steps == 15
    assert (drawn.seen_thw > 0).sum() == 300, "Table 5's encoder tokens"
    assert (drawn.predicted_thw > 0).sum() == 1470
    assert (drawn.predicted_thw == 0).sum() == 20, "kept tokens of the first cluster"
    assert (drawn.predicted_thw == -1).sum() == 78, "its dropped ones"
    later = (drawn.seen_thw > 0) & (drawn.predicted_thw > 0)
    assert np.array_equal(drawn.seen_thw[later], drawn.predicted_thw[later] + 1), "seen from the next step on"


def test_a_method_without_clusters_is_drawn_as_its_one_step() -> None:
    drawn = draw_orders(ModelConfig(kind="videomae", mask_ratio=0.9), DECODER, seed=0)
    assert list(drawn) == ["videomae"]
    assert drawn["videomae"].steps == 1
    assert (drawn["videomae"].predicted_thw == 1).sum() == 1408
    assert len(list(pages(drawn))) == 1


def test_a_method_with_one_order_is_drawn_in_that_one() -> None:
    assert list(draw_orders(ModelConfig(kind="randsac", cluster=(1, 7, 7)), DECODER, seed=0)) == ["random"]


def test_page_of_a_step_colours_what_it_sees_and_outlines_what_it_predicts() -> None:
    drawn = draw_orders(PAPER, DECODER, seed=0)
    for step, picture in enumerate(pages(drawn), start=1):
        layout = Page(list(drawn), 8, (14, 14), caption="")
        for row, order in enumerate(drawn.values()):
            for t in range(8):
                x, y = layout.corner(row, t)
                centres = picture[y + 3 : y + 98 : 7, x + 3 : x + 98 : 7].astype(int)
                seen = (order.seen_thw[t] > 0) & (order.seen_thw[t] <= step)
                dark = (centres == 38).all(axis=-1)
                assert np.array_equal(~dark, seen)
                cell = picture[y : y + 98, x : x + 98]
                red = (cell == (255, 0, 0)).all(axis=-1)
                outside = ~(order.predicted_thw[t] == step).repeat(7, 0).repeat(7, 1)
                assert not red[outside].any()
                assert red.any() == (order.predicted_thw[t] == step).any()
    assert step == 15


def test_command_draws_a_configuration_and_a_run(runs: Path, tmp_path: Path) -> None:
    main(["order", "--model.cluster", "[4,7,7]", "--out", str(tmp_path / "a")])
    changed = draw_orders(ModelConfig(cluster=(4, 7, 7)), DECODER, seed=0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a/order.png")), strip(changed))
    assert Image.open(tmp_path / "a/order.gif").n_frames == 7  # type: ignore[attr-defined]
    main(["order", str(runs / "arvideo"), "--out", str(tmp_path / "b")])
    run_id = json.loads((runs / "arvideo/run.json").read_text())["mlflow_run_id"]
    client = MlflowClient(tracking_uri=f"sqlite:///{runs}/mlflow.db")
    logged = {file.path for file in client.list_artifacts(run_id, "analysis")}
    assert logged >= {"analysis/order.png", "analysis/order.gif"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.cluster", "[3,7,7]"], "does not divide the token grid"),
        (["--model.clutser", "[2,7,7]"], "--model.clutser"),
        (["/nowhere"], "/nowhere has no complete checkpoint"),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["order", *arguments, "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
