"""What of a configuration differs from a checkpoint's and alters the run's result."""

from __future__ import annotations

from typing import Any

from arvideo_dist.config.commands import RunConfig, TrainingConfig
from arvideo_dist.config.data import DataConfig
from arvideo_dist.config.section import OnResume, fields_on_resume, value_at
from arvideo_dist.config.sources import data_sets
from arvideo_dist.data.index import load_manifest
from arvideo_dist.storage import without_credentials
from arvideo_dist.tasks.kinds import parameter_shapes


def data_digests(data: DataConfig) -> list[str]:
    """sha256 of the index of `data.path` and of each of `data.mixture`: the data itself, wherever it lies."""
    return [load_manifest(storage, split).index.sha256 for storage, split in data_sets(data)]


def check_allowed_names(config: RunConfig) -> None:
    """ValueError if `run.allow_change` names what is no field, or a field that needs no leave."""
    fields = fields_on_resume(type(config))
    altering = sorted(name for name, change in fields.items() if change is not OnResume.FREE)
    if wrong := [name for name in config.run.allow_change if name not in altering]:
        free = [name for name in wrong if name in fields]
        raise ValueError(
            f"run.allow_change: {', '.join(wrong)} "
            + ("may change without leave" if free == wrong else "is no field that alters the result")
            + f"; accepted: {', '.join(altering)}"
        )


def refuse_changes(
    state: dict[str, Any], config: RunConfig, digests: list[str], precision: str | None, checkpoint: str
) -> list[str]:
    """Compare `config` with the `state` of a checkpoint.

    `digests`: `data_digests` now. `precision`: the resolved one, None if it is not known yet. Returns one line
    for each difference that `run.allow_change` names; ValueError lists all others with old and new value, and those
    that cannot be allowed even if they are named.
    """
    root = type(config)
    if (made_by := state.get("command", "pretrain")) != root.command:
        raise ValueError(
            f"{checkpoint} is of a run of {made_by}, not of {root.command}: choose another run.name. What the one "
            "has trained is given to the other by --init-from"
        )
    fields = fields_on_resume(root)
    before = _values(root, state["config"], state["data_digests"], state["precision"])
    after = _values(root, config.model_dump(mode="json"), digests, precision or state["precision"])
    lines = {
        name: f"{name}: {before[name]!r} in the checkpoint, {after[name]!r} now"
        for name, change in sorted(fields.items())
        if change is not OnResume.FREE and before[name] != after[name]
    }
    misfits = [name for name in lines if fields[name] is OnResume.RESHAPES]
    if misfits and isinstance(config, TrainingConfig):
        before_then = type(config).model_validate(state["config"])
        misfits = misfits if parameter_shapes(before_then) != parameter_shapes(config) else []
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
        "new run; if the encoder is the same, it can start from this run's: python -m arvideo_dist.export RUN "
        "--format safetensors, then --model.init_from FILE"
    )


def _values(
    root: type[RunConfig], config: dict[str, Any], digests: list[str], precision: str
) -> dict[str, Any]:
    """The value of every field, a data set's path replaced by what it holds."""
    config, defaults = without_credentials(config), root().model_dump(mode="json")
    values = {}
    for name in fields_on_resume(root):
        try:
            values[name] = value_at(config, name)
        except KeyError:  # a field that is younger than the checkpoint
            values[name] = value_at(defaults, name)
    first, *others = [f"index sha256 {digest[:16]}" for digest in digests]
    values |= {"data.path": first, root.precision_field: precision}
    if others:
        mixed = zip(values["data.mixture"], others, strict=True)
        values["data.mixture"] = [{**each, "path": other} for each, other in mixed]
    return values
