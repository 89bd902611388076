"""Which tests need a compiler that a machine may lack: there they are skipped, in CI they fail."""

from __future__ import annotations

import os
import shutil

import pytest

VARIABLE = "BNB_TEST_COMPILERS"


def needs(*tools: str, remedy: str) -> pytest.MarkDecorator:
    """Skip where one of the tools is missing; with ``BNB_TEST_COMPILERS=required`` the tests run there, and fail."""
    missing = [tool for tool in tools if shutil.which(tool) is None]
    required = os.environ.get(VARIABLE) == "required"
    return pytest.mark.skipif(bool(missing) and not required, reason=f"needs {', '.join(missing)}: {remedy}")
