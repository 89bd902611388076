"""Paged tensors on GPUs: managed memory, which the driver moves between the host and the device page by page."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_TYPE_STRINGS = {torch.float32: "<f4", torch.uint8: "|u1"}


class _Allocation:
    """Managed memory in the form that torch takes without a copy; freed with the last tensor on it."""

    def __init__(self, module: ModuleType, numel: int, dtype: torch.dtype) -> None:
        self._free = module.free_managed
        self._address = module.allocate_managed(numel * dtype.itemsize)
        self.__cuda_array_interface__ = {
            "shape": (numel,),
            "typestr": _TYPE_STRINGS[dtype],
            "data": (self._address, False),
            "version": 3,
        }

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self._free(self._address)


class ManagedMemory:
    """The paged memory of a GPU's backend (bnb_core.backend.PagedMemory) over its compiled module."""

    def __init__(self, module: ModuleType, stream: Callable[[torch.device], int]) -> None:
        self.module = module
        self.stream = stream

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros [numel] in host memory until they are used or prefetched.

        Raises:
            ValueError: a dtype other than float32 and uint8.
            RuntimeError: the device cannot page, all its paged memory would exceed its own, or this would exceed
                what is free beside it.
        """
        if dtype not in _TYPE_STRINGS:
            raise ValueError(f"dtype: paged memory on {device} holds float32 or uint8, got {dtype}")
        with torch.cuda.device(device):
            try:
                allocation: Any = _Allocation(self.module, numel, dtype)
            except RuntimeError:
                # What torch keeps for tensors to come is not free to anybody else.
                torch.cuda.empty_cache()
                allocation = _Allocation(self.module, numel, dtype)
            return torch.as_tensor(allocation, device=device)

    def prefetch(self, tensor: Tensor, to_cpu: bool) -> None:
        """Start to move it, in the order of the current stream."""
        with torch.cuda.device(tensor.device):
            self.module.prefetch_managed(tensor.data_ptr(), tensor.nbytes, to_cpu, self.stream(tensor.device))
