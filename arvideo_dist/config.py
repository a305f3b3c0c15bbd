"""The configuration of a whole run as one tree of pydantic models; defaults: the paper's K400 ViT-B recipe.

`settings.py` fills it from files, environment and flags; `derived.py` computes what follows from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
Triple = tuple[PositiveInt, PositiveInt, PositiveInt]


class Section(BaseModel):
    """Base of every section: unknown keys are refused and values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunConfigSection(Section):
    """Identity, storage and life of the run."""

    name: str = Field(
        "arvideo-vit-b-k400", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run's folder"
    )
    storage_path: str = Field("runs", description="folder or URI (s3://...) that every node reaches")
    seed: int = Field(0, ge=0, description="decides the sample order and every random draw")
    resume: Literal["auto", "must", "never"] = Field(
        "auto",
        description="auto: from the latest complete checkpoint if there is one; must: refuse to start "
        "without one; never: refuse to start where there is one",
    )
    allow_change: tuple[str, ...] = Field(
        (),
        description="fields, such as train.epochs, that may differ from the checkpoint's though they alter the "
        "result; others that do are refused on resume",
    )
    checkpoint_every_steps: PositiveInt = Field(500, description="optimiser steps between checkpoints")
    checkpoint_every_minutes: float | None = Field(
        30.0, gt=0, description="minutes after which a checkpoint is due earlier; null: by steps alone"
    )
    keep_last: PositiveInt = Field(2, description="newest complete checkpoints kept; older ones are deleted")
    keep_every: PositiveInt | None = Field(
        None,
        description="checkpoints of steps that this divides are made and kept for good, in place of one that fails "
        "the next; null: none",
    )
    max_failed_saves: PositiveInt = Field(
        3,
        description="saves in a row that fail (a full disk, a failing store), each tried again half a minute to "
        "ten minutes later while the training goes on, before the run stops",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="restarts after lost workers, without a checkpoint in between, before the run fails; "
        "each after a longer pause than the one before",
    )
    hung_s: float = Field(
        600.0,
        ge=5,
        description="seconds without progress of any rank after which the run counts as hung: the stacks of all "
        "ranks are kept and the workers start again; must be longer than the longest honest pause between two "
        "signs of progress (a micro batch, a batch of the validation, a piece of a checkpoint, data.hung_worker_s, "
        "the three minutes for which a request to storage is repeated)",
    )
    lease_s: float = Field(
        60.0,
        ge=3,
        description="seconds without a sign of life of the driver after which another may take the run over",
    )
    preemption_grace_s: float = Field(
        120.0,
        gt=0,
        description="seconds that the workers have after SIGTERM or Ctrl-C to end their step and save; then "
        "the driver ends without a new checkpoint",
    )
    audit: bool = Field(
        False, description="each worker notes at every optimiser step which places of the sequence it applied"
    )


CropScales = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]


class ClipSampling(Section):
    """How a data set's clips are drawn."""

    sampling: Literal["window", "segments"] = Field(
        "window",
        description="window: frames at the stride from a uniform start; segments: one frame from each of as many "
        "equal parts of the video as the clip has frames (fine-tuning on SSv2)",
    )
    stride: PositiveInt = Field(4, description="source frames from one clip frame to the next, of a window")
    crop_scales: CropScales = Field(
        (1.0, 0.875, 0.75, 0.66), description="multi-scale crop: shares of the short side"
    )

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.sampling == "segments" and self.stride != type(self).model_fields["stride"].default:
            raise ValueError(
                f"stride {self.stride} has no meaning with sampling segments, which cover the whole video: leave "
                "stride unset, or set sampling to window"
            )
        return self


class MixedData(ClipSampling):
    """A further data set of the run, with its own sampling and augmentation."""

    path: str = Field(description="folder or URI of a data set made by data_prep")
    split: str = Field("train", description="split to train on")
    weight: float = Field(
        1.0, gt=0, description="share of the samples, relative to data.weight and the others"
    )


