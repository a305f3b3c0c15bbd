"""Helpers end within their limits, whatever they do, and say which one they met."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from data_prep.errors import Interrupted
from data_prep.isolation import Limits, Prober, run
from data_prep.transcode import ffmpeg
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


ENDLESS = ("-hide_banner", "-nostdin", "-f", "lavfi", "-i", "testsrc2=s=640x480", "-f", "null", "-")


def test_an_encoder_at_its_limit_says_so_although_it_ends_by_itself() -> None:
    """ffmpeg takes SIGXCPU for a wish to end, and ends with status 255."""
    with pytest.raises(Interrupted, match="takes more than 1 s of CPU time") as caught:
        run([ffmpeg()[0], *ENDLESS], Limits(cpu_s=1))
    assert not caught.value.outside


def test_an_encoder_that_is_told_to_end_is_no_fault_of_its_input() -> None:
    def tell_it_to_end(_: object) -> None:
        (child,) = (child for child in psutil.Process().children() if "-re" in child.cmdline())
        while not catches(child):
            pass
        child.terminate()

    with pytest.raises(Interrupted, match="ended by a signal") as caught:
        run([ffmpeg()[0], "-re", *ENDLESS[2:]], Limits(cpu_s=30), feed=tell_it_to_end)
    assert caught.value.outside


def catches(child: psutil.Process) -> bool:
    """Whether the process has a handler of its own for SIGTERM."""
    status = Path(f"/proc/{child.pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_memory_is_bounded() -> None:
    status, log = run(python("bytearray(2**31)"), Limits(memory=2**29))
    assert status == 1
    assert "MemoryError" in log


def test_a_flood_of_messages_is_cut_off() -> None:
    code = "import sys\nfor number in range(5000): sys.stderr.write(str(number) + 'x' * 1000)"
    status, log = run(python(code), Limits())
    assert (status, len(log)) == (0, 2**20 + 1)
    assert log.startswith("0xxx")
    assert "4999x" in log, "why it ended stands at the end"


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
