"""Makes a notebook of each tutorial: `python docs/notebooks.py examples/notebooks`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parent / "tutorials"
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.M | re.S)
LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]*\)")


def notebook_of(page: Path) -> dict[str, Any]:
    """Text and code in turn; links to other pages become plain text."""
    cells: list[dict[str, Any]] = []
    for index, part in enumerate(BLOCK.split(page.read_text())):
        text = part.strip("\n") if index % 2 else LINK.sub(r"\1", part).strip("\n")
        if not text:
            continue
        cell: dict[str, Any] = {"id": f"cell-{index}", "metadata": {}, "source": text.splitlines(keepends=True)}
        if index % 2:
            cells.append({"cell_type": "code", "execution_count": None, "outputs": [], **cell})
        else:
            cells.append({"cell_type": "markdown", **cell})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for page in sorted(TUTORIALS.glob("*.md")):
        content = json.dumps(notebook_of(page), indent=1, ensure_ascii=False) + "\n"
        (folder / f"{page.stem}.ipynb").write_text(content)


if __name__ == "__main__":
    main()
