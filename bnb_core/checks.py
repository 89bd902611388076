"""The shared argument checks: each raises an error that names the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from reprlib import Repr
from typing import Any, NoReturn

import torch
from torch import Tensor

from bnb_core.formats import FORMATS

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = tuple(FORMATS)
QUANT_STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
F32_MAX = torch.finfo(torch.float32).max
I64_MAX = 2**63 - 1

_STRIDED = torch.strided
_NUMBERS = (Real, torch.SymInt, torch.SymFloat)
_WHOLE_NUMBERS = (Integral, torch.SymInt)
_short = Repr()


def _names(items: Sequence[Any]) -> str:
    return ", ".join(str(item).removeprefix("torch.") for item in items)


def shown(value: object) -> str:
    """What errors say of a value that was given: short, whatever it is."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    try:
        return _short.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"{type(value).__name__} of {value.bit_length()} bits"  # type: ignore[attr-defined]


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """An error of these checks as a function tells it that has other names for the arguments."""
    argument, colon, rest = str(error).partition(":")
    return type(error)(f"{names.get(argument, argument)}{colon}{rest}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_dense(name: str, value: object) -> None:
    """A tensor that has one value in memory for each place of its shape."""
    check_tensor(name, value)
    if value.layout is not _STRIDED or value.is_nested:  # type: ignore[attr-defined]
        kind = "nested" if value.is_nested else _names([value.layout])  # type: ignore[attr-defined]
        raise TypeError(f"{name}: expected a dense tensor, got a {kind} one")


def check_dtype(name: str, tensor: Tensor, accepted: Sequence[torch.dtype]) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout is not _STRIDED or tensor.is_nested:
        check_dense(name, tensor)
    if tensor.dtype not in accepted:
        raise TypeError(f"{name}: expected dtype {_names(accepted)}, got {_names([tensor.dtype])}")


def check_float(name: str, tensor: Tensor) -> None:
    check_dtype(name, tensor, FLOAT_DTYPES)


def check_dtype_argument(name: str, dtype: object, accepted: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in accepted:
        given = _names([dtype]) if isinstance(dtype, torch.dtype) else shown(dtype)
        raise TypeError(f"{name}: expected one of {_names(accepted)}, got {given}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != shape and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_numel(name: str, tensor: Tensor, numel: int) -> None:
    if tensor.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements, got {tensor.numel()} (shape {tuple(tensor.shape)})")


def check_dimensions(name: str, tensor: Tensor, dimensions: int) -> None:
    if tensor.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got shape {tuple(tensor.shape)}")


def check_blocksize(blocksize: object, name: str = "blocksize") -> None:
    if not isinstance(blocksize, int) or isinstance(blocksize, bool) or blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: expected one of {_names(BLOCKSIZES)}, got {shown(blocksize)}")


def check_any_blocksize(blocksize: object, name: str = "blocksize") -> None:
    """Of 8-bit blockwise quantization, which takes blocks of any size."""
    if not isinstance(blocksize, int) or isinstance(blocksize, bool) or blocksize < 1:
        raise ValueError(f"{name}: expected a positive int, got {shown(blocksize)}")


def check_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(f"{name}: expected one of {_names(accepted)}, got {shown(value)}")


def refuse_offsets(offsets: Tensor, rows: int) -> NoReturn:
    """Raise ValueError for offsets of groups that a kernel has refused."""
    raise ValueError(f"offsets: expected numbers that ascend from 0 to the {rows} rows, got {shown(offsets.tolist())}")


def check_offsets(offsets: Tensor, rows: int) -> None:
    """That they ascend from 0 to the rows, by their values, which the host reads."""
    places = offsets.tolist()
    if places[0] != 0 or places[-1] != rows or places != sorted(places):
        refuse_offsets(offsets, rows)


def check_code(name: str, code: Tensor) -> None:
    """A codebook of 256 f32 values. Its order is not looked at here: that would wait for the device."""
    check_dtype(name, code, (torch.float32,))
    check_shape(name, code, (256,))


def check_same_device(tensors: Sequence[tuple[str, Tensor]]) -> None:
    if not tensors:
        return
    first_name, first = tensors[0]
    for name, tensor in tensors[1:]:
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected on {first.device} like {first_name}, got on {tensor.device}")


def check_number(name: str, value: object, *, minimum: float = -F32_MAX, maximum: float = F32_MAX) -> None:
    """A number, not a tensor, in a range; by default one that f32 holds."""
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    if not minimum <= value <= maximum:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number from {minimum} to {maximum}, got {shown(value)}")


def check_whole(name: str, value: object, *, minimum: int = 0, maximum: int = I64_MAX) -> None:
    if not isinstance(value, _WHOLE_NUMBERS) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a whole number, got {shown(value)}")
    if not minimum <= value <= maximum:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a whole number from {minimum} to {maximum}, got {shown(value)}")


def check_flag(name: str, value: object) -> None:
    """True or False, or what callers have for it: 0, 1, None, NumPy's."""
    if value is True or value is False or value is None or type(value).__name__ in ("bool", "bool_"):
        return
    if not isinstance(value, Integral) or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def check_sizes(name: str, sizes: object) -> None:
    """A shape: a sequence of whole numbers, none negative."""
    if not isinstance(sizes, tuple | list):
        raise TypeError(f"{name}: expected a sequence of sizes, got {shown(sizes)}")
    for size in sizes:
        if not isinstance(size, torch.SymInt):
            check_whole(name, size)


def check_device(name: str, device: str) -> torch.device:
    """The device of that name, once it has held a value."""
    return _tried(name, device, lambda device: torch.empty(1, device=device).item())


def as_device(name: str, device: torch.device | str) -> torch.device:
    """The device, on which tensors can be made; meta is one."""
    return _tried(name, device, lambda device: torch.empty(0, device=device))


def _tried(name: str, device: torch.device | str, trial: Callable[[torch.device], object]) -> torch.device:
    try:
        found = torch.device(device)
        trial(found)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise ValueError(f"{name}: expected a device that this machine has, got {shown(device)}: {reason}") from None
    return found
