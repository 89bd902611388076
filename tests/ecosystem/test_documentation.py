"""The code blocks of the documentation that need other libraries."""

from __future__ import annotations

import documentation
import pytest
from documentation import HUB, OWN_PROCESS, PAGES, ROOT, SEVERAL_PROCESSES, python_blocks

ELSEWHERE = (HUB, SEVERAL_PROCESSES)
PAGES_WITH_LIBRARIES = [
    page for page in PAGES if any(block.needs not in ("", OWN_PROCESS, *ELSEWHERE) for block in python_blocks(page))
]


@pytest.mark.parametrize("page", PAGES_WITH_LIBRARIES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_run_in_turn(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documentation.run_blocks(page, [block for block in python_blocks(page) if block.needs not in ELSEWHERE])
