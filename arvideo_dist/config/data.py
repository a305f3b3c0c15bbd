"""The data sets of a run and how clips are drawn from them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from arvideo_dist.config.section import ALTERS, FREE, PositiveInt, Section

CropScales = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]


class ClipSampling(Section):
    """How a data set's clips are drawn."""

    sampling: Annotated[Literal["window", "segments"], ALTERS] = Field(
        "window",
        description="window: frames at the stride from a uniform start; segments: one frame from each of as many "
        "equal parts of the video as the clip has frames (fine-tuning on SSv2)",
    )
    stride: Annotated[PositiveInt, ALTERS] = Field(
        4, description="source frames from one clip frame to the next, of a window"
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.sampling == "segments" and self.stride != type(self).model_fields["stride"].default:
            raise ValueError(
                f"stride {self.stride} has no meaning with sampling segments, which cover the whole video: leave "
                "stride unset, or set sampling to window"
            )
        return self


class DataConfig(ClipSampling):
    """A data set, how clips are drawn from it, and with what care it is read."""

    path: Annotated[str | None, ALTERS] = Field(
        None, description="folder or URI of a data set made by data_prep; required"
    )
    split: Annotated[str, ALTERS] = Field("train", description="split to read")
    verify_checksums: Annotated[bool, FREE] = Field(
        False, description="compare every video read with its sha256 in the index (2 ms a clip)"
    )
    read_retries: Annotated[int, FREE] = Field(
        6, ge=0, description="repetitions of a failed read, after 1, 2, 4, ... seconds, before the run fails"
    )
    hung_worker_s: Annotated[float, FREE] = Field(
        120.0, gt=0, description="seconds of decoding one sample after which its worker is replaced"
    )
    workers: Annotated[int, FREE] = Field(8, ge=0, description="decode processes per training worker")
    max_bad_fraction: Annotated[float, FREE] = Field(
        0.01, ge=0, le=1, description="share of unreadable samples past which the run stops"
    )


class TrainDataConfig(DataConfig):
    """The data set to train on."""

    val_split: Annotated[str | None, FREE] = Field("val", description="held-out split; null: no validation")
    repeats: Annotated[PositiveInt, ALTERS] = Field(
        1,
        description="repeated augmentation: clips made from one decoded sample, neighbours in the batch; an epoch "
        "has repeats times as many clips",
    )
    repeat_windows: Annotated[bool, ALTERS] = Field(
        False, description="each repeat has its own temporal window; else one window with several crops"
    )
    shuffle_block_shards: Annotated[PositiveInt | None, ALTERS] = Field(
        None,
        description="shuffle within blocks of this many shuffled shards, to keep reads near each other; null: "
        "over the whole data set",
    )
    device_transforms: Annotated[bool, ALTERS] = Field(
        False,
        description="colour conversion, crop and resize on the training device: less CPU per clip. Wants files "
        "of data_prep's encoding to pay; within one grey level of the CPU's result",
    )
    shard_cache_gib: Annotated[float, FREE] = Field(
        0.0,
        ge=0,
        description="disk per node for copies of remote shards; wants data.shuffle_block_shards; 0: no cache",
    )
    shard_cache: Annotated[str | None, FREE] = Field(
        None, description="folder of the shard cache on each node; null: in the system's temporary folder"
    )

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        if self.shard_cache_gib and self.shuffle_block_shards is None:
            raise ValueError(
                f"shard_cache_gib {self.shard_cache_gib:g} is of no use under a full shuffle, where nearly every "
                "read is of another shard: set shuffle_block_shards to how many shards fit into it, or "
                "shard_cache_gib to 0"
            )
        return self


class MixedData(ClipSampling):
    """A further data set of the run, with its own sampling and augmentation."""

    crop_scales: Annotated[CropScales, ALTERS] = Field(
        (1.0, 0.875, 0.75, 0.66), description="multi-scale crop: shares of the short side"
    )
    path: Annotated[str, ALTERS] = Field(description="folder or URI of a data set made by data_prep")
    split: Annotated[str, ALTERS] = Field("train", description="split to train on")
    weight: Annotated[float, ALTERS] = Field(
        1.0, gt=0, description="share of the samples, relative to data.weight and the others"
    )


class PretrainDataConfig(TrainDataConfig):
    """The data sets of a pretraining run, which may be mixed."""

    crop_scales: Annotated[CropScales, ALTERS] = Field(
        (1.0, 0.875, 0.75, 0.66), description="multi-scale crop: shares of the short side"
    )
    weight: Annotated[float, ALTERS] = Field(
        1.0, gt=0, description="share of the samples if data.mixture names more data sets"
    )
    mixture: Annotated[tuple[MixedData, ...], ALTERS] = Field(
        (),
        description="data sets mixed with data.path by weight, with exact counts; an epoch is then as many "
        "samples as all of them have together",
    )

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.mixture:
            from arvideo_dist.data.order import mixture_shares

            mixture_shares([self.weight, *(other.weight for other in self.mixture)])
        return self
