"""Stacks of a process that cannot or will not help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from arvideo_dist import stacks

# A regular expression that backtracks for ever, within C code that holds Python's lock.
_HANGS = """
import re, sys, threading
from arvideo_dist import stacks
stacks.keep_ready()
def deep_in_a_library():
    print("ready", flush=True)
    re.match("(a+)+$", "a" * 40 + "b")
def waits():
    threading.Event().wait()
threading.Thread(target=waits, daemon=True).start()
deep_in_a_library()
"""


@pytest.fixture
def hung() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", _HANGS], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_all_threads_of_a_process_that_holds_pythons_lock_are_seen(hung: subprocess.Popen) -> None:
    for _ in range(2):  # the second time as well, and then only what is new
        found = stacks.of_tree(hung.pid)
        assert f"process {hung.pid}, running" in found
        assert found.count("in deep_in_a_library") == 1
        assert found.count("in waits") == 1


def test_a_stopped_process_is_said_to_be_stopped(hung: subprocess.Popen) -> None:
    hung.send_signal(signal.SIGSTOP)
    os.waitpid(hung.pid, os.WUNTRACED)
    found = stacks.of_tree(hung.pid)
    assert f"process {hung.pid}, stopped" in found
    assert "no stacks within" in found


def test_a_process_that_has_ended_is_named() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert f"process {process.pid}" in stacks.of_tree(process.pid)
