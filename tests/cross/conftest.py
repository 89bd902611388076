"""What the portable kernels give on this machine, to which others are held."""

from __future__ import annotations

import pytest
from cross.programs import build, lines


@pytest.fixture(scope="session")
def here(tmp_path_factory) -> list[str]:
    return lines(str(build(["g++"], "unknown", tmp_path_factory.mktemp("here") / "build")), "portable")
