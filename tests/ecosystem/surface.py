"""What bitsandbytes offers, as introspection finds it: every name, and what a caller can tell of it.

:func:`collect` lists the names of the real one, in a process of its own; :func:`describe` looks one up in whatever is
imported as bitsandbytes. A name is that of a module, of what a module or a class has, of an attribute of an instance
(``module.Class().attribute``), of an operator (``torch.ops.bitsandbytes...``) or of a variable of the environment
(``$NAME``).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

NAME = "bitsandbytes"
OPERATORS = f"torch.ops.{NAME}"

# Private names count where somebody calls them.
CALLED_PRIVATE = {
    f"{NAME}.autograd._functions.MatmulLtState._deprecated_fields": "bitsandbytes' own tests",
    f"{NAME}.functional._convert_weight_packed_for_cpu": "bitsandbytes' own tests",
    f"{NAME}.functional._convert_weight_packed_for_cpu_inverse": "bitsandbytes' own tests",
    f"{NAME}.nn.parametrize._disable_parametrization_cache": "Axolotl, bitsandbytes' own tests",
    f"{NAME}.nn.parametrize._enable_parametrization_cache": "Axolotl, bitsandbytes' own tests",
    f"{NAME}.nn.parametrize._register_parametrization_hooks": "bitsandbytes' own tests",
    f"{NAME}.optim.ademamix._ReferenceAdEMAMix": "bitsandbytes' own tests",
    f"{NAME}.optim.optimizer.Optimizer8bit._FSDP_WRAPPED_QUANT_STATE_KEY": "bitsandbytes' own tests",
}

# Of a module that cannot be imported on this machine.
UNKNOWN = {"kind": "module"}

Factory = Callable[[Any], Any]


def _instance_of_a_process(cls: Any) -> Any:
    return cls.get_instance()


def _quantized_layer(cls: Any) -> Any:
    return cls(64, 64).to("cpu")


def _quantized_parameter(cls: Any) -> Any:
    import torch

    return cls(torch.ones(64, 8), requires_grad=False).to("cpu")


def _quant_state(cls: Any) -> Any:
    import torch

    return cls(torch.ones(1))


def _optimizer(cls: Any) -> Any:
    import torch

    momentum = {"momentum": 0.9} if cls.__name__.startswith(("LARS", "SGD")) else {}
    return cls([torch.nn.Parameter(torch.ones(2, 3))], lr=1e-3, **momentum)


def _tracer(cls: Any) -> Any:
    """One that has watched a forward."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    tracer = cls.get_instance()
    tracer.initialize(model)
    model(torch.ones(1, 4))
    return tracer


def _arguments(cls: Any) -> Any:
    """What an optimizer keeps its settings in."""
    return _optimizer(importlib.import_module(f"{NAME}.optim").Adam).args


INSTANCES: dict[str, Factory] = {
    f"{NAME}.autograd._functions.GlobalOutlierPooler": _instance_of_a_process,
    f"{NAME}.autograd._functions.MatmulLtState": lambda cls: cls(),
    f"{NAME}.cuda_specs.CUDASpecs": lambda cls: cls((8, 0), "128", (12, 8)),
    f"{NAME}.functional.GlobalPageManager": _instance_of_a_process,
    f"{NAME}.functional.QuantState": _quant_state,
    **{
        f"{NAME}.nn.modules.{layer}": _quantized_layer
        for layer in (
            *("Embedding", "Embedding4bit", "Embedding8bit", "EmbeddingFP4", "EmbeddingNF4", "StableEmbedding"),
            *("Linear4bit", "Linear8bitLt", "LinearFP4", "LinearNF4", "OutlierAwareLinear"),
        )
    },
    f"{NAME}.nn.modules.Int8Params": _quantized_parameter,
    f"{NAME}.nn.modules.Params4bit": _quantized_parameter,
    f"{NAME}.nn.parametrize.Bnb4bitParametrization": lambda cls: cls(
        importlib.import_module(f"{NAME}.functional").QuantState(importlib.import_module("torch").ones(1))
    ),
    f"{NAME}.optim.optimizer.GlobalOptimManager": _instance_of_a_process,
    f"{NAME}.optim.optimizer.MockArgs": _arguments,
    f"{NAME}.utils.OutlierTracer": _tracer,
}


