"""Paged tensors on Intel GPUs: pinned host memory, which the GPU reads and writes in place, over the bus.

SYCL's shared memory, which moves between host and device by itself, is not to be had from torch.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class PinnedMemory:
    """The paged memory (bnb_core.registry.PagedMemory) of a device that reaches the host's memory by its address."""

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros [numel] on the device that take up none of its own memory.

        Raises:
            RuntimeError: the host has too little.
        """
        host = torch.zeros(numel, dtype=dtype, pin_memory=True)
        storage = torch._C._construct_storage_from_data_pointer(host.data_ptr(), device, host.nbytes)
        weakref.finalize(storage, _release, host, device).atexit = False
        return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (numel,), (1,))

    def prefetch(self, tensor: Tensor, to_cpu: bool) -> None:
        """It stays in the host's memory."""


def _release(host: Tensor, device: torch.device) -> None:
    """Called when no tensor uses the memory any more: let it go as soon as no kernel does either."""
    getattr(torch, device.type).synchronize(device)
    del host
