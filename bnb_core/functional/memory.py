"""Where tensors lie: their addresses, devices and pages."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from bnb_core.checks import check_dense, check_flag, check_tensor, shown
from bnb_core.paged import paged_tensor, prefetch


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """Where a tensor's data begins, for the C symbols of ``lib``; None for None.

    Raises:
        ValueError: the memory holds the values with the other sign (``is_neg``); ``resolve_neg`` copies them.
    """
    if A is None:
        return None
    check_dense("A", A)
    if A.is_neg():
        raise ValueError("A: its memory holds the values with the other sign; A.resolve_neg() copies them")
    return ctypes.c_void_p(A.data_ptr())


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """A zeroed tensor whose memory may be paged out, so that it can be larger than the device's own.

    Args:
        device: None for the first GPU that CUDA or HIP knows, or without one the CPU.
    """
    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return paged_tensor(shape, dtype, device)


def _is_paged(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and getattr(tensor, "is_paged", False)


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Bring a paged tensor near before it is used; in host memory the operating system's read-ahead does so.

    Args:
        to_cpu: to the host instead, to make room on the device.

    Raises:
        ValueError: the tensor is not paged.
    """
    if not _is_paged(A):
        raise ValueError("A: expected a paged tensor, as get_paged makes them")
    check_flag("to_cpu", to_cpu)
    prefetch(A, to_cpu)


def is_on_gpu(tensors: Iterable[Tensor | None]) -> bool:
    """True if all tensors are on one GPU; None and paged tensors do not count.

    Raises:
        ValueError: they are not.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(f"tensors: expected several of them, got {shown(tensors)}")
    devices = set()
    for tensor in tensors:
        if tensor is not None and not _is_paged(tensor):
            check_tensor("tensors", tensor)
            devices.add(str(tensor.device))
    if len(devices) > 1 or "cpu" in devices:
        raise ValueError(f"tensors: expected all on one GPU, found them on {', '.join(sorted(devices))}")
    return True
