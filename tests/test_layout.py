"""The structure of the code: imports run downwards and never in a circle, files and functions stay short."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the bottom up; a module imports from its own line and those before. What stands in no line is a command.
LAYERS = (
    ("s3", "storage", "processes", "stacks", "hardware", "threads"),
    ("data",),
    ("config",),
    ("model",),
    ("tasks",),
    ("train",),
    ("checks",),
    ("launch",),
)
KNOW_NO_CLUSTER = ("model", "tasks", "data", "config")  # nor DeepSpeed, nor MLflow
RAY_ONLY_IN = ("launch", "checks")
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 500, 80


def sources(*tops: str) -> dict[str, Path]:
    """Dotted name to file of all modules below `tops`."""
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for top in tops
        for file in sorted((ROOT / top).rglob("*.py"))
    }


MODULES = sources("arvideo_dist", "data_prep")


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports anywhere: also inside functions, also for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows() -> dict[str, set[str]]:
    """Each module with those of this project that it imports."""
    found = {}
    for name, file in MODULES.items():
        names = set(imported(ast.parse(file.read_text())))
        own = {each if each in MODULES else each.rpartition(".")[0] for each in names}
        found[name] = {each for each in own if each in MODULES} - {name}
    return found


def layer(module: str) -> int:
    package, _, rest = module.partition(".")
    if package != "arvideo_dist":
        return len(LAYERS)
    first = rest.partition(".")[0]
    return next((number for number, names in enumerate(LAYERS) if first in names), len(LAYERS))


def test_imports_run_downwards() -> None:
    upwards = [
        f"{module} imports {other}"
        for module, others in arrows().items()
        for other in others
        if module != "arvideo_dist" and layer(other) > layer(module)
    ]
    assert not upwards, "\n".join(sorted(upwards))


def test_no_imports_in_a_circle() -> None:
    try:
        graphlib.TopologicalSorter(arrows()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_packages_of_a_layer_import_each_other_in_one_direction() -> None:
    """Also between the folders of train/: of two of them one stands above the other."""
    between: dict[str, set[str]] = {}
    for module, others in arrows().items():
        for other in others:
            a, b = module.rpartition(".")[0], other.rpartition(".")[0]
            # Beside the packages stand commands, and files below all.
            if a != b and "arvideo_dist" not in (a, b):
                between.setdefault(a, set()).add(b)
    try:
        graphlib.TopologicalSorter(between).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_launch_and_checks_know_ray() -> None:
    wrong = []
    for name, file in MODULES.items():
        part = name.split(".")[1] if name.startswith("arvideo_dist.") else ""
        libraries = {each.partition(".")[0] for each in imported(ast.parse(file.read_text()))}
        if part in KNOW_NO_CLUSTER and libraries & {"ray", "deepspeed", "mlflow"}:
            wrong.append(name)
        if part and "ray" in libraries and part not in RAY_ONLY_IN:
            wrong.append(name)
    assert not wrong


def test_files_and_functions_can_be_read() -> None:
    long = []
    for name, file in {**MODULES, **sources("benchmarks")}.items():
        text = file.read_text()
        if (lines := text.count("\n")) > MOST_LINES:
            long.append(f"{name} has {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{name}.{node.name} has {lines} lines")
    assert not long, "\n".join(long)
