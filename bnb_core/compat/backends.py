"""``bitsandbytes.backends``. Called, it lists the backends, as ``bnb_core.backends()`` does."""

from __future__ import annotations

import sys
from types import ModuleType

from bnb_core import registry
from bnb_core.backend import Backend


class _CallableModule(ModuleType):
    def __call__(self) -> dict[str, Backend]:
        return registry.backends()


sys.modules[__name__].__class__ = _CallableModule
