"""The stages of a pipeline: what each runs, what it makes, and whether that is there already."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from arvideo_dist.config.commands import (
    EmbedConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    SequenceConfig,
    TrainingConfig,
)
from arvideo_dist.config.folder import run_folder
from arvideo_dist.config.settings import ENV_PREFIX, read_config
from arvideo_dist.storage import Storage
from arvideo_dist.train.run.stop import RESULT

MODULES = {
    "data_prep": "data_prep",
    "pretrain": "arvideo_dist.pretrain",
    "finetune": "arvideo_dist.finetune",
    "evaluate": "arvideo_dist.evaluate",
    "embed": "arvideo_dist.embed",
}
_TRAININGS: dict[str, type[TrainingConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
_OF_A_RUN: dict[str, type[SequenceConfig]] = {"evaluate": EvaluateConfig, "embed": EmbedConfig}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z0-9_]*)")
_REFERENCE = re.compile(r"\{([A-Za-z0-9_-]+)\}")


@dataclass(frozen=True)
class Stage:
    """One command. `inputs`: of each stage that it names, the digest of what that has made."""

    name: str
    command: str
    arguments: tuple[str, ...]
    inputs: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return shlex.join(["python", "-m", MODULES[self.command], *self.arguments])

    def resolved(self, made: Mapping[str, Made]) -> Stage:
        """With what earlier stages made in place of `{stage}`."""
        named = {found for word in self.arguments for found in _REFERENCE.findall(word)}
        words = (_REFERENCE.sub(lambda found: made[found[1]].output, word) for word in self.arguments)
        return replace(self, arguments=tuple(words), inputs={name: made[name].content for name in named})

    @cached_property
    def digest(self) -> str:
        """Of command, settings and inputs. Raises ValueError if the settings are not valid."""
        settings: Any = {}
        if self.command != "data_prep":
            settings = {name: value for name, value in os.environ.items() if name.startswith(ENV_PREFIX)}
        if (root := _TRAININGS.get(self.command)) is not None:
            settings = read_config(root, list(self.arguments))[0].model_dump(mode="json")
        content = json.dumps([self.command, self.arguments, settings, dict(self.inputs)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def check(self) -> None:
        """Raises ValueError for what the command would refuse at once, as far as that costs nothing."""
        assert self.digest
        if self.command not in _OF_A_RUN:  # for those, seconds
            assert self.output()
        assert self.file()

    def output(self) -> str:
        """The folder of the data set or run that the command makes. Raises ValueError if it says none."""
        if self.command == "data_prep":
            return Storage(_option(self.arguments, "--out")).address
        if (root := _TRAININGS.get(self.command)) is not None:
            return run_folder(read_config(root, list(self.arguments))[0]).address
        command: Any = importlib.import_module(MODULES[self.command])  # imports torch
        parser = argparse.ArgumentParser()
        command.add_source(parser)
        given = read_config(_OF_A_RUN[self.command], list(self.arguments), parser)
        return run_folder(command.of_source(*given)).address

    def file(self) -> str:
        """In its output, what is there once the command has ended."""
        return f"dataset-{_option(self.arguments, '--split')}.json" if self.command == "data_prep" else RESULT


def _option(words: tuple[str, ...], name: str) -> str:
    for place, word in enumerate(words):
        if word == name and place + 1 < len(words):
            return words[place + 1]
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    raise ValueError(f"{name} is missing")


@dataclass(frozen=True)
class Pipeline:
    name: str
    folder: Path
    stages: tuple[Stage, ...]


def read_pipeline(file: Path) -> Pipeline:
    """Raises ValueError for what is no pipeline, with what would be; OSError if the file cannot be read."""
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or content.keys() != {"folder", "stages"}:
        raise ValueError(f"{file}: it has `folder` and `stages`, and nothing else")
    if not isinstance(content["stages"], dict) or not content["stages"]:
        raise ValueError(
            f"{file}: stages: names with a command each, such as `pretrain: pretrain --run.name a`"
        )
    stages: list[Stage] = []
    for name, command in content["stages"].items():
        stages.append(_read_stage(f"{file}: stages.{name}", str(name), command, [s.name for s in stages]))
    folder = os.path.expandvars(content["folder"])
    if unset := _VARIABLE.search(folder):
        raise ValueError(f"{file}: folder: the environment has no {unset[1]}")
    return Pipeline(file.stem, Path(folder).absolute(), tuple(stages))


def _read_stage(where: str, name: str, command: Any, before: list[str]) -> Stage:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: a name has letters, digits, - and _")
    try:
        words = shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: a command line, or a list of its words ({error})") from error
    words = [os.path.expandvars(word) for word in words]
    if unset := [found for word in words for found in _VARIABLE.findall(word)]:
        raise ValueError(f"{where}: the environment has no {unset[0]}")
    if not words or words[0] not in MODULES:
        raise ValueError(f"{where}: {' '.join(words[:1])!r} is no command; there are {', '.join(MODULES)}")
    for unknown in (found for word in words for found in _REFERENCE.findall(word) if found not in before):
        raise ValueError(
            f"{where}: {{{unknown}}} is no stage before it; there are {', '.join(before) or 'none'}"
        )
    return Stage(name, words[0], tuple(words[1:]))


@dataclass(frozen=True)
class Made:
    """What a stage has made."""

    digest: str  # of the stage
    output: str
    content: str  # digest of the file that ends it


class Ledger:
    """What has ended, in `pipeline.json` of the pipeline's folder; replaced whole at each change."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = folder / "pipeline.json"
        self._kept: dict[str, Any] = {"stages": {}, "process": None, "job": None, "mlflow_run_id": None}
        if self._file.exists():
            self._kept |= json.loads(self._file.read_text())

    @property
    def made(self) -> dict[str, Made]:
        """By stage, of those that have ended once."""
        return {name: Made(**entry) for name, entry in self._kept["stages"].items()}

    def is_complete(self, stage: Stage) -> bool:
        made = self.made.get(stage.name)
        return (
            made is not None
            and made.digest == stage.digest
            and Storage(made.output).exists(stage.file())
            and _content(made.output, stage.file()) == made.content
        )

    def ended(self, stage: Stage) -> None:
        """ValueError if the stage's command has left nothing."""
        output = stage.output()
        if not Storage(output).exists(stage.file()):
            raise ValueError(f"the command has ended, but {output}/{stage.file()} is not there")
        made = Made(stage.digest, output, _content(output, stage.file()))
        self._kept["stages"][stage.name] = asdict(made)
        self._write()

    def get(self, name: str) -> Any:
        """`process` or Ray `job` that runs a stage, `mlflow_run_id` of the pipeline; None if there is none."""
        return self._kept[name]

    def set(self, name: str, value: Any) -> None:
        self._kept[name] = value
        self._write()

    def _write(self) -> None:
        aside = self._file.with_suffix(".partial")
        aside.write_text(json.dumps(self._kept, indent=1))
        os.replace(aside, self._file)


def _content(output: str, file: str) -> str:
    return hashlib.sha256(Storage(output).read_bytes(file)).hexdigest()
