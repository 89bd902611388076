"""The code blocks of README.md and docs/, for the tests that run them.

A comment on the line before a block says what is special about it: `<!-- needs: transformers -->` leaves it to the
ecosystem tests, `<!-- needs: a process of its own -->` to a test that starts one, `<!-- needs: a model from the
hub -->` to nobody, `<!-- needs: several processes -->` to tests/distributed, and `<!-- before:
statements -->` runs these first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"(?:<!-- (?P<kind>needs|before): (?P<what>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)
HUB = "a model from the hub"
OWN_PROCESS = "a process of its own"
SEVERAL_PROCESSES = "several processes"


class Block(NamedTuple):
    """A code block of a page."""

    language: str
    text: str
    line: int
    needs: str
    before: str


def blocks_of(page: Path) -> list[Block]:
    content = page.read_text()
    return [
        Block(
            match["language"],
            match["text"],
            content[: match.start("text")].count("\n"),
            match["what"] if match["kind"] == "needs" else "",
            match["what"] if match["kind"] == "before" else "",
        )
        for match in BLOCK.finditer(content)
    ]


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language == "python"]


def run_blocks(page: Path, blocks: list[Block]) -> None:
    """One after the other, in one namespace, as somebody who reads the page would; errors have the page's lines."""
    names: dict[str, object] = {"__name__": "documentation"}
    for block in blocks:
        exec(block.before, names)
        exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
