"""What the deployment's tests share."""

from __future__ import annotations

import os

import pytest

from arvideo_dist.config.settings import CONFIG_ENV, ENV_PREFIX


@pytest.fixture(autouse=True)
def _no_outer_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell's own ARVIDEO settings must not decide what a file under test resolves to."""
    for name in list(os.environ):
        if name.startswith(ENV_PREFIX) or name == CONFIG_ENV:
            monkeypatch.delenv(name)
