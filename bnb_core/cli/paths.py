"""Options that name a file or a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class PathOption(click.Path):
    """A path; an empty one, as an unset variable of a shell gives, is refused and not taken for the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):
            self.fail("expected a path, got ''", param, ctx)
        return super().convert(value, param, ctx)
