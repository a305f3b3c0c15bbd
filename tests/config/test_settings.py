"""What a user sets reaches the run, and what is wrong stops the command before anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arvideo_dist.config.commands import EmbedConfig, EvaluateConfig, PretrainConfig, RunConfig
from arvideo_dist.config.settings import ConfigError, read_config
from arvideo_dist.pretrain import main
from arvideo_dist.tasks.derived import Derived, derive


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARVIDEO_CONFIG", raising=False)


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {steps: 1, micro_batch: 1, global_batch: 4}\nmodel: {cluster: [4, 7, 7]}\n")
    monkeypatch.setenv("ARVIDEO__TRAIN__STEPS", "2")
    monkeypatch.setenv("ARVIDEO__TRAIN__MICRO_BATCH", "2")
    config, _ = read_config(PretrainConfig, ["--config", str(file), "--train.steps", "3"])
    assert (config.train.steps, config.train.micro_batch, config.train.global_batch) == (3, 2, 4)
    assert config.model.cluster == (4, 7, 7)
    assert config.train.epochs == 800


@pytest.mark.parametrize("root", [EvaluateConfig, EmbedConfig])
def test_a_short_flag_sets_its_field_also_if_it_has_the_name_of_a_section(root: type[RunConfig]) -> None:
    config, _ = read_config(root, ["--data", "/videos", "--data.stride", "3", "--views", "2x1"])
    assert (config.data.path, config.data.stride) == ("/videos", 3)
    assert config.model_dump()[root.precision_field.partition(".")[0]]["views"] == "2x1"


def test_a_whole_section_is_no_flag() -> None:
    with pytest.raises(
        ConfigError, match=r"--data x: data is a section; its fields are set, as in --data\.FIELD"
    ):
        read_config(PretrainConfig, ["--data", "x"])


def test_a_file_changes_fields_of_those_that_it_extends(tmp_path: Path) -> None:
    """In order, at any depth, relative to the file; the environment and flags still win over all of them."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "base.yaml").write_text("model: {cluster: [4, 7, 7], mask_ratio: 0.5}\n")
    (tmp_path / "methods" / "self.yaml").write_text("extends: base.yaml\nmodel: {mask_ratio: 0.6}\n")
    (tmp_path / "data.yaml").write_text("train: {epochs: 7, global_batch: 64}\nmodel: {mask_ratio: 0.9}\n")
    file = tmp_path / "run.yaml"
    file.write_text("extends: [data.yaml, methods/self.yaml]\ntrain: {epochs: 8}\nrun: {name: child}\n")
    config, _ = read_config(PretrainConfig, ["--config", str(file), "--run.seed", "5"])
    assert (config.model.cluster, config.model.mask_ratio) == ((4, 7, 7), 0.6)
    assert (config.train.epochs, config.train.global_batch) == (8, 64)
    assert (config.run.name, config.run.seed) == ("child", 5)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"run": "extends: none.yaml"}, "run.yaml: extends: none.yaml: No such file"),
        ({"run": "extends: run.yaml"}, "run.yaml leads back to run.yaml; no file may extend itself"),
        (
            {"run": "extends: [a.yaml]", "a": "extends: b.yaml", "b": "extends: ../DIR/a.yaml"},
            "extends: a.yaml: extends: b.yaml: extends: ../DIR/a.yaml leads back to a.yaml",
        ),
        ({"run": "extends: {a: b}"}, "extends: expected a file or a list of files, found {'a': 'b'}"),
        ({"run": "extends: a.yaml", "a": "model: {clutser: 1}"}, "model.clutser: unknown key"),
        ({"run": "extends: a.yaml", "a": "- model"}, "extends: a.yaml: expected sections such as"),
    ],
)
def test_what_is_wrong_with_an_extended_file_is_named(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(content.replace("DIR", tmp_path.name) + "\n")
    with pytest.raises(ConfigError) as caught:
        read_config(PretrainConfig, ["--config", str(tmp_path / "run.yaml")])
    assert expected.replace("DIR", tmp_path.name) in str(caught.value)


def test_a_file_extended_twice_is_no_loop(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {epochs: 7}\n")
    (tmp_path / "a.yaml").write_text("extends: base.yaml\n")
    (tmp_path / "run.yaml").write_text("extends: [a.yaml, base.yaml]\n")
    assert read_config(PretrainConfig, ["--config", str(tmp_path / "run.yaml")])[0].train.epochs == 7


def test_init_from_may_be_given_without_its_section() -> None:
    assert read_config(PretrainConfig, ["--init-from", "weights.pth"])[0].model.init_from == "weights.pth"
    assert (
        read_config(PretrainConfig, ["--init-from=weights.pth"])[0]
        == read_config(PretrainConfig, ["--model.init_from", "weights.pth"])[0]
    )


def test_config_file_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("run: {name: from-file}\n")
    monkeypatch.setenv("ARVIDEO_CONFIG", str(file))
    assert read_config(PretrainConfig, [])[0].run.name == "from-file"


def test_defaults_are_the_papers_kinetics_recipe() -> None:
    config, _ = read_config(PretrainConfig, [])
    assert config == PretrainConfig()
    assert (config.train.epochs, config.train.global_batch, config.data.stride) == (800, 2048, 4)
    assert (config.optim.betas, config.optim.weight_decay) == ((0.9, 0.95), 0.05)


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--model.clutser", "2,7,7"], {}, "--model.clutser"),
        ([], {"ARVIDEO__TRAIN__STEP": "3"}, "train.step: unknown key; train has epochs, steps"),
        ([], {"ARVIDEO__TRIAN__STEPS": "3"}, "there is no section 'trian'"),
        (["--model.cluster", "3,7,7"], {}, "accepted K_T: 1|2|4|8"),
        (["--model.tubelet", "3,16,16"], {}, "does not divide the clip (16, 224, 224)"),
        (["--model.tubelet", "1,1,1", "--model.image_size", "14"], {}, "set target_norm to none"),
        (["--train.steps", "many"], {}, "train.steps: Input should be a valid integer"),
        (["--train.zero_stage", "4"], {}, "train.zero_stage: Input should be less than or equal to 3"),
        (["--model.min_context_clusters", "16"], {}, "leaves nothing to predict"),
        (
            ["--decoder.self_attention", "true", "--decoder.target_ratio", "0.2"],
            {},
            "decoder: target_ratio 0.2 is refused together with self_attention",
        ),
        (["--config", "/nowhere/run.yaml"], {}, "/nowhere/run.yaml: No such file"),
        (["--cluster.workers", "[3,1]"], {}, "cluster.workers: expected [min,max], got [3, 1]: swap them"),
        ([], {"ARVIDEO__CLUSTER__WORKERS": "[0,2]"}, "expected a number above 0, or [min,max], got [0, 2]"),
        (["--cluster.workers", "many"], {}, "cluster.workers: expected a number above 0, or [min,max]"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(
    arguments: list[str], environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        read_config(PretrainConfig, arguments)
    assert expected in str(caught.value)


def test_unknown_keys_of_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {stpes: 1}\nmodle: {}\n")
    with pytest.raises(
        ConfigError, match=r"(?s)train\.stpes: unknown key.*modle: unknown key; sections are run"
    ):
        read_config(PretrainConfig, ["--config", str(file)])


MISTAKES = [
    (["--model.clutser", "2,7,7"], "--model.clutser"),
    (["--model.cluster", "3,7,7"], "does not divide the token grid"),
    (["--train.global_batch", "none"], "train.global_batch"),
    ([], "data.path is not set"),
    (["--data.path", "/nowhere"], "no data set at /nowhere"),
]


def test_mistakes_stop_before_ray_starts_with_exit_code_2() -> None:
    """All in one process: the libraries of one take longer than the mistakes."""
    script = (
        "import contextlib, io, json, sys\n"
        "from arvideo_dist.pretrain import main\n"
        "ended = []\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        try:\n            main(arguments)\n"
        "        except SystemExit as end:\n            ended.append((end.code, said.getvalue()))\n"
        "    assert 'ray' not in sys.modules and 'mlflow' not in sys.modules\n"
        "print(json.dumps(ended))\n"
    )
    given = json.dumps([arguments for arguments, _ in MISTAKES])
    done = subprocess.run([sys.executable, "-c", script, given], capture_output=True, text=True, check=True)
    ended = json.loads(done.stdout)
    assert len(ended) == len(MISTAKES)
    for (_, expected), (code, said) in zip(MISTAKES, ended, strict=True):
        assert code == 2, expected
        assert expected in said
        assert "Traceback" not in said


def test_dry_run_prints_the_derived_numbers_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dry-run", "--model.min_context_clusters", "2", "--cluster.workers", "3"])
    derived = json.loads(capsys.readouterr().out)
    assert (derived["encoder_tokens"], derived["decoder_queries"]) == (300, 1372)
    assert derived["peak_lr"] == pytest.approx(1.2e-3)
    assert derived["gflops_per_clip"] == pytest.approx(271.6, abs=0.05)
    assert derived["activation_mb_per_clip"] == pytest.approx(358.1, abs=0.05)
    # 2048 clips by 3 workers x 32: 22 passes with room for 2112
    assert (derived["accumulation_steps"], derived["padding_per_step"]) == (22, 64)
    assert derived["total_steps"] is None


def test_worker_range_is_planned_for_its_maximum_and_keeps_the_global_batch_at_any_count(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARVIDEO__CLUSTER__WORKERS", "[5,7]")
    config, _ = read_config(PretrainConfig, [])
    assert (config.cluster.min_workers, config.cluster.max_workers) == (5, 7)
    assert PretrainConfig.model_validate(config.model_dump(mode="json")) == config
    main(["--dry-run"])
    planned = Derived(**json.loads(capsys.readouterr().out))
    assert planned.world_size == 7
    for workers in (5, 6, 7):
        there = planned.at_world_size(workers)
        monkeypatch.setenv("ARVIDEO__CLUSTER__WORKERS", str(workers))
        assert there == derive(read_config(PretrainConfig, [])[0], samples=None)
        assert there.accumulation_steps * workers * 32 - there.padding_per_step == there.global_batch == 2048


def test_help_documents_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, field in PretrainConfig.model_fields.items():
        for name, info in field.annotation.model_fields.items():
            assert f"--{section}.{name}" in text
            assert info.description, f"{section}.{name} has no description"
            assert " ".join(info.description.split()) in text
