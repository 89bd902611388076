"""Modules of other libraries that learn of experts and formats when they are imported, where bitsandbytes is bnb_core.

Nothing here imports them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from bnb_core.compat import transformers_experts


def _teach_peft(module: ModuleType) -> None:
    from bnb_core.compat import peft_experts  # imports PEFT

    peft_experts.teach(module)


def _register_formats(module: ModuleType) -> None:
    from bnb_core.compat import transformers_formats  # imports Transformers

    transformers_formats.register(module)


_LESSONS: dict[str, Callable[[ModuleType], None]] = {
    transformers_experts.MODULE: transformers_experts.teach,
    "transformers.quantizers.auto": _register_formats,
    "peft.tuners.lora.bnb": _teach_peft,
}


def serve() -> None:
    """Teach each module, now or when it is imported."""
    for name, teach in _LESSONS.items():
        present = sys.modules.get(name)
        if present is None:
            sys.meta_path.insert(0, _AtImport(name, teach))
        else:
            teach(present)


class _AtImport(MetaPathFinder):
    """Finds a module as others do, and teaches it once it has been run."""

    def __init__(self, name: str, teach: Callable[[ModuleType], None]) -> None:
        self._name, self._teach = name, teach

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run, teach = spec.loader.exec_module, self._teach

            def run_and_teach(module: ModuleType) -> None:
                run(module)
                teach(module)

            vars(spec.loader)["exec_module"] = run_and_teach
        return spec
