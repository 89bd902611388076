"""The face that callers of ``bitsandbytes`` see, without a change to their code.

:func:`install_as_bitsandbytes` gives the name to bnb_core in one process. The distribution in the folder ``compat`` of
the source tree does so for every program in an environment. Both give the same modules and the same metadata.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bnb_core import functional
from bnb_core.quantize import QuantizationConfig

__all__ = ["install_as_bitsandbytes", "serve_installed_package", "transformers_config"]

functional.further_names = partial(import_module, "bnb_core.compat.functional_names")


def install_as_bitsandbytes() -> None:
    """Make ``import bitsandbytes`` in this process give bnb_core, and importlib.metadata know that distribution.

    Call it before libraries that look for bitsandbytes when they are imported (transformers, peft, diffusers). A real
    bitsandbytes stays as it is on the disk, for other processes. The classes of optimizers are told that their modules
    are ``bitsandbytes.optim...``, as Trainer asks their names.

    Warns:
        UserWarning: such a library is imported already, and has found nothing; or a package that registers kernels for
            bitsandbytes fails to (kernel_packages.py).

    Raises:
        RuntimeError: another bitsandbytes is imported already.
    """
    from bnb_core.compat import kernel_packages, metadata, names

    present, distribution = sys.modules.get(names.NAME), _version_of(names.NAME)
    if present is None:
        _give_the_name()
        if distribution is None:
            _warn_of_early_imports(names.LOOK_ONCE)
    elif getattr(present, "__version__", None) != names.VERSION:
        raise RuntimeError(
            f"{names.NAME} is already imported from {getattr(present, '__file__', 'an unknown place')}; "
            "call install_as_bitsandbytes() before anything imports it, or use both under their own names"
        )
    if distribution != names.VERSION:
        sys.meta_path.insert(0, metadata.FaceFinder())
    if present is None:
        kernel_packages.load()


def transformers_config(config: QuantizationConfig | None = None) -> Any:
    """What ``from_pretrained(quantization_config=...)`` of Transformers takes for any 4-bit format and block size.

    The model's config.json has it as ``"quant_method": "bnb_core"``. Such a folder is loaded by ``from_pretrained``
    alone wherever ``bitsandbytes`` is bnb_core: after :func:`install_as_bitsandbytes`, or ``import bitsandbytes``.

    Args:
        config: None for NF4 with double quantization. Its default of ``skip_modules`` leaves to Transformers which
            layers are output heads.

    Raises:
        TypeError: the config is no QuantizationConfig.
        ValueError: its method is int8, which Transformers knows: ``BitsAndBytesConfig(load_in_8bit=True)``.
        RuntimeError: ``bitsandbytes`` is another one.
        ImportError: Transformers is not installed.
    """
    config = QuantizationConfig() if config is None else config
    if not isinstance(config, QuantizationConfig):
        raise TypeError(f"config: expected a QuantizationConfig, got {type(config).__name__}")
    if config.method == "int8":
        raise ValueError(
            "config: expected a 4-bit method, got int8; give Transformers BitsAndBytesConfig(load_in_8bit=True)"
        )
    install_as_bitsandbytes()
    auto = import_module("transformers.quantizers.auto")
    formats = import_module("bnb_core.compat.transformers_formats")
    formats.register(auto)
    return formats.config_of(config)


def serve_installed_package() -> None:
    """What the package ``bitsandbytes`` of the distribution in ``compat`` calls when it is imported, in its own place.

    Raises:
        ImportError: another distribution called bitsandbytes is installed, too.
    """
    from bnb_core.compat import kernel_packages, metadata, names

    others = metadata.other_distributions()
    if others:
        raise ImportError(
            f"{names.NAME} is installed twice: {names.VERSION}, which is bnb_core, and {', '.join(others)}; uninstall "
            "one of them. To compare them in one process, keep the other, and import bnb_core under its own name",
            name=names.NAME,
        )
    del sys.modules[names.NAME]
    _give_the_name()
    kernel_packages.load()


def _warn_of_early_imports(modules: Sequence[str]) -> None:
    early = [module for module in modules if module in sys.modules]
    if early:
        warnings.warn(
            f"{', '.join(early)}: imported before install_as_bitsandbytes(), and found no bitsandbytes; call it first",
            stacklevel=3,
        )


def _version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _give_the_name() -> None:
    from bnb_core import optim
    from bnb_core.compat import names, taught

    modules = names.modules()
    sys.modules.update(modules)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent and not hasattr(modules[parent], child):
            setattr(modules[parent], child, module)
    for optimizer in (getattr(optim, name) for name in optim.__all__):
        if issubclass(optimizer, torch.optim.Optimizer):
            optimizer.__module__ = optimizer.__module__.replace("bnb_core", names.NAME, 1)
    taught.serve()
