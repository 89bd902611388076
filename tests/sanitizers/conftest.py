"""The sanitized packages, each built once for all tests."""

from __future__ import annotations

from functools import cache

import pytest
from sanitizers import sanitized


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """Gives the folder of the package whose kernels are built with a sanitizer."""
    return cache(lambda sanitizer: sanitized.build(sanitizer, tmp_path_factory.mktemp("sanitized")))
