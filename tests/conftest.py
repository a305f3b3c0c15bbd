"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import warm

if TYPE_CHECKING:
    from tests.services.s3 import S3

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    # Tests run beside each other, and so do the ranks in them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warm.begin_session(cold=bool(config.getoption("--faults-json", None)))
    # Two runs that start at once would both take this port for free; where it is taken, each asks for another.
    with suppress(OSError):
        config.add_cleanup(socket.create_server(("127.0.0.1", 8265)).close)


# Whole runs first, so that at the end no process is left with minutes of work while another has none.
LONG = (
    "tests/faults",
    "tests/train/test_run.py",
    "tests/test_pipeline.py",
    "tests/test_job_submit.py",
    "tests/launch/test_elastic.py",
    "tests/train/samples/test_bad_steps.py",
    "tests/data_prep/test_kill_points.py",
    "tests/train/checkpoint/test_failed_saves.py",
    "tests/data/test_loader.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = str(item.path.relative_to(ROOT))
        return next((number for number, long in enumerate(LONG) if name.startswith(long)), len(LONG))

    items.sort(key=place)


def pytest_unconfigure() -> None:
    warm.end_session()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real videos and annotations beside the checkout; skips where it is absent."""
    for candidate in (ROOT.parent / "shared", ROOT.parent.parent / "shared"):
        if (candidate / "videos").is_dir():
            return candidate
    pytest.skip("real clips are absent: this test needs shared/videos beside the checkout")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """One server for all: a test module takes a bucket of its own."""
    from tests.services.s3 import s3_server  # moto takes seconds to import

    with s3_server() as server:
        yield server
