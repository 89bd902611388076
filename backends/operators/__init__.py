"""What is registered for the operators ``torch.ops.bitsandbytes`` on the key of a tensor's own device, as a backend.

Other people's packages register such kernels for the devices that they know. The operators' implementation for every
device, which may be that of bnb_core/compat/operators.py, over the primitives, is never called from here.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.backend import EVERY_DEVICE, Backend, Kernel
from bnb_core.primitive import made_readable
from bnb_core.records import flat

from . import dispatcher
from .routes import ROUTES, Route

OPERATORS = tuple(dict.fromkeys(route.operator for routes in ROUTES.values() for route in routes))


class _Routed:
    """A primitive by whatever is registered when it is called."""

    def __init__(self, primitive: str, routes: tuple[Route, ...]) -> None:
        self.primitive = primitive
        self.routes = routes

    def present(self, device_type: str) -> bool:
        return any(dispatcher.has_kernel(route.operator, device_type) for route in self.routes)

    def supports(self, *arguments: Any) -> str | None:
        choice = self._choose(arguments)
        return choice if isinstance(choice, str) else None

    def _choose(self, arguments: tuple[Any, ...]) -> Route | str:
        """The first route that can be taken, or the reasons why none can."""
        device = next(a for a in flat(arguments) if isinstance(a, Tensor)).device.type
        reasons = []
        for route in self.routes:
            if not dispatcher.has_kernel(route.operator, device):
                reasons.append(f"no kernel for bitsandbytes::{route.operator} is registered on {device}")
            elif route.refuses is not None and (reason := route.refuses(*arguments)) is not None:
                reasons.append(reason)
            else:
                return route
        return "; ".join(reasons)

    def __call__(self, *arguments: Any, out: Any = None) -> None:
        outputs = out if isinstance(out, tuple) else (out,)
        if out is not None and all(output.numel() == 0 for output in outputs):
            return
        route = self._choose(arguments)
        assert isinstance(route, Route)
        operator = dispatcher.operator(route.operator)
        with torch.no_grad():
            if out is None:
                self._update(route, operator, arguments)
            else:
                results = route.call(operator, *arguments)
                _fill(route, outputs, results if isinstance(results, tuple) else (results,))

    def _update(self, route: Route, operator: Any, arguments: tuple[Any, ...]) -> None:
        """An optimizer's tensors may have any strides, which kernels need not take."""
        used = made_readable(arguments)
        route.call(operator, *used)
        declared = getattr(primitives, self.primitive).op._schema.arguments
        for declaration, given, copy in zip(declared, flat(arguments), flat(used), strict=True):
            if copy is not given and declaration.alias_info is not None:
                given.copy_(copy)


def _fill(route: Route, outputs: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
    for output, result in zip(outputs, results, strict=True):
        if result.dtype != output.dtype or result.numel() != output.numel():
            expected, got = (f"{tuple(t.shape)} of {t.dtype}" for t in (output, result))
            raise RuntimeError(f"the kernel for bitsandbytes::{route.operator} gave {got}, expected {expected}")
        output.copy_(result.reshape(output.shape))


class _Operators(Backend):
    """Kernels may be registered at any time: so whether there are any is looked up whenever it is asked."""

    @property
    def unavailable(self) -> str | None:
        if any(dispatcher.has_kernel(name, device) for device in dispatcher.device_types() for name in OPERATORS):
            return None
        if dispatcher.defined(OPERATORS[0]):
            return "no kernel for an operator of bitsandbytes is registered on a device's own key"
        return (
            "nothing here has defined the operators of bitsandbytes, which install_as_bitsandbytes() does, and no "
            "package offers kernels for them through the entry-point group 'bitsandbytes.backends'"
        )

    @unavailable.setter
    def unavailable(self, reason: str | None) -> None:
        """The constructor sets every field."""

    def prepare(self) -> None:
        """Take the name bitsandbytes if nobody has, where packages want to register kernels under it."""
        from bnb_core.compat import install_as_bitsandbytes, kernel_packages, names

        if names.NAME not in sys.modules and kernel_packages.offered():
            install_as_bitsandbytes()


def _registered() -> dict[str, str]:
    """The operators that have kernels, for each type of device that has any."""
    found = {
        device: ", ".join(name for name in OPERATORS if dispatcher.has_kernel(name, device))
        for device in dispatcher.device_types()
    }
    return {device: names for device, names in found.items() if names}


backend = _Operators(
    name="operators",
    device_types=(EVERY_DEVICE,),
    priority=1,
    kernels={
        routed.primitive: Kernel(routed, routed.supports, routed.present)
        for routed in (_Routed(primitive, routes) for primitive, routes in ROUTES.items())
    },
    details=_registered,
)
