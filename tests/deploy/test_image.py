"""The Dockerfile and its context against the project: what it copies, pins, runs as and must contain."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RULES = [
    re.sub(r"\s+", " ", line)
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    if line and not line.startswith("#")
]
RUNTIME = RULES[max(i for i, rule in enumerate(RULES) if rule.startswith("FROM")) :]


def hadolint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    linter = Path(sys.executable).with_name("hadolint")
    return subprocess.run([str(linter), "-"], input=dockerfile, capture_output=True, text=True, check=False)


def test_dockerfile_passes_hadolint() -> None:
    result = hadolint(DOCKERFILE)
    assert result.returncode == 0, result.stdout + result.stderr


def test_hadolint_notices_a_cached_unpinned_install() -> None:
    result = hadolint(DOCKERFILE.replace("USER 1000:1000", "RUN pip install numpy"))
    assert result.returncode == 1
    assert "DL3013" in result.stdout
    assert "DL3042" in result.stdout


def test_every_dependency_is_pinned_and_none_is_named_twice() -> None:
    """The dependencies come from pyproject.toml; only torch is named here, for the choice of its build."""
    pins = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in _lines("constraints.txt")}
    wanted = [re.match(r"[A-Za-z0-9._-]+", spec) for spec in PYPROJECT["dependencies"]]
    assert {re.sub(r"[-_.]+", "-", match[0]).lower() for match in wanted if match} <= pins
    installs = [rule for rule in RULES if re.search(r"pip (install|wheel)", rule)]
    assert len(installs) == 4
    for rule in installs:
        assert "--constraint /constraints.txt" in rule or "--no-deps" in rule
    named = [word for rule in installs for word in rule.split() if word in pins]
    assert named == ["torch"]


def test_image_has_what_kuberay_and_torch_need_at_run_time() -> None:
    packages = " ".join(rule for rule in RUNTIME if "apt-get install" in rule).split()
    assert {"bash", "g++"} <= set(packages)
    (ray,) = [spec for spec in PYPROJECT["dependencies"] if spec.startswith("ray")]
    assert "default" in re.findall(r"\w+", ray)
    assert not [rule for rule in RULES if rule.startswith("HEALTHCHECK")]


def test_image_runs_as_a_number_that_is_not_root() -> None:
    (user,) = [rule.split()[1] for rule in RUNTIME if rule.startswith("USER")]
    uid, gid = map(int, user.split(":"))
    assert uid > 0
    assert gid > 0
    (account,) = [rule for rule in RUNTIME if "useradd" in rule]
    assert f"--uid {uid} --gid {gid}" in account
    assert RUNTIME.index(f"USER {user}") > max(
        i for i, r in enumerate(RUNTIME) if r.startswith(("RUN", "COPY"))
    )


def test_labels_and_base_agree_with_the_project() -> None:
    (label,) = [rule for rule in RUNTIME if rule.startswith("LABEL")]
    assert f'org.opencontainers.image.version="{PYPROJECT["version"]}"' in label
    assert f'org.opencontainers.image.title="{PYPROJECT["name"]}"' in label
    (base,) = [rule for rule in RULES if rule.startswith("ARG BASE=")]
    minimum = PYPROJECT["requires-python"].removeprefix(">=")
    assert re.search(rf"python:{re.escape(minimum)}-", base)


def test_context_holds_what_is_copied_and_nothing_else() -> None:
    sources = {
        source
        for rule in RULES
        if rule.startswith("COPY") and "--from=" not in rule
        for source in rule.split()[1:-1]
    }
    lines = _lines(".dockerignore")
    assert lines[0] == "*"
    assert sources == {line[1:] for line in lines if line.startswith("!")}
    packages = {"arvideo_dist", "data_prep"}
    assert sources == packages | {"pyproject.toml", "constraints.txt", "jobs", PYPROJECT["readme"]}


@pytest.mark.parametrize("change", ["arvideo_dist", "data_prep", "jobs", "README.md"])
def test_change_of_sources_leaves_the_dependencies_cached(change: str) -> None:
    stages = re.split(r"(?=^FROM )", "\n".join(RULES), flags=re.MULTILINE)
    (dependencies,) = [stage for stage in stages if " AS dependencies" in stage]
    assert change not in dependencies
    assert "pyproject.toml" not in dependencies


def _lines(name: str) -> list[str]:
    return [x for x in (ROOT / name).read_text().splitlines() if x and not x.startswith("#")]
