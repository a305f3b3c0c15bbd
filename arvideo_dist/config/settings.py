"""How a command's configuration is read.

Order, later wins: the defaults of the command's root (`commands.py`), a YAML file (`--config FILE`, or the file
that `ARVIDEO_CONFIG` names), the environment (`ARVIDEO__SECTION__FIELD`), the command line
(`--section.field value`). Unknown keys are refused everywhere. What the user did wrong is a ConfigError,
before anything else happens.

A YAML file may begin with `extends: FILE` or a list of files, relative to itself: it changes single fields of
theirs, and later ones those of earlier ones. A list such as `model.cluster` is one field.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from arvideo_dist.config.commands import ROOTS, RunConfig

ENV_PREFIX = "ARVIDEO__"
CONFIG_ENV = "ARVIDEO_CONFIG"

Root = TypeVar("Root", bound=RunConfig)


class ConfigError(ValueError):
    """What the user set is not a valid configuration; the message names the field and the remedy."""


class _Sources(BaseSettings):
    """A root as pydantic-settings fills it from its sources; never leaves this module."""

    model_config = SettingsConfigDict(
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        cli_parse_none_str="null",
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_use_class_docs_for_groups=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the command line goes before these by itself


def read_config(
    root: type[Root], argv: list[str], parser: argparse.ArgumentParser | None = None
) -> tuple[Root, argparse.Namespace]:
    """The resolved configuration of a command and the command's own flags.

    `root`: the command's (`commands.py`). `argv`: arguments without the program's name. `parser`: holds the
    command's own flags; this function adds `--config` and a flag for every field. Raises ConfigError.
    """
    parser = parser or argparse.ArgumentParser()
    parser.add_argument(
        "--config", metavar="FILE", default=os.environ.get(CONFIG_ENV), help=f"YAML file [${CONFIG_ENV}]"
    )
    parser.exit_on_error = parser.allow_abbrev = False
    parser.error = _raise_config_error  # type: ignore[method-assign]
    try:
        base = type("Sources", (_Sources,), {"model_config": {"cli_shortcuts": root.shortcuts}})
        sources: Any = create_model(root.__name__, __base__=(root, base), __doc__=root.__doc__)
        read_flags: Any = CliSettingsSource  # whose annotations ask for a class that is written out
        command_line = read_flags(sources, root_parser=parser)
        flags = parser.parse_args(argv)
        filled = sources(
            _cli_settings_source=command_line(parsed_args=_only_fields(root, flags)),
            **_read_yaml(flags.config),
        )
    except ValidationError as error:
        raise ConfigError(_explain(root, error)) from error
    except SettingsError as error:
        raise ConfigError(
            f"{error}: {error.__cause__}; lists are written as JSON, such as [2,7,7]"
        ) from error
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    _refuse_unknown_environment()
    return root.model_validate(filled.model_dump(exclude_unset=True)), flags


def _raise_config_error(message: str) -> NoReturn:
    raise ConfigError(f"{message} (--help lists every field)")


def _only_fields(root: type[RunConfig], flags: argparse.Namespace) -> dict[str, Any]:
    """The fields among the command's flags.

    A flag of a section's own name, which pydantic-settings takes for the whole section, is the shortcut of one of
    its fields, if the root says so.
    """
    sections = tuple(f"{name}." for name in root.model_fields)
    fields = {key: value for key, value in vars(flags).items() if key.startswith(sections)}
    long_names = {short: field for field, short in root.shortcuts.items()}
    for name in root.model_fields:
        if (value := getattr(flags, name, None)) is None:
            continue
        if name not in long_names:
            raise ConfigError(
                f"--{name} {value}: {name} is a section; its fields are set, as in --{name}.FIELD"
            )
        fields[long_names[name]] = value
    return fields


def _read_yaml(file: str | None) -> dict[str, Any]:
    return {} if file is None else _read_extended(Path(file), f"--config {file}", ())


def _read_extended(file: Path, named: str, below: tuple[Path, ...]) -> dict[str, Any]:
    """The sections of `file` over those of the files that it extends; `below`: the files that led here."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ConfigError(f"{named}: {error.strerror or error}; give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{named} is not valid YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{named}: expected sections such as `train:`, found {type(content).__name__}")
    bases = content.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{named}: extends: expected a file or a list of files, found {bases!r}")
    below = (*below, file.resolve())
    merged: dict[str, Any] = {}
    for base in bases:
        path = file.parent / base
        if path.resolve() in below:
            raise ConfigError(
                f"{named}: extends: {base} leads back to {path.name}; no file may extend itself"
            )
        merged = _overlay(merged, _read_extended(path, f"{named}: extends: {base}", below))
    return _overlay(merged, content)


def _overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields that `changes` names replaced, at any depth."""
    merged = dict(base)
    for name, value in changes.items():
        both_are_sections = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _overlay(base[name], value) if both_are_sections else value
    return merged


def _refuse_unknown_environment() -> None:
    """Commands that share an environment have sections of their own: one that any of them has is no mistake."""
    known = list(dict.fromkeys(name for root in ROOTS.values() for name in root.model_fields))
    for name in os.environ:
        if name.upper().startswith(ENV_PREFIX):
            section = name[len(ENV_PREFIX) :].split("__")[0].lower()
            if section not in known:
                raise ConfigError(
                    f"environment variable {name}: there is no section {section!r}; "
                    f"sections are {', '.join(known)}"
                )


def _explain(root: type[RunConfig], error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"]) or "configuration"
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key; {_known_keys(root, problem['loc'])}")
        elif problem["type"] == "value_error":
            lines.append(f"{where}: {message}")
        else:
            lines.append(f"{where}: {message} (got {problem['input']!r})")
    return "\n".join(lines)


def _known_keys(root: type[RunConfig], location: tuple[int | str, ...]) -> str:
    """What the innermost section of `location` has."""
    section: type[BaseModel] = root
    names = []
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            break
        section = field.annotation
        names.append(str(part))
    known = ", ".join(section.model_fields)
    return f"{'.'.join(names)} has {known}" if names else f"sections are {known}"


def exit_with(error: Exception, code: int) -> NoReturn:
    """End a command with the message alone: code 2 for what the user set wrong, 1 for a run that failed, 75
    (EX_TEMPFAIL) for one that was asked to end, or lost its storage, and goes on when started again."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)
