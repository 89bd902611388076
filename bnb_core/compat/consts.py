"""``bitsandbytes.consts``: where the library is, and how its compiled parts are named here."""

from __future__ import annotations

import platform
from pathlib import Path

import bnb_core

__all__ = ["DYNAMIC_LIBRARY_SUFFIX", "PACKAGE_DIR"]

DYNAMIC_LIBRARY_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
PACKAGE_DIR = Path(bnb_core.__file__).parent
