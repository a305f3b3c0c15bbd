"""The data section of the configuration reaches the loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from arvideo_dist.config.data import PretrainDataConfig, TrainDataConfig
from arvideo_dist.config.sources import (
    clips_per_epoch,
    loader_options,
    pretraining_sources,
    validation_options,
    validation_source,
)
from arvideo_dist.data.loader import ClipSamples
from arvideo_dist.storage import Storage
from tests.data.conftest import FRAMES, write_dataset
from tests.data.in_workers import draw_ids


@pytest.fixture
def two_sets(tmp_path: Path) -> PretrainDataConfig:
    for name, samples in (("one", 5), ("two", 3)):
        write_dataset(tmp_path / name, [b"x"] * samples, FRAMES[:samples])
    return PretrainDataConfig.model_validate(
        {
            "path": str(tmp_path / "one"),
            "weight": 0.7,
            "repeats": 2,
            "mixture": [{"path": str(tmp_path / "two"), "weight": 0.3, "stride": 2}],
        }
    )


def test_each_data_set_keeps_its_own_stride_and_weight(two_sets: PretrainDataConfig) -> None:
    sources = pretraining_sources(two_sets)
    assert [(source.stride, source.weight) for source in sources] == [(4, 0.7), (2, 0.3)]


def test_each_data_set_is_sampled_as_the_configuration_says(two_sets: PretrainDataConfig) -> None:
    data = PretrainDataConfig.model_validate(
        two_sets.model_dump(exclude={"stride", "mixture"})
        | {"sampling": "segments", "mixture": [{"path": two_sets.mixture[0].path, "stride": 2}]}
    )
    samples = ClipSamples(
        pretraining_sources(data),
        clip_frames=4,
        image_size=32,
        draw=draw_ids,
        seed=0,
        shuffle=True,
        options=loader_options(data, pin_memory=False),
    )
    found = set()
    for visit in samples.plan(list(range(2 * 2 * 8))):
        found.add(visit.located.source)
        for clip in visit.clips:
            if visit.located.source == 1:  # a window
                assert set(np.diff(clip.window).tolist()) <= {0, 2}
            elif visit.row.frames >= 4:
                assert (clip.window // (visit.row.frames // 4)).tolist() == [0, 1, 2, 3]
    assert found == {0, 1}


def test_a_stride_with_segments_is_refused() -> None:
    with pytest.raises(ValidationError, match="stride 2 has no meaning with sampling segments"):
        TrainDataConfig.model_validate({"sampling": "segments", "stride": 2})
    with pytest.raises(ValidationError, match="leave stride unset, or set sampling to window"):
        PretrainDataConfig.model_validate({"mixture": [{"path": "x", "sampling": "segments", "stride": 2}]})


def test_an_epoch_is_all_samples_of_all_sets_times_the_repeats(two_sets: PretrainDataConfig) -> None:
    assert clips_per_epoch(two_sets) == 2 * (5 + 3)


def test_a_missing_path_says_where_to_set_it() -> None:
    with pytest.raises(ValueError, match=r"--data\.path, in the YAML file, or as ARVIDEO__DATA__PATH"):
        pretraining_sources(PretrainDataConfig())


def test_a_missing_data_set_of_a_mixture_is_named(two_sets: PretrainDataConfig, tmp_path: Path) -> None:
    Storage(str(tmp_path / "two")).delete("dataset-train.json")
    with pytest.raises(ValueError, match=r"no data set at .*two"):
        clips_per_epoch(two_sets)


def test_settings_of_reading_and_decoding_are_the_loaders_options() -> None:
    data = TrainDataConfig(
        repeats=3, repeat_windows=True, shuffle_block_shards=4, device_transforms=True, verify_checksums=True,
        read_retries=2, shard_cache_gib=1.5, shard_cache="/cache", hung_worker_s=7.0,
    )  # fmt: skip
    options = loader_options(data, pin_memory=True)
    assert (options.repeats, options.repeat_windows, options.shuffle_block_shards) == (3, True, 4)
    assert (options.device_transforms, options.verify_checksums, options.read_retries) == (True, True, 2)
    assert (options.shard_cache, options.shard_cache_gib) == (Path("/cache"), 1.5)
    assert (options.hung_after_seconds, options.pin_memory) == (7.0, True)


def test_validation_reads_as_training_does_but_each_sample_once_in_order() -> None:
    data = TrainDataConfig(
        path="/data", sampling="segments", repeats=3, repeat_windows=True, shuffle_block_shards=4,
        device_transforms=True, verify_checksums=True, read_retries=2, shard_cache_gib=1.5, hung_worker_s=7.0,
    )  # fmt: skip
    options = validation_options(data, pin_memory=True)
    assert (options.device_transforms, options.verify_checksums, options.read_retries) == (True, True, 2)
    assert (options.hung_after_seconds, options.pin_memory, options.shard_cache_gib) == (7.0, True, 1.5)
    assert (options.repeats, options.repeat_windows, options.shuffle_block_shards) == (1, False, None)
    source = validation_source(data)
    assert (source.split, source.sampling, source.crop) == ("val", "segments", None)


def test_a_shard_cache_under_a_full_shuffle_is_refused() -> None:
    with pytest.raises(ValidationError, match="set shuffle_block_shards to how many shards fit"):
        TrainDataConfig(shard_cache_gib=10)
