"""Which fields of the configuration alter a run's result, and what of them differs from a checkpoint's."""

from __future__ import annotations

from typing import Any

from arvideo_dist.config.commands import RunConfig
from arvideo_dist.config.data import DataConfig
from arvideo_dist.config.model import DecoderConfig, ModelConfig
from arvideo_dist.config.sources import training_sources
from arvideo_dist.data.index import load_manifest
from arvideo_dist.storage import without_credentials
from arvideo_dist.tasks.flops import parameter_shapes

# A change of one of these gives other weights after the same number of steps. Every field of the configuration
# stands in one of the two sets (tests/train/test_changes.py).
ALTERING = frozenset(
    {
        "run.seed",
        *("data.path", "data.split", "data.stride", "data.sampling", "data.crop_scales", "data.weight"),
        "data.mixture",
        *("data.repeats", "data.repeat_windows", "data.shuffle_block_shards", "data.device_transforms"),
        *(
            "model.kind",
            "model.encoder",
            "model.frames",
            "model.image_size",
            "model.tubelet",
            "model.cluster",
        ),
        *("model.order", "model.mask_ratio", "model.min_context_clusters", "model.target_norm"),
        "model.init_from",
        *("decoder.width", "decoder.depth", "decoder.head_width", "decoder.self_attention"),
        "decoder.target_ratio",
        *("optim.base_lr", "optim.base_min_lr", "optim.warmup_epochs", "optim.betas", "optim.weight_decay"),
        *("optim.eps", "optim.clip_grad_norm"),
        *("train.epochs", "train.steps", "train.global_batch", "train.precision"),
    }
)
# Of these, the ones that give the parameters other shapes: a checkpoint's weights do not fit such a model, so no
# leave helps.
RESHAPING = frozenset(
    {
        *("model.kind", "model.encoder", "model.tubelet"),
        *("decoder.width", "decoder.depth", "decoder.self_attention"),
    }
)
# These say where, how fast, how often and with what care; up to rounding the result is the same.
FREE = frozenset(
    {
        *("run.name", "run.storage_path", "run.resume", "run.allow_change", "run.max_restarts"),
        "run.max_failed_saves",
        *("run.checkpoint_every_steps", "run.checkpoint_every_minutes", "run.keep_last", "run.keep_every"),
        *("run.lease_s", "run.hung_s", "run.preemption_grace_s", "run.audit"),
        *("data.val_split", "data.verify_checksums", "data.read_retries", "data.shard_cache_gib"),
        *("data.shard_cache", "data.hung_worker_s", "data.workers", "data.max_bad_fraction"),
        *("train.micro_batch", "train.zero_stage", "train.log_every_steps"),
        *("train.max_bad_steps", "train.on_bad_steps"),
        *("validation.every_steps", "validation.max_clips"),
        *("cluster.address", "cluster.workers", "cluster.device", "cluster.cpus_per_worker"),
        "cluster.resize_interval_s",
        *("tracking.uri", "tracking.experiment"),
    }
)


def data_digests(data: DataConfig) -> list[str]:
    """sha256 of the index of `data.path` and of each of `data.mixture`: the data itself, wherever it lies."""
    return [load_manifest(source.storage, source.split).index.sha256 for source in training_sources(data)]


def check_allowed_names(config: RunConfig) -> None:
    """ValueError if `run.allow_change` names what is no field, or a field that needs no leave."""
    if wrong := [name for name in config.run.allow_change if name not in ALTERING]:
        free = [name for name in wrong if name in FREE]
        raise ValueError(
            f"run.allow_change: {', '.join(wrong)} "
            + ("may change without leave" if free == wrong else "is no field that alters the result")
            + f"; accepted: {', '.join(sorted(ALTERING))}"
        )


def refuse_changes(
    state: dict[str, Any], config: RunConfig, digests: list[str], precision: str | None, checkpoint: str
) -> list[str]:
    """Compare `config` with the `state` of a checkpoint.

    `digests`: `data_digests` now. `precision`: the resolved one, None if it is not known yet. Returns one line
    for each difference that `run.allow_change` names; ValueError lists all others with old and new value, and those
    that cannot be allowed even if they are named.
    """
    before = _altering(without_credentials(state["config"]), state["data_digests"], state["precision"])
    now = without_credentials(config.model_dump(mode="json"))
    after = _altering(now, digests, precision or state["precision"])
    lines: dict[str, str] = {}
    for name in sorted(ALTERING):
        old = before.get(name, _default(name))  # a field that is younger than the checkpoint
        if old != after[name]:
            lines[name] = f"{name}: {old!r} in the checkpoint, {after[name]!r} now"
    misfits = [name for name in lines if name in RESHAPING]
    if misfits and _shapes(state["config"]) == _shapes(now):
        misfits = []
    refused = [name for name in lines if name in misfits or name not in config.run.allow_change]
    if refused:
        listed = "\n  ".join(lines[name] for name in refused)
        raise ValueError(
            f"the configuration differs from that of {checkpoint} in what alters the result:\n  {listed}\n"
            + _remedy(refused, misfits)
        )
    return list(lines.values())


def _remedy(refused: list[str], misfits: list[str]) -> str:
    others = ",".join(name for name in refused if name not in misfits)
    if not misfits:
        return f"Set these back, choose another run.name, or go on with --run.allow_change {others}"
    leave = f"; then go on with --run.allow_change {others}, or set these back too" if others else ""
    return (
        f"The checkpoint's weights do not fit a model with another {', '.join(misfits)}, so run.allow_change "
        f"cannot help: set {'it' if len(misfits) == 1 else 'them'} back{leave}. Or choose another run.name for a "
        "new run; where the encoder is the same, it can start from this run's: python -m arvideo_dist.export RUN "
        "--format safetensors, then --model.init_from FILE"
    )


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return parameter_shapes(
        ModelConfig.model_validate(config["model"]), DecoderConfig.model_validate(config["decoder"])
    )


def _altering(config: dict[str, Any], digests: list[str], precision: str) -> dict[str, Any]:
    """The altering fields' values, a data set's path replaced by what it holds."""
    values = {
        f"{section}.{name}": value
        for section, fields in config.items()
        for name, value in fields.items()
        if f"{section}.{name}" in ALTERING
    }
    first, *others = [f"index sha256 {digest[:16]}" for digest in digests]
    mixture = [{**mixed, "path": other} for mixed, other in zip(values["data.mixture"], others, strict=True)]
    return values | {"data.path": first, "data.mixture": mixture, "train.precision": precision}


def _default(name: str) -> Any:
    section, field = name.split(".")
    return RunConfig().model_dump(mode="json")[section][field]