class DataConfig(ClipSampling):
    """The data set and how clips are drawn from it."""

    path: str | None = Field(None, description="folder or URI of a data set made by data_prep; required")
    split: str = Field("train", description="split to train on")
    val_split: str | None = Field("val", description="held-out split; null: no validation")
    weight: float = Field(
        1.0, gt=0, description="share of the samples where data.mixture names more data sets"
    )
    mixture: tuple[MixedData, ...] = Field(
        (),
        description="data sets mixed with data.path by weight, with exact counts; an epoch is then as many "
        "samples as all of them have together",
    )
    repeats: PositiveInt = Field(
        1,
        description="repeated augmentation: clips made from one decoded sample, neighbours in the batch; an epoch "
        "has repeats times as many clips",
    )
    repeat_windows: bool = Field(
        False, description="each repeat has its own temporal window; else one window with several crops"
    )
    shuffle_block_shards: PositiveInt | None = Field(
        None,
        description="shuffle within blocks of this many shuffled shards, to keep reads near each other; null: "
        "over the whole data set",
    )
    device_transforms: bool = Field(
        False,
        description="colour conversion, crop and resize on the training device: less CPU per clip. Wants files "
        "of data_prep's encoding to pay; within one grey level of the CPU's result",
    )
    verify_checksums: bool = Field(
        False, description="compare every video read with its sha256 in the index (2 ms a clip)"
    )
    read_retries: int = Field(
        6, ge=0, description="repetitions of a failed read, after 1, 2, 4, ... seconds, before the run fails"
    )
    shard_cache_gib: float = Field(
        0.0,
        ge=0,
        description="disk per node for copies of remote shards; wants data.shuffle_block_shards; 0: no cache",
    )
    shard_cache: str | None = Field(
        None, description="folder of the shard cache on each node; null: in the system's temporary folder"
    )
    hung_worker_s: float = Field(
        120.0, gt=0, description="seconds of decoding one sample after which its worker is replaced"
    )
    workers: int = Field(8, ge=0, description="decode processes per training worker")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="share of unreadable samples past which the run stops"
    )

    @model_validator(mode="after")
    def _check_weights(self) -> DataConfig:
        if self.mixture:
            from arvideo_dist.data.order import mixture_shares

            mixture_shares([self.weight, *(other.weight for other in self.mixture)])
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> DataConfig:
        if self.shard_cache_gib and self.shuffle_block_shards is None:
            raise ValueError(
                f"shard_cache_gib {self.shard_cache_gib:g} is of no use under a full shuffle, where nearly every "
                "read is of another shard: set shuffle_block_shards to how many shards fit into it, or "
                "shard_cache_gib to 0"
            )
        return self


