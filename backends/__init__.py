"""The backends that come with bnb_core. Each registers itself through the entry-point group ``bnb_core.backends``."""

import sys
from types import ModuleType

from bnb_core import registry
from bnb_core.backend import Backend


class _CallablePackage(ModuleType):
    """``bnb_core.backends()`` lists the backends; importing this package takes that function's name, not its use."""

    def __call__(self) -> dict[str, Backend]:
        return registry.backends()


sys.modules[__name__].__class__ = _CallablePackage
