"""A device of torch's own kind (PrivateUse1) without hardware: its tensors hold host memory and run torch's CPU ops.

A backend for it is the reference's kernels, registered for this device type alone. Importing this module renames
torch's PrivateUse1 device for the life of the process, so it is run as a program of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from bnb_core import registry
from bnb_core.backend import Backend
from bnb_core.conformance import runner
from bnb_core.conformance.suite import all_cases, covering
from bnb_core.primitive import plain_tensor_type

DEVICE = "fake"


@plain_tensor_type
class FakeDeviceTensor(torch.Tensor):
    """A tensor on the fake device; ``host`` is its memory."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> FakeDeviceTensor:
        tensor = torch._C._acc.create_empty_tensor(host.shape, host.dtype)
        tensor.__class__ = FakeDeviceTensor
        return tensor

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host


def to_host(value: Any) -> Any:
    return value.host if isinstance(value, FakeDeviceTensor) else value


def to_device(value: Any) -> Any:
    return FakeDeviceTensor(value) if type(value) is torch.Tensor else value


def _run_on_host(op: Any, *arguments: Any, **keywords: Any) -> Any:
    """Any torch operator: on the host tensors. One that changes an argument returns that argument."""
    if op is torch.ops.aten._copy_from.default:
        source, target = arguments[:2]
        to_host(target).copy_(to_host(source))
        return target
    wanted = keywords.get("device")
    if wanted is not None:
        keywords["device"] = "cpu"
    result = op(*tree_map(to_host, arguments), **tree_map(to_host, keywords))
    for argument in arguments:
        if isinstance(argument, FakeDeviceTensor) and result is argument.host:
            return argument
    leaves = wanted is not None and torch.device(wanted).type != DEVICE
    return result if leaves else tree_map(to_device, result)


def _contiguous_on_host(value: Any) -> Any:
    """As kernels get their inputs: a fake tensor has no strides, but what it holds may."""
    host = to_host(value)
    return host.contiguous() if isinstance(host, torch.Tensor) else host


def _on_host(kernel: Callable[..., None], in_place: bool) -> Callable[..., None]:
    """A kernel for the fake device from one for host memory, which is what its tensors hold."""
    read = to_host if in_place else _contiguous_on_host

    def call(*arguments: Any, **outputs: Any) -> None:
        kernel(*tree_map(read, arguments), **tree_map(to_host, outputs))

    return call


def make_backend() -> Backend:
    kernels = {
        name: _on_host(kernel.function, in_place=name.startswith("optimizer"))
        for name, kernel in registry.delegated_to("reference").items()
    }
    return Backend("fake", (DEVICE,), priority=1, kernels=kernels)


def run_suite() -> None:
    """Hold the backend to the suite on its device; print what failed, and a last line for the test that reads it.

    In float32 and what has no dtype, every two classes together: where tensors are is the same in all cases, and this
    device is slow.
    """
    chosen = ("float32", "int8", None)
    cases = [case for case in all_cases() if not case.large and case.primitive and case.traits.get("dtype") in chosen]
    cases = covering(cases, "pairs")
    # Without autograd's tracking of views, which makes tensors of its own.
    with torch.inference_mode(), registry.registered(make_backend()):
        results = runner.run(cases, registry.backends()["fake"], torch.device(DEVICE))
    for result in results:
        if result.failed:
            print(result.case.id, result.message.splitlines()[0])
    print(f"{len(results)} cases on {DEVICE}, {sum(result.failed for result in results)} failed")


def _claim(library: torch.library.Library) -> None:
    """Take the operators for which torch has a kernel for every device: it would make tensors without our memory."""
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CompositeExplicitAutograd"):
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace == "aten":
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(rest, partial(_run_on_host, op), "PrivateUse1")


_setup_privateuseone_for_python_backend(DEVICE)
_everything = torch.library.Library("_", "IMPL")
_everything.fallback(_run_on_host, "PrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
_claim(_aten)

if __name__ == "__main__":
    run_suite()