class ModelConfig(Section):
    """Geometry of the clip, its tokens and clusters (paper 3.3), and the encoder."""

    kind: Literal["arvideo", "videomae", "randsac"] = Field(
        "arvideo",
        description="pretraining method. arvideo with cluster 1,1,1 and order spatial_first is TokenGPT, and with "
        "tubelet 1,1,1 besides iGPT, whose tokens are pixels. videomae has no clusters and masks tubes (its paper: "
        "model.mask_ratio 0.9, decoder.width 384). randsac's decoder has learned skip connections and its clusters "
        "are squares in random order. jobs/paper/methods has the paper's settings of each",
    )
    encoder: Literal["demo", "tiny", "small", "base", "large", "huge"] = Field(
        "base", description="ViT-Ti/S/B/L/H; demo is 192 wide and 6 deep"
    )
    frames: PositiveInt = Field(16, description="frames of a clip")
    image_size: PositiveInt = Field(224, description="height and width of a clip in pixels")
    tubelet: Triple = Field((2, 16, 16), description="P_T,P_H,P_W: frames and pixels of one cube (token)")
    cluster: Triple = Field((2, 7, 7), description="K_T,K_H,K_W: tokens of one cluster")
    order: Literal["random", "spatial_first", "temporal_first"] = Field(
        "random", description="prediction order of the clusters"
    )
    mask_ratio: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="share of each cluster's tokens (videomae: of a frame's places) that the encoder does not see",
    )
    min_context_clusters: PositiveInt = Field(
        1, description="clusters every prediction sees; 1: 1470 queries, 2: 1372 as printed in Table 5"
    )
    target_norm: Literal["per_channel", "per_cube", "none"] = Field(
        "per_channel", description="normalisation of each cube's target pixels"
    )
    init_from: str | None = Field(
        None,
        description="VideoMAE weights that the encoder starts from: a transformers folder, or a .safetensors, "
        ".pth, .pt or .bin file in its layout or the original repository's; null: random",
    )

    @property
    def token_grid(self) -> Triple:
        """Tokens of a clip along time, height and width."""
        p_t, p_h, p_w = self.tubelet
        return self.frames // p_t, self.image_size // p_h, self.image_size // p_w

    @model_validator(mode="after")
    def _check_geometry(self) -> ModelConfig:
        clip = (self.frames, self.image_size, self.image_size)
        if any(size % cube for size, cube in zip(clip, self.tubelet, strict=True)):
            raise ValueError(f"tubelet {self.tubelet} does not divide the clip {clip}")
        grid = self.token_grid
        if self.kind == "videomae":
            self._check_videomae(grid)
            return self
        if self.kind == "randsac":
            self._check_randsac()
        if any(size % k for size, k in zip(grid, self.cluster, strict=True)):
            fits = ["|".join(str(k) for k in range(1, size + 1) if size % k == 0) for size in grid]
            raise ValueError(
                f"cluster {self.cluster} does not divide the token grid {grid}; "
                f"accepted K_T: {fits[0]}, K_H: {fits[1]}, K_W: {fits[2]}"
            )
        clusters = 1
        for size, k in zip(grid, self.cluster, strict=True):
            clusters *= size // k
        if self.min_context_clusters >= clusters:
            raise ValueError(
                f"min_context_clusters {self.min_context_clusters} leaves nothing to predict: cluster "
                f"{self.cluster} makes {clusters} clusters of the token grid {grid}"
            )
        return self

    @model_validator(mode="after")
    def _check_target_norm(self) -> ModelConfig:
        if self.target_norm == "per_channel" and self.tubelet == (1, 1, 1):
            raise ValueError(
                "target_norm per_channel takes each channel's mean and deviation over a cube's pixels, of which "
                "tubelet (1, 1, 1) has one: set target_norm to none"
            )
        return self

    def _check_randsac(self) -> None:
        if self.cluster[1] != self.cluster[2]:
            raise ValueError(f"cluster {self.cluster}: randsac's segments are squares; set K_H and K_W alike")
        if self.order != "random":
            raise ValueError(f"order {self.order}: randsac's segments are in random order; leave order unset")

    def _check_videomae(self, grid: Triple) -> None:
        own = {"cluster", "order", "min_context_clusters"}
        if changed := sorted(n for n in own if getattr(self, n) != type(self).model_fields[n].default):
            raise ValueError(f"{', '.join(changed)}: videomae has no clusters; leave what orders them unset")
        if not int(self.mask_ratio * grid[1] * grid[2]):
            raise ValueError(
                f"mask_ratio {self.mask_ratio:g} masks none of {grid[1] * grid[2]} places a frame"
            )


class DecoderConfig(Section):
    """The cross-attention decoder (paper 3.3.3, Tables 9 and 10)."""

    width: PositiveInt = Field(512, description="embedding width")
    depth: PositiveInt = Field(4, description="blocks")
    head_width: PositiveInt = Field(64, description="width of one attention head")
    self_attention: bool = Field(
        False, description="queries also attend to queries of their own and earlier clusters (Table 9)"
    )
    target_ratio: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of each predicted cluster's tokens, drawn anew for every sample, that are queries; "
        "below 1 the loss is an unbiased estimate for less work (not in the paper)",
    )

    @model_validator(mode="after")
    def _check_queries(self) -> DecoderConfig:
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is not a multiple of head_width {self.head_width}")
        if self.self_attention and self.target_ratio < 1:
            raise ValueError(
                f"target_ratio {self.target_ratio:g} is refused together with self_attention: queries that see "
                "each other predict something else when some are left out, so the loss would be biased; set "
                "target_ratio to 1 or self_attention to false"
            )
        return self


