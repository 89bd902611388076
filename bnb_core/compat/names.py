"""What the name ``bitsandbytes`` stands for: the version of the API, and where its modules are here."""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

import bnb_core

NAME = "bitsandbytes"

VERSION = "0.50.2+bnb.core"
"""The version whose API this is, for callers that ask; the part after the plus tells the two libraries apart."""

OPTIMIZER_MODULES = (
    "adagrad", "adam", "adamw", "ademamix", "lamb", "lars", "lion", "optimizer", "rmsprop", "sgd",
)  # fmt: skip

MODULES = {
    "autograd": "bnb_core.autograd",
    "autograd._functions": "bnb_core.autograd",
    "cextension": "bnb_core.compat.cextension",
    "functional": "bnb_core.functional",
    "nn": "bnb_core.nn",
    "nn.modules": "bnb_core.compat.nn_modules",
    "nn.parametrize": "bnb_core.nn.parametrize",
    "optim": "bnb_core.optim",
    **{f"optim.{name}": f"bnb_core.optim.{name}" for name in OPTIMIZER_MODULES},
    "utils": "bnb_core.utils",
}
"""Every module that callers import, and the module that it is; most of them are the very modules of bnb_core."""

LOOK_ONCE = ("diffusers.utils.import_utils", "peft.import_utils", "transformers.integrations.bitsandbytes")
"""Modules of others that ask whether bitsandbytes is there when they are imported, and never again."""


def top_module() -> ModuleType:
    """What ``import bitsandbytes`` gives: what bnb_core offers, under the version of the API."""
    module = ModuleType(NAME, bnb_core.__doc__)
    module.__dict__.update({name: getattr(bnb_core, name) for name in bnb_core.__all__})
    module.__dict__["__version__"] = VERSION
    module.__file__ = bnb_core.__file__
    module.__path__ = []
    module.__spec__ = ModuleSpec(NAME, None, origin=bnb_core.__file__, is_package=True)
    return module


def modules() -> dict[str, ModuleType]:
    """All modules by their full names, parents first."""
    return {NAME: top_module(), **{f"{NAME}.{name}": import_module(ours) for name, ours in MODULES.items()}}
