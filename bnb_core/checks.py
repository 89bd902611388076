"""The shared argument checks: each raises an error that names the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("fp4", "nf4")
QUANT_STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


def _names(items: Sequence[Any]) -> str:
    return ", ".join(str(item).removeprefix("torch.") for item in items)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_dtype(name: str, tensor: Tensor, accepted: Sequence[torch.dtype]) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in accepted:
        raise TypeError(f"{name}: expected dtype {_names(accepted)}, got {_names([tensor.dtype])}")


def check_float(name: str, tensor: Tensor) -> None:
    check_dtype(name, tensor, FLOAT_DTYPES)


def check_dtype_argument(name: str, dtype: object, accepted: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    if dtype not in accepted:
        raise TypeError(f"{name}: expected one of {_names(accepted)}, got {_names([dtype])}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_numel(name: str, tensor: Tensor, numel: int) -> None:
    if tensor.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements, got {tensor.numel()} (shape {tuple(tensor.shape)})")


def check_dimensions(name: str, tensor: Tensor, dimensions: int) -> None:
    if tensor.dim() != dimensions:
        raise ValueError(f"{name}: expected {dimensions} dimensions, got shape {tuple(tensor.shape)}")


def check_blocksize(blocksize: object, name: str = "blocksize") -> None:
    if not isinstance(blocksize, int) or isinstance(blocksize, bool) or blocksize not in BLOCKSIZES:
        raise ValueError(f"{name}: expected one of {_names(BLOCKSIZES)}, got {blocksize!r}")


def check_any_blocksize(blocksize: object, name: str = "blocksize") -> None:
    """Of 8-bit blockwise quantization, which takes blocks of any size."""
    if not isinstance(blocksize, int) or isinstance(blocksize, bool) or blocksize < 1:
        raise ValueError(f"{name}: expected a positive int, got {blocksize!r}")


def check_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name}: expected one of {_names(accepted)}, got {value!r}")


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


def check_number(name: str, value: float, *, minimum: float = float("-inf"), below: float = float("inf")) -> None:
    if not minimum <= value < below:
        raise ValueError(f"{name}: expected {minimum} <= {name} < {below}, got {value}")


def check_device(name: str, device: str) -> torch.device:
    """The device of that name, once it has held a value."""
    try:
        torch.empty(1, device=device).item()
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise ValueError(f"{name}: expected a device that this machine has, got {device!r}: {reason}") from None
    return torch.device(device)