def collect() -> dict[str, Any]:
    """Every name of the real bitsandbytes with its description. The process is of no other use afterwards."""
    read = _record_environment()
    names = {name: describe(name) or UNKNOWN for name in [*_module_names(), *_instance_names(), *_operator_names()]}
    _run_on_every_platform()
    return {**names, **{f"${variable}": {"kind": "environment variable"} for variable in read}}


def describe(name: str) -> dict[str, Any] | None:
    """What a caller can tell of a name: its kind, the signature of what can be called, the value of a constant.

    Returns:
        What JSON holds; None if the name is not there.
    """
    if name.startswith(OPERATORS):
        return _describe_operator(name)
    try:
        value = _find(name)
    except (AttributeError, ImportError):
        return None
    if "()." in name:
        return {"kind": "attribute"}
    if isinstance(value, types.ModuleType):
        return {"kind": "module"}
    if callable(value) and not isinstance(value, typing.TypeVar):
        return {"kind": "class" if inspect.isclass(value) else "function", "signature": _signature(name, value)}
    return {"kind": "value", "value": _plain(value)}


def _find(name: str) -> Any:
    """The object of that name.

    Raises:
        AttributeError, ImportError: there is none.
    """
    owner, instance, attribute = name.partition("().")
    if instance:
        return getattr(_instance(owner), attribute)
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module_name = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(module_name)
        except ImportError as error:
            if count == 1 or (error.name is not None and not module_name.startswith(error.name)):
                raise
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def _module_names() -> Iterator[str]:
    for module_name in _modules():
        yield module_name
        try:
            module = importlib.import_module(module_name)
        except Exception:
            continue  # It needs what this machine does not have.
        for name, value in list(vars(module).items()):
            full_name = f"{module_name}.{name}"
            if _counts(full_name) and _is_own(value):
                yield full_name
                if inspect.isclass(value) and value.__module__ == module_name:
                    yield from _member_names(full_name, value)


def _modules() -> Iterator[str]:
    package = importlib.import_module(NAME)
    yield NAME
    for module in pkgutil.walk_packages(package.__path__, f"{NAME}."):
        if not module.name.rpartition(".")[2].startswith("lib"):  # not Python's: one for each version of CUDA
            yield module.name


def _counts(name: str) -> bool:
    return not name.rpartition(".")[2].startswith("_") or name in CALLED_PRIVATE


def _is_own(value: Any) -> bool:
    """Whether bitsandbytes made it, as far as one can tell: not what its modules have imported from elsewhere."""
    if isinstance(value, types.ModuleType):
        return value.__name__.startswith(NAME)
    if inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, typing.TypeVar):
        return str(getattr(value, "__module__", "")).startswith(NAME)
    return type(value).__module__ not in ("__future__", "typing")


