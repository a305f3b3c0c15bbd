"""The data section of the configuration reaches the loader."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from arvideo_dist.config import DataConfig
from arvideo_dist.storage import Storage
from arvideo_dist.train.data import clips_per_epoch, loader_options, training_sources
from tests.data.conftest import FRAMES, write_dataset


@pytest.fixture
def two_sets(tmp_path: Path) -> DataConfig:
    for name, samples in (("one", 5), ("two", 3)):
        write_dataset(tmp_path / name, [b"x"] * samples, FRAMES[:samples])
    return DataConfig.model_validate(
        {
            "path": str(tmp_path / "one"),
            "weight": 0.7,
            "repeats": 2,
            "mixture": [{"path": str(tmp_path / "two"), "weight": 0.3, "stride": 2}],
        }
    )


def test_each_data_set_keeps_its_own_stride_and_weight(two_sets: DataConfig) -> None:
    sources = training_sources(two_sets)
    assert [(source.stride, source.weight) for source in sources] == [(4, 0.7), (2, 0.3)]


def test_an_epoch_is_all_samples_of_all_sets_times_the_repeats(two_sets: DataConfig) -> None:
    assert clips_per_epoch(two_sets) == 2 * (5 + 3)


def test_a_missing_path_says_where_to_set_it() -> None:
    with pytest.raises(ValueError, match=r"--data\.path, in the YAML file, or as ARVIDEO__DATA__PATH"):
        training_sources(DataConfig())


def test_a_missing_data_set_of_a_mixture_is_named(two_sets: DataConfig, tmp_path: Path) -> None:
    Storage(str(tmp_path / "two")).delete("dataset-train.json")
    with pytest.raises(ValueError, match=r"no data set at .*two"):
        clips_per_epoch(two_sets)


def test_settings_of_reading_and_decoding_are_the_loaders_options() -> None:
    data = DataConfig(
        repeats=3, repeat_windows=True, shuffle_block_shards=4, device_transforms=True, verify_checksums=True,
        read_retries=2, shard_cache_gib=1.5, shard_cache="/cache", hung_worker_s=7.0,
    )  # fmt: skip
    options = loader_options(data, pin_memory=True)
    assert (options.repeats, options.repeat_windows, options.shuffle_block_shards) == (3, True, 4)
    assert (options.device_transforms, options.verify_checksums, options.read_retries) == (True, True, 2)
    assert (options.shard_cache, options.shard_cache_gib) == (Path("/cache"), 1.5)
    assert (options.hung_after_seconds, options.pin_memory) == (7.0, True)


def test_a_shard_cache_under_a_full_shuffle_is_refused() -> None:
    with pytest.raises(ValidationError, match="set shuffle_block_shards to how many shards fit"):
        DataConfig(shard_cache_gib=10)
