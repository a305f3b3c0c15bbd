"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real videos and annotations beside the checkout; skips where it is absent."""
    for candidate in (ROOT.parent / "shared", ROOT.parent.parent / "shared"):
        if (candidate / "videos").is_dir():
            return candidate
    pytest.skip("real clips are absent: this test needs shared/videos beside the checkout")
