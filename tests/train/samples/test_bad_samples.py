"""The list of bad samples: one record a sample, written seldom, counted by place, from older checkpoints too."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch.distributed as dist

from arvideo_dist.data.loader import BadRecord
from arvideo_dist.storage import Storage
from arvideo_dist.train.run.stop import RunStoppedError
from arvideo_dist.train.samples.bad_samples import ARTIFACT, BadSamples
from arvideo_dist.train.tracking.deferred import DeferredWrites
from tests.train.distributed import run_ranks
from tests.train.keyed import micro_batch

SAMPLES, EPOCHS, COLLECT_EVERY = 100, 30, 10  # of the data set; of the run; steps
BAD = (3, 40, 77)  # samples; an epoch shows sample n at step and place n
OLD_FORMAT = [
    {"place": 3, "shard": "train-0.tar", "key": "3", "reason": "old"},
    {"place": 40, "shard": "train-0.tar", "key": "40", "reason": "old"},
    {"place": 103, "shard": "train-0.tar", "key": "3", "reason": "older"},
]


class CountingStorage(Storage):
    writes = 0

    def write_bytes(self, name: str, data: bytes) -> None:
        self.writes += 1
        super().write_bytes(name, data)


def _bad_samples(run: Storage, fraction: float = 0.5) -> BadSamples:
    control = dist.group.WORLD
    assert control is not None
    return BadSamples(DeferredWrites(run), fraction, SAMPLES, control)


def _meet(bad: BadSamples, place: int, sample: int) -> None:
    """One step: rank 1 has a bad sample at `place`."""
    batch = micro_batch([place])
    if dist.get_rank():
        batch.bad = [BadRecord(place, "train-0.tar", str(sample), f"bad at {place}", "train")]
    bad.account([batch], 1, place)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _find, str(tmp_path_factory.mktemp("bad-samples")))


def _find(folder: str) -> dict[str, Any]:
    return {
        "epochs": _train_for_epochs(f"{folder}/epochs"),
        "stopped": _pass_the_limit(f"{folder}/stopped"),
        "older": _go_on_from_an_older_checkpoint(f"{folder}/older"),
    }


def _train_for_epochs(folder: str) -> dict[str, Any]:
    run = CountingStorage(folder)
    bad = _bad_samples(run)
    sizes = []
    for epoch in range(EPOCHS):
        for step in range(SAMPLES):
            if step in BAD:
                _meet(bad, epoch * SAMPLES + step, step)
            if step % COLLECT_EVERY == COLLECT_EVERY - 1:
                bad.collect()
        sizes.append(len(json.dumps(bad.listed())))
    resumed = _bad_samples(run)
    resumed.restore(json.loads(json.dumps(bad.listed())), [])
    return {
        "places": [bad.places, resumed.places],
        "listed": bad.listed(),
        "resumed": resumed.listed(),
        "sizes": sizes,
        "writes": run.writes,
    }


def test_a_sample_is_one_record_however_many_epochs_meet_it(found: list[dict[str, Any]]) -> None:
    last = (EPOCHS - 1) * SAMPLES
    for rank in found:
        assert rank["epochs"]["listed"] == [
            {
                **{"shard": "train-0.tar", "key": str(sample), "reason": f"bad at {last + sample}"},
                **{"places": EPOCHS, "first_place": sample, "last_place": last + sample, "split": "train"},
            }
            for sample in BAD
        ]
        assert rank["epochs"]["places"] == [len(BAD) * EPOCHS] * 2
        assert rank["epochs"]["resumed"] == rank["epochs"]["listed"]
        assert max(rank["epochs"]["sizes"]) < 1.2 * rank["epochs"]["sizes"][0]


def test_the_list_is_written_where_it_is_collected_and_has_changed(found: list[dict[str, Any]]) -> None:
    assert [rank["epochs"]["writes"] for rank in found] == [len(BAD) * EPOCHS, 0]


def _pass_the_limit(folder: str) -> dict[str, Any]:
    """2 % of 100: two places are allowed, also where one sample took them."""
    bad = _bad_samples(Storage(folder), fraction=0.02)
    for epoch in range(2):
        _meet(bad, epoch * SAMPLES // 2 + 3, 3)
    try:
        _meet(bad, SAMPLES, 40)
    except RunStoppedError as error:
        dist.barrier()
        rows = pq.read_table(io.BytesIO(Storage(folder).read_bytes(ARTIFACT))).to_pylist()
        return {"message": str(error), "rows": rows}
    return {}


def test_past_the_allowed_share_of_places_every_rank_stops_and_all_samples_are_listed(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert (
            "3 bad samples are more than data.max_bad_fraction 0.02 allows (2)" in rank["stopped"]["message"]
        )
        assert "the last one: train-0.tar 40: bad at 100" in rank["stopped"]["message"]
        assert [(row["key"], row["places"]) for row in rank["stopped"]["rows"]] == [("3", 2), ("40", 1)]


def _go_on_from_an_older_checkpoint(folder: str) -> list[dict[str, Any]]:
    bad = _bad_samples(Storage(folder))
    bad.restore(OLD_FORMAT, [])
    assert bad.places == 3
    _meet(bad, 140, 40)
    bad.collect()
    return bad.listed()


def test_a_checkpoint_that_lists_places_is_continued_by_sample(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert [
            (each["key"], each["reason"], each["places"], each["first_place"], each["last_place"])
            for each in rank["older"]
        ] == [("3", "older", 2, 3, 103), ("40", "bad at 140", 2, 40, 140)]
