"""Helpers end within their limits, whatever they do, and say which one they met."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_prep.errors import Interrupted
from data_prep.isolation import Limits, Prober, run
from tests.data_prep.videos import make


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "cpu_s", "words", "outside"),
    [
        ("while True: pass", 0.5, "takes more than", False),
        ("import time; time.sleep(600)", 0.05, "no end after", False),
        ("import os; os.kill(os.getpid(), 11)", 30, "ended by SIGSEGV", False),
        ("import os; os.kill(os.getpid(), 9)", 30, "ended by SIGKILL", True),
    ],
)
def test_a_helper_that_is_ended_says_why(code: str, cpu_s: float, words: str, outside: bool) -> None:
    with pytest.raises(Interrupted, match=words) as caught:
        run(python(code), Limits(cpu_s=cpu_s))
    assert caught.value.outside == outside


def test_memory_is_bounded() -> None:
    status, log = run(python("bytearray(2**31)"), Limits(memory=2**29))
    assert status == 1
    assert "MemoryError" in log


def test_a_flood_of_messages_is_cut_off() -> None:
    status, log = run(python("import sys\nfor _ in range(5000): sys.stderr.write('x' * 1000)"), Limits())
    assert (status, len(log)) == (0, 2**20)


def test_a_helper_that_stops_reading_is_no_error_of_the_writer() -> None:
    status, _ = run(python("raise SystemExit(3)"), Limits(), feed=lambda pipe: pipe.write(bytes(10**7)))
    assert status == 3


def test_a_reader_that_dies_is_replaced(tmp_path: Path) -> None:
    video = make(tmp_path / "in.mp4")
    prober = Prober(Limits())
    try:
        assert prober.source(str(video)).packets == 15
        assert prober._process
        prober._process.kill()
        with pytest.raises(Interrupted, match="SIGKILL"):
            prober.source(str(video))
        assert prober.source(str(video)).packets == 15
    finally:
        prober.close()
