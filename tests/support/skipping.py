"""Skips a test whose service or program is missing, and fails it if the variable CI is set."""

from __future__ import annotations

import os

import pytest


def missing(reason: str) -> None:
    """Skip the test, or fail it if the variable CI is set."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
