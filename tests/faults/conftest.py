"""The data, the uninterrupted runs, and the table of what each fault cost (`--faults-json PATH`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arvideo_dist.hardware import environment, write_json
from tests.faults.runs import SAVE_EVERY, STEPS, Layout, Run, check_nothing_was_lost, write_run
from tests.train.runs import make_data


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults-json",
        type=Path,
        help="result file for the table of faults, time lost and result; no process is warm then",
    )


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_data(folder / "data")
    return folder


@pytest.fixture(scope="session")
def whole(folder: Path) -> Callable[[Layout, int], Run]:
    """The uninterrupted run of a layout and length, made once. When it saves makes no difference."""
    runs: dict[tuple[Layout, int], Run] = {}

    def whole(layout: Layout, steps: int) -> Run:
        if (layout, steps) not in runs:
            name = f"whole-{layout}-{steps}-steps"
            run = write_run(folder, str(folder / "data"), name, layout, steps=steps)
            command = run.start()
            assert command.finish() == 0, command.output
            run.points = run.history()
            runs[layout, steps] = run
        return runs[layout, steps]

    return whole


class Table:
    """Written after every fault, since all of them together take more than an hour."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._rows = file, list[dict[str, Any]]()
        self._head = {
            **environment(),
            "subject": "faults",
            "configuration": {"steps": STEPS, "checkpoint_every_steps": SAVE_EVERY},
        }

    def note(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if self._file:
            write_json(self._file, {**self._head, "faults": self._rows})


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    return Table(request.config.getoption("--faults-json"))


@pytest.fixture
def survived(
    table: Table, whole: Callable[[Layout, int], Run], request: pytest.FixtureRequest
) -> Iterator[Any]:
    """Call it with the run that a fault was done to and the fault's name: checks the run and notes the fault.

    Time lost is the wall time of all the run's commands over that of the uninterrupted run, so it holds the steps
    that were done again, and the length of an outage that the run had to wait for.
    """
    noted = []

    def survived(run: Run, fault: str, commands: int = 1) -> None:
        reference = whole(run.layout, run.steps)
        row = {
            "fault": fault,
            "workers": run.layout.workers,
            "zero_stage": run.layout.stage,
            "commands": commands,
            "time_lost_s": round(run.seconds - reference.seconds, 1),
            "result": "failed",
        }
        noted.append(row)
        try:
            check_nothing_was_lost(run, reference)
            row["result"] = "places once, losses bit-equal, points once"
        finally:
            table.note(row)

    yield survived
    assert noted, "the fault was noted"
