"""Runs of the command line for the tests, and what to compare them by."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--width", "32", "--height", "32", "--frames", "8")


def prepare(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["data_prep", *map(str, arguments)])
    try:
        return main()
    except SystemExit as end:
        return int(end.code or 0)


def spawn(*arguments: object, **environment: str) -> subprocess.Popen[bytes]:
    """The command line as a process of its own."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | environment,
        # A shell starts background jobs with SIGINT ignored, which children inherit: not what is tested.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def digests(folder: Path) -> dict[str, str]:
    """Names and contents of everything that was published; no leftovers may stand beside it."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".lock"))
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
