"""What the name ``bitsandbytes`` stands for: the version of the API, and where its modules are here."""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import bnb_core

NAME = "bitsandbytes"

VERSION = "0.50.2+bnb.core"
"""The version whose API this is, for callers that ask; the part after the plus tells the two libraries apart."""

OPTIMIZER_MODULES = (
    "adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "optimizer", "rmsprop", "sgd",
)  # fmt: skip

MODULES = {
    "_ops": "bnb_core.compat.operators",
    "autograd": "bnb_core.autograd",
    "autograd._functions": "bnb_core.compat.autograd_functions",
    "backends": "bnb_core.compat.backends",
    "backends.utils": "bnb_core.compat.backends_utils",
    "cextension": "bnb_core.compat.cextension",
    "consts": "bnb_core.compat.consts",
    "cuda_specs": "bnb_core.compat.cuda_specs",
    "diagnostics": "bnb_core.compat.diagnostics",
    "diagnostics.main": "bnb_core.compat.diagnostics_main",
    "functional": "bnb_core.functional",
    "nn": "bnb_core.nn",
    "nn.modules": "bnb_core.compat.nn_modules",
    "nn.parametrize": "bnb_core.nn.parametrize",
    "optim": "bnb_core.optim",
    **{f"optim.{name}": f"bnb_core.optim.{name}" for name in OPTIMIZER_MODULES},
    "utils": "bnb_core.compat.utils",
}
"""Every module that callers import, and the module that it is; most of them are the very modules of bnb_core."""

SHORTER = {"adam": "optim.adam", "modules": "nn.modules"}
"""Attributes of the package that are modules of its subpackages."""

RUN = Path(__file__).parent / "run"
"""The only folder in which Python itself looks for modules of the package: it has ``__main__``."""

LOOK_ONCE = ("diffusers.utils.import_utils", "peft.import_utils", "transformers.integrations.bitsandbytes")
"""Modules of others that ask whether bitsandbytes is there when they are imported, and never again."""


def top_module() -> ModuleType:
    """What ``import bitsandbytes`` gives: what bnb_core offers, under the version of the API."""
    module = ModuleType(NAME, bnb_core.__doc__)
    module.__dict__.update({name: getattr(bnb_core, name) for name in bnb_core.__all__})
    module.__dict__["__version__"] = VERSION
    module.__file__ = bnb_core.__file__
    module.__path__ = [str(RUN)]
    module.__spec__ = ModuleSpec(NAME, None, origin=bnb_core.__file__, is_package=True)
    return module


def modules() -> dict[str, ModuleType]:
    """All modules by their full names, parents first."""
    top, others = top_module(), {name: import_module(ours) for name, ours in MODULES.items()}
    shorter = {attribute: others[name] for attribute, name in SHORTER.items()}
    top.__dict__.update({**shorter, **{name: module for name, module in others.items() if "." not in name}})
    return {NAME: top, **{f"{NAME}.{name}": module for name, module in others.items()}}
