"""The answer to who asks importlib.metadata for the distribution ``bitsandbytes``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, DistributionFinder, distributions
from importlib.metadata import metadata as metadata_of
from pathlib import Path
from typing import Any

from bnb_core.compat.names import NAME, VERSION


class FaceDistribution(Distribution):
    """A distribution without files, which this process alone sees."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            summary = metadata_of("bnb_core")["Summary"]
            return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nSummary: {summary}\n"
        return f"{NAME}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class FaceFinder(DistributionFinder):
    """Finds :class:`FaceDistribution` for importlib.metadata, and no module."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        return None

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        """:class:`FaceDistribution` for who asks for its name, or any, where Python itself looks for modules."""
        context = DistributionFinder.Context() if context is None else context
        asked_for_us = context.name is None or re.sub(r"[-_.]+", "-", context.name).lower() == NAME
        return [FaceDistribution()] if asked_for_us and list(context.path) == sys.path else []


def other_distributions() -> list[str]:
    """The installed distributions called ``bitsandbytes`` that are not ours, with their places."""
    found = [distribution for distribution in distributions(name=NAME) if distribution.version != VERSION]
    return [f"{distribution.version} in {distribution.locate_file('')}" for distribution in found]
