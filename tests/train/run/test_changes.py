"""A changed configuration on resume: what alters the result is refused by name, what does not is free."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from arvideo_dist.config.commands import ROOTS, PretrainConfig, RunConfig
from arvideo_dist.config.run import RunConfigSection
from arvideo_dist.config.section import OnResume, fields_on_resume
from arvideo_dist.data.index import FileEntry
from arvideo_dist.launch.start import check_resume
from arvideo_dist.storage import Storage
from arvideo_dist.tasks.kinds import parameter_shapes
from arvideo_dist.train.checkpoint.layout import FOLDER, MANIFEST, STATE, checkpoint_name
from arvideo_dist.train.checkpoint.manifest import CheckpointManifest
from arvideo_dist.train.run.changes import check_allowed_names, data_digests, refuse_changes
from tests.data.conftest import FRAMES, write_dataset

RESHAPING = {name for name, change in fields_on_resume(PretrainConfig).items() if change is OnResume.RESHAPES}


def _config(**sections: dict[str, Any]) -> PretrainConfig:
    return PretrainConfig.model_validate(sections)


def _refuse(before: PretrainConfig, after: PretrainConfig, **now: Any) -> list[str]:
    """With data of digest `d`, in fp32, unless `now` says otherwise."""
    state = {"config": before.model_dump(mode="json"), "data_digests": ["d" * 64], "precision": "fp32"}
    return refuse_changes(
        state, after, now.get("digests", ["d" * 64]), now.get("precision", "fp32"), "run/checkpoints/step-1"
    )


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_every_field_of_every_command_says_what_its_change_does(root: type[RunConfig]) -> None:
    fields = fields_on_resume(root)  # raises if one does not
    assert fields.keys() >= {f"run.{name}" for name in RunConfigSection.model_fields}
    assert fields["run.name"] is OnResume.FREE
    assert fields["run.seed"] is OnResume.ALTERS
    assert fields["model.encoder"] is OnResume.RESHAPES


def test_all_differing_fields_are_named_with_both_values_and_the_remedy() -> None:
    before = _config(optim={"base_lr": 1e-3}, train={"epochs": 800})
    after = _config(optim={"base_lr": 2e-3}, train={"epochs": 1600})
    with pytest.raises(ValueError, match="differs from that of run/checkpoints/step-1") as refused:
        _refuse(before, after)
    lines = str(refused.value).splitlines()
    assert lines[1:3] == [
        "  optim.base_lr: 0.001 in the checkpoint, 0.002 now",
        "  train.epochs: 800.0 in the checkpoint, 1600.0 now",
    ]
    assert "--run.allow_change optim.base_lr,train.epochs" in lines[3]


def test_named_fields_may_change_and_only_those() -> None:
    before = _config(train={"epochs": 800})
    after = _config(run={"allow_change": ["train.epochs"]}, train={"epochs": 1600})
    assert _refuse(before, after) == ["train.epochs: 800.0 in the checkpoint, 1600.0 now"]
    also = _config(run={"allow_change": ["train.epochs"], "seed": 1}, train={"epochs": 1600})
    with pytest.raises(ValueError, match=r"run\.seed: 0 in the checkpoint, 1 now") as refused:
        _refuse(before, also)
    assert "train.epochs" not in str(refused.value)


def test_workers_places_and_care_are_free() -> None:
    after = _config(
        run={"name": "other", "storage_path": "/elsewhere", "checkpoint_every_steps": 7, "keep_last": 9},
        data={"path": "/moved", "workers": 1, "max_bad_fraction": 0.5},
        train={"micro_batch": 8, "zero_stage": 3, "log_every_steps": 1},
        cluster={"workers": 3},
        tracking={"uri": "http://tracking"},
    )
    assert _refuse(_config(data={"path": "/data"}), after) == []


def test_other_data_are_refused_though_they_lie_at_the_same_path() -> None:
    config = _config(data={"path": "/data"})
    with pytest.raises(ValueError, match=r"data\.path: 'index sha256 dddd.*' in the checkpoint, .*eeee.*now"):
        _refuse(config, config, digests=["e" * 64])


def test_precision_is_compared_as_it_was_resolved() -> None:
    bf16 = _config(train={"precision": "bf16"})
    assert _refuse(_config(), bf16, precision=None) == []  # not known before the workers start
    assert _refuse(_config(), _config(train={"precision": "fp32"})) == []
    with pytest.raises(ValueError, match=r"train\.precision: 'fp32' in the checkpoint, 'bf16' now"):
        _refuse(_config(), bf16, precision="bf16")


def test_a_field_that_is_younger_than_the_checkpoint_had_its_default() -> None:
    state = {"config": _config().model_dump(mode="json"), "data_digests": ["d" * 64], "precision": "fp32"}
    del state["config"]["decoder"]["target_ratio"]
    assert refuse_changes(state, _config(), ["d" * 64], "fp32", "checkpoint") == []
    changed = _config(decoder={"target_ratio": 0.5})
    with pytest.raises(ValueError, match=r"decoder\.target_ratio: 1\.0 in the checkpoint, 0\.5 now"):
        refuse_changes(state, changed, ["d" * 64], "fp32", "checkpoint")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("train.epocs", "is no field that alters"), ("train.micro_batch", "may change without leave")],
)
def test_allow_change_accepts_only_fields_that_need_it(name: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_allowed_names(_config(run={"allow_change": [name]}))


# Another value of each field of model and decoder that may change alone.
_OTHERS: dict[str, Any] = {
    "model.encoder": "small",
    "model.frames": 8,
    "model.image_size": 112,
    "model.tubelet": [4, 16, 16],
    "model.cluster": [4, 7, 7],
    "model.order": "spatial_first",
    "model.mask_ratio": 0.5,
    "model.min_context_clusters": 2,
    "model.target_norm": "per_cube",
    "model.init_from": "/weights.safetensors",
    "model.kind": "videomae",
    "decoder.width": 384,
    "decoder.depth": 2,
    "decoder.head_width": 32,
    "decoder.self_attention": True,
    "decoder.target_ratio": 0.5,
}


def _with(name: str, value: Any, **run: Any) -> PretrainConfig:
    section, field = name.split(".")
    return _config(**{section: {field: value}, "run": run})


def test_the_fields_that_reshape_parameters_are_those_that_a_leave_cannot_help() -> None:
    fields = {
        f"{section}.{field}" for section in ("model", "decoder") for field in _config().model_dump()[section]
    }
    assert _OTHERS.keys() == fields, "give a new field another value here"
    plain = parameter_shapes(_config())
    reshaping = {name for name, value in _OTHERS.items() if parameter_shapes(_with(name, value)) != plain}
    assert reshaping == RESHAPING


@pytest.mark.parametrize("name", sorted(RESHAPING))
def test_another_model_is_refused_at_once_leave_or_not_and_never_advised(name: str) -> None:
    for leave in ([], [name]):
        changed = _with(name, _OTHERS[name], allow_change=leave)
        with pytest.raises(ValueError, match=rf"{name}: .* in the checkpoint, .* now") as refused:
            _refuse(_config(), changed)
        assert f"do not fit a model with another {name}, so run.allow_change cannot help" in str(
            refused.value
        )
        assert "choose another run.name" in str(refused.value)
        assert "--model.init_from" in str(refused.value)
        assert f"--run.allow_change {name}" not in str(refused.value)


def test_what_a_leave_helps_with_is_advised_beside_what_it_does_not() -> None:
    changed = _config(model={"encoder": "small"}, optim={"base_lr": 1.0}, train={"epochs": 1})
    with pytest.raises(ValueError, match=r"set it back; then go on with --run\.allow_change") as refused:
        _refuse(_config(), changed)
    assert "--run.allow_change optim.base_lr,train.epochs, or" in str(refused.value)


def test_fields_that_keep_the_shapes_go_on_with_leave() -> None:
    for name in sorted(_OTHERS.keys() - RESHAPING):
        assert len(_refuse(_config(), _with(name, _OTHERS[name], allow_change=[name]))) == 1, name


def _write_checkpoint(run: Storage, step: int, config: PretrainConfig) -> None:
    """One without parameters."""
    state = {
        "config": config.model_dump(mode="json"),
        "data_digests": data_digests(config.data),
        "precision": "fp32",
    }
    content = json.dumps(state).encode()
    entry = FileEntry(name=STATE, size=len(content), sha256=hashlib.sha256(content).hexdigest())
    manifest = CheckpointManifest(shapes={}, fragments=[], parts=[], state=entry)
    run.write_bytes(f"{FOLDER}/{checkpoint_name(step)}/{STATE}", content)
    run.write_bytes(f"{FOLDER}/{checkpoint_name(step)}/{MANIFEST}", manifest.model_dump_json().encode())


def test_the_driver_refuses_by_the_newest_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [b"x"] * 3, FRAMES[:3])
    sections: dict[str, Any] = {
        "run": {"name": "one", "storage_path": str(tmp_path)},
        "data": {"path": data.uri, "val_split": None},
        "cluster": {"device": "cpu"},
    }
    config = _config(**sections)
    check_resume(config)  # nothing to compare with yet
    for step in (1, 2):
        _write_checkpoint(Storage(str(tmp_path / "one")), step, config)
    check_resume(config)
    changed = _config(**sections, model={"mask_ratio": 0.5})
    with pytest.raises(
        ValueError, match=r"step-00000002 in what alters the result:\n  model\.mask_ratio: 0\.8"
    ):
        check_resume(changed)
    (tmp_path / "one" / FOLDER / checkpoint_name(2) / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"step-00000001 in what alters the result"):
        check_resume(changed)