def _member_names(class_name: str, cls: type) -> Iterator[str]:
    """Methods, properties and class attributes, its bases' in bitsandbytes included."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith(NAME)]
    for member in dict.fromkeys(member for base in bases for member in vars(base)):
        name = f"{class_name}.{member}"
        if _counts(name) and member != "_backward_cls":
            yield name


def _instance_names() -> Iterator[str]:
    for name in [*INSTANCES, *_optimizer_names()]:
        made = vars(_instance(name))
        groups = (made, *(made.get(group, {}) for group in ("_parameters", "_buffers", "_modules")))
        attributes = dict.fromkeys(attribute for group in groups for attribute in group)
        yield from (f"{name}().{attribute}" for attribute in attributes if not attribute.startswith("_"))


def _optimizer_names() -> list[str]:
    import torch

    classes = vars(importlib.import_module(f"{NAME}.optim")).values()
    optimizers = [cls for cls in classes if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)]
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in optimizers]


@cache
def _instance(name: str) -> Any:
    """One of the class of that name."""
    return INSTANCES.get(name, _optimizer)(_find(name))


def _operator_names() -> list[str]:
    import torch

    names = torch._C._dispatch_get_all_op_names()
    return [name.replace(f"{NAME}::", f"{OPERATORS}.") for name in names if name.startswith(f"{NAME}::")]


def _describe_operator(name: str) -> dict[str, Any] | None:
    import torch

    operator, _, overload = name.removeprefix(f"{OPERATORS}.").partition(".")
    try:
        found = getattr(getattr(torch.ops.bitsandbytes, operator), overload or "default")
    except AttributeError:
        return None
    # How an argument that is written to is marked differs with the way in which an operator was defined.
    return {"kind": "operator", "schema": re.sub(r"\([^()]*! -> [^()]*\)|\(\w+!\)", "(!)", str(found._schema))}


def _signature(name: str, value: Any) -> list[list[Any]] | None:
    """Name, kind and default of each argument of a call; None where Python does not know."""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return None
    owner, _, attribute = name.rpartition(".")
    if isinstance(value, types.FunctionType) and inspect.isclass(found := _find_or_none(owner)):
        parameters = parameters[not isinstance(inspect.getattr_static(found, attribute), staticmethod) :]
    return [[p.name, p.kind.name, None if p.default is p.empty else _default(p.default)] for p in parameters]


def _find_or_none(name: str) -> Any:
    try:
        return _find(name)
    except (AttributeError, ImportError):
        return None


def _default(value: Any) -> str:
    if inspect.isclass(value):
        return value.__qualname__
    return repr(float(value)) if type(value) is int else repr(value)


def _plain(value: Any) -> Any:
    """The value of a constant as JSON holds it, None for what is no plain value or depends on the machine."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return None


def _record_environment() -> set[str]:
    """The names of the variables that code of bitsandbytes reads from now on, one by one."""
    read: set[str] = set()
    original = os._Environ.__getitem__
    between = ("os", "collections.abc", "_collections_abc", __name__)

    def recording(self: Any, key: str) -> str:
        frame, iterating = sys._getframe(1), False
        while frame.f_back is not None and frame.f_globals.get("__name__") in between:
            iterating = iterating or frame.f_code.co_name == "__iter__"
            frame = frame.f_back
        if str(frame.f_globals.get("__name__")).startswith(NAME) and not iterating:
            read.add(key)
        return original(self, key)

    os._Environ.__getitem__ = recording  # type: ignore[method-assign]
    return read


def _run_on_every_platform() -> None:
    """What may read the environment: loading the library, and the diagnostics; here, and as if torch had a GPU."""
    import torch

    cextension = importlib.import_module(f"{NAME}.cextension")
    specs = importlib.import_module(f"{NAME}.cuda_specs").CUDASpecs((8, 0), "128", (12, 8))
    main = importlib.import_module(f"{NAME}.diagnostics.main").main
    for version in ({"cuda": None, "hip": None}, {"cuda": "12.8", "hip": None}, {"cuda": None, "hip": "6.4"}):
        patches = [mock.patch.object(torch.version, name, value) for name, value in version.items()]
        if any(version.values()):
            patches.append(mock.patch.object(torch.cuda, "is_available", lambda: True))
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            for call in (
                lambda: importlib.reload(cextension),
                lambda: cextension.get_cuda_bnb_library_path(specs),
                cextension.get_native_library,
                main,
            ):
                # It may fail, on this machine, and say so at length.
                with contextlib.suppress(Exception, SystemExit), contextlib.redirect_stdout(io.StringIO()):
                    call()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(collect()))
