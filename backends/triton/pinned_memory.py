"""Paged tensors where Triton serves: pinned host memory, which the GPU reads and writes in place, over the bus.

Memory that moves between host and device by itself is not to be had from torch: neither SYCL's nor CUDA's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor


class PinnedMemory:
    """The paged memory (bnb_core.backend.PagedMemory) of a device that reaches the host's memory by its address.

    Args:
        touch: has a kernel read and write the first element of a tensor, and raises where it cannot be launched.
    """

    def __init__(self, touch: Callable[[Tensor], None]) -> None:
        self._touch = touch
        self._kernels_take_it = False

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros [numel > 0] on the device that take up none of its own memory.

        Raises:
            RuntimeError: the host has too little, or kernels cannot be launched on it.
        """
        tensor = torch.empty(0, dtype=dtype, device=device)
        host = torch.zeros(numel, dtype=dtype, pin_memory=True)
        # The tensor's device has an index, also where the one asked for has none.
        storage = torch._C._construct_storage_from_data_pointer(host.data_ptr(), tensor.device, host.nbytes)
        weakref.finalize(storage, _release, host, tensor.device).atexit = False
        tensor.set_(storage, 0, (numel,), (1,))
        if not self._kernels_take_it:
            self._try(tensor)
        return tensor

    def prefetch(self, tensor: Tensor, to_cpu: bool) -> None:
        """It stays in the host's memory."""

    def _try(self, tensor: Tensor) -> None:
        """Intel's Triton took only the device's own memory before January 2026, which no version number tells."""
        try:
            self._touch(tensor)
        except Exception as error:
            raise RuntimeError(
                f"paged memory on {tensor.device} is pinned host memory, and this Triton launches no kernel on it "
                f"({type(error).__name__}: {error}). It needs a newer Triton (for Intel GPUs one with change 5799 of "
                "intel-xpu-backend-for-triton, January 2026), or an optimizer that is not paged"
            ) from error
        self._kernels_take_it = True


def _release(host: Tensor, device: torch.device) -> None:
    """Called when no tensor uses the memory any more: let it go as soon as no kernel does either."""
    getattr(torch, device.type).synchronize(device)
    del host
