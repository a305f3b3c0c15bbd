"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.services.s3 import S3

ROOT = Path(__file__).resolve().parent.parent


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
