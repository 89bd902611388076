"""What parameters of quantized weights share: codes stay codes, whatever is done to parameters in general."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

# The methods that convert values, and what writes over them.
_CASTS = {getattr(Tensor, name) for name in ("half", "float", "double", "bfloat16", "type", "type_as", "int", "long")}
_INITIALIZERS = {
    *(getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")),
    *(getattr(Tensor, name) for name in ("fill_", "normal_", "random_", "uniform_", "zero_")),
}
_ARITHMETIC = {
    getattr(owner, name)
    for operation in ("add", "addcdiv", "addcmul", "div", "lerp", "mul", "rmul", "rsub", "sub", "true_divide")
    for owner in (torch, Tensor)
    for name in (operation, f"{operation}_", f"__{operation}__", f"__i{operation}__", f"_foreach_{operation}",
                 f"_foreach_{operation}_")
    if hasattr(owner, name)
}  # fmt: skip


class QuantizedParameter(nn.Parameter):
    """A parameter that holds values until it is quantized, and codes from then on."""

    def _holds_codes(self) -> bool:
        raise NotImplementedError

    def _like(self, data: Tensor) -> QuantizedParameter:
        """A parameter of other data, with what this one has beside its data."""
        raise NotImplementedError

    def _moved(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> QuantizedParameter:
        """Quantized, if that is due, or moved; codes keep their dtype."""
        raise NotImplementedError

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> QuantizedParameter:
        """Move, and on the first move to a device other than meta quantize; codes keep their dtype.

        Args:
            copy: leave this parameter as it is, even where nothing is to be done.
        """
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return (self.__deepcopy__({}) if copy else self)._moved(device, dtype, non_blocking)

    def cpu(self) -> QuantizedParameter:  # type: ignore[override]
        return self.to(device="cpu")

    def cuda(self, device: Any = None, non_blocking: bool = False) -> QuantizedParameter:  # type: ignore[override]
        return self.to(device=_indexed("cuda", device), non_blocking=non_blocking)

    def xpu(self, device: Any = None, non_blocking: bool = False) -> QuantizedParameter:  # type: ignore[override]
        return self.to(device=_indexed("xpu", device), non_blocking=non_blocking)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedParameter:
        if id(self) in memo:
            return memo[id(self)]
        copied = self._like(copied_codes(self.data) if self._holds_codes() else self.data.clone())
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            # A copy of the parameter alone stays with its module; a copy of the module has that copy in the memo.
            setattr(copied, name, memo.get(id(value), value) if name == "module" else copy.deepcopy(value, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self), self.data, self.requires_grad), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Plain results, but for what would convert codes as if they were values, or write over them.

        That this is here also keeps torch's fused transformer layers from reading codes as values.
        """
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _CASTS and (len(args) > 1 or func is not Tensor.type) and _are_codes(args[0]):
                return args[0]
            if func in _INITIALIZERS and _are_codes(args[0] if args else kwargs["tensor"]):
                raise ValueError(
                    f"tensor: expected values to initialize, got the codes of a {cls.__name__}; initialize the weight "
                    "before it is quantized, or assign values and move the layer again"
                )
            result = func(*args, **kwargs)
            if func is Tensor.detach and not torch.compiler.is_compiling() and _are_codes(args[0]):
                return result.as_subclass(DetachedCodes)
            return result


class DetachedCodes(Tensor):
    """What ``detach()`` gives of codes: a plain tensor but for arithmetic, which codes are not there for.

    Averages of models (torch.optim.swa_utils) are computed from their detached parameters.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ARITHMETIC:
            raise ValueError(
                "codes of a quantized weight cannot be averaged or computed with; average the modules that train, such "
                "as adapters, or dequantize the weight"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copied_codes(self.plain())

    def plain(self) -> Tensor:
        return self.as_subclass(Tensor)


def moved_codes(codes: Tensor, device: torch.device | None, non_blocking: bool = False) -> Tensor:
    """Codes on a device, themselves if they are there. They move as bytes: some copies of floats change NaNs."""
    if device is None or codes.device == device:
        return codes
    if not codes.is_floating_point() or not codes.is_contiguous():
        return codes.to(device, non_blocking=non_blocking)
    return codes.view(torch.uint8).to(device, non_blocking=non_blocking).view(codes.dtype)


def copied_codes(codes: Tensor) -> Tensor:
    """Codes in memory of their own, copied as bytes."""
    if not codes.is_floating_point() or not codes.is_contiguous():
        return codes.clone()
    return codes.view(torch.uint8).clone().view(codes.dtype)


def _are_codes(tensor: Tensor) -> bool:
    return isinstance(tensor, QuantizedParameter) and tensor._holds_codes()


in_any_mode = torch.inference_mode(False)
"""Decorator: a weight that is quantized or moved in inference mode may serve training later, which takes no tensor that
was made in that mode."""


def _indexed(device_type: str, device: Any) -> torch.device:
    return torch.device(device_type, device) if isinstance(device, int) else torch.device(device or device_type)


def _rebuild(cls: type[QuantizedParameter], data: Tensor, requires_grad: bool) -> QuantizedParameter:
    return cls(data, requires_grad)