class OptimConfig(Section):
    """AdamW and its schedule (VideoMAE's protocol, paper 4.1)."""

    base_lr: float = Field(1.5e-4, gt=0, description="peak learning rate per 256 clips of global batch")
    base_min_lr: float = Field(1e-5, ge=0, description="final learning rate per 256 clips of global batch")
    warmup_epochs: float = Field(40, ge=0, description="linear warm-up from 0, in epochs")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="AdamW betas"
    )
    weight_decay: float = Field(0.05, ge=0, description="not applied to 1-D parameters")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    clip_grad_norm: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")


class TrainConfig(Section):
    """Length, batch and numerics of training."""

    epochs: float = Field(800, gt=0, description="passes over the data set")
    steps: PositiveInt | None = Field(None, description="optimiser steps; replaces epochs where set")
    global_batch: PositiveInt = Field(2048, description="clips of one optimiser step over all workers")
    micro_batch: PositiveInt = Field(32, description="clips a worker computes at a time")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="auto: bf16 on GPUs, fp32 on CPU; bf16 is autocast over fp32 parameters"
    )
    zero_stage: int = Field(1, ge=0, le=3, description="DeepSpeed ZeRO stage")
    log_every_steps: PositiveInt = Field(10, description="optimiser steps between logged points")
    max_bad_steps: PositiveInt = Field(
        3,
        description="steps in a row whose loss or gradient norm is not finite, none of them applied, at which "
        "train.on_bad_steps says what to do",
    )
    on_bad_steps: Literal["rollback", "stop"] = Field(
        "rollback",
        description="rollback: weights and moments go back to the newest checkpoint's and training goes on with "
        "the samples after the bad steps; stop: the run ends",
    )


class ValidationConfig(Section):
    """Loss on the held-out split."""

    every_steps: PositiveInt = Field(2000, description="optimiser steps between validations; also at the end")
    max_clips: PositiveInt = Field(2048, description="first clips of the split that are used")


def _worker_range(value: Any) -> Any:
    """The command line gives a lone number as a list of one; what is neither form gets one message, not two."""
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, 2) or not all(str(n).isdecimal() and int(n) > 0 for n in numbers):
        raise ValueError(f"expected a number above 0, or [min,max], got {value!r}")
    if int(numbers[0]) > int(numbers[-1]):
        raise ValueError(f"expected [min,max], got {value!r}: swap them")
    return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))


class ClusterConfig(Section):
    """The Ray cluster and the workers on it."""

    address: str | None = Field(
        None, description="Ray address; null: join the surrounding cluster or job, else start Ray here"
    )
    workers: Annotated[int | tuple[int, int], BeforeValidator(_worker_range)] = Field(
        8,
        description="training workers (one GPU each, or CPU processes); [min,max]: as many as the cluster has room "
        "for, also when nodes come and go",
    )
    resize_interval_s: float = Field(
        60.0,
        gt=0,
        description="with workers [min,max]: seconds for which nodes must have had room for more workers before "
        "those that run save and make way for a wider set",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: cuda where the cluster has GPUs when the command starts"
    )
    cpus_per_worker: PositiveInt = Field(1, description="CPU cores that Ray reserves for each worker")

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(
        None,
        description="tracking server; null: sqlite in run.storage_path (which must then be a local path)",
    )
    experiment: str = Field("arvideo", description="MLflow experiment")


class RunConfig(Section):
    """A whole pretraining run."""

    run: RunConfigSection = Field(default_factory=RunConfigSection)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _check_decoder_of_kind(self) -> RunConfig:
        if self.model.kind == "videomae" and (self.decoder.self_attention or self.decoder.target_ratio < 1):
            raise ValueError(
                "decoder.self_attention and decoder.target_ratio belong to model.kind arvideo; videomae's decoder "
                "always has self-attention and predicts every masked token: leave both unset"
            )
        return self
