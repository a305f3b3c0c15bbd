"""A warm process is one of its own: what its caller gives it, what it gives back, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import warm

SAYS_ALL = """
import os, sys
print(sys.argv, os.getcwd(), os.environ.get("MINE"), os.environ.get("HOME"), __name__, sys.stdin.read())
print("torch" in sys.modules, len(os.listdir("/proc/self/task")), file=sys.stderr)
raise SystemExit(7)
"""


@pytest.mark.parametrize("python", ["warm", "cold"])
def test_arguments_files_environment_and_exit_code_are_the_processs_own(tmp_path: Path, python: str) -> None:
    executable = warm.python() if python == "warm" else sys.executable
    done = subprocess.run(
        [executable, "-u", "-c", SAYS_ALL, "a", "b c"],
        cwd=tmp_path,
        env={"MINE": "1"},
        input="typed",
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"['-c', 'a', 'b c'] {tmp_path} 1 None __main__ typed\n"
    assert done.returncode == 7
    assert done.stderr.split()[0] == str(python == "warm")


def test_it_ends_by_the_signal_and_its_output_with_it() -> None:
    process = warm.Process(["-c", "print('here'); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"here\n"
    assert psutil.pid_exists(process.pid)
    process.kill()
    assert process.stdout.read() == b""
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_what_is_done_to_its_stand_in_is_done_to_it(number: signal.Signals) -> None:
    code = "import os; print(os.getpid(), flush=True); input()"
    stand_in = subprocess.Popen(
        [warm.python(), "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert stand_in.stdout is not None
    pid = int(stand_in.stdout.readline())
    assert pid != stand_in.pid
    stand_in.send_signal(number)
    assert stand_in.wait() == -number
    assert stand_in.stdout.read() == b""


def test_programs_are_found_as_the_interpreter_does(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("said = 'beside'")
    (tmp_path / "script.py").write_text("import beside, sys; print(beside.said, sys.argv[1:], __file__)")
    for python in (warm.python(), sys.executable):
        script, module = (
            subprocess.run([python, *how, "x"], cwd=tmp_path, capture_output=True, text=True, check=True)
            for how in ([str(tmp_path / "script.py")], ["-m", "script"])
        )
        assert script.stdout == module.stdout == f"beside ['x'] {tmp_path}/script.py\n"


def test_a_sitecustomize_of_ones_own_is_run_before_all_imports(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; print('torch' in sys.modules)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.check_output([warm.python(), "-c", ""], env=environment) == b"False\n"


def test_an_error_is_told_and_ends_it() -> None:
    done = subprocess.run([warm.python(), "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


def test_files_that_a_caller_hands_down_are_no_files_of_the_libraries() -> None:
    """What a library opens as it is imported gets the lowest number that is free then."""
    ends = os.pipe()
    many = [os.dup(ends[0]) for _ in range(60)]
    code = "import os, uuid; import ray; print(ray.ObjectRef.from_random() is not None)"
    done = subprocess.run([warm.python(), "-c", code], pass_fds=many, capture_output=True, text=True)
    for fd in (*ends, *many):
        os.close(fd)
    assert done.stdout == "True\n", done.stderr


def test_each_draws_random_numbers_of_its_own() -> None:
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    drawn = {subprocess.check_output([warm.python(), "-c", code]) for _ in range(3)}
    assert len(drawn) == 3
