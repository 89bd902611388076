"""Memory that may exceed the device's own: what the device's backend offers and, on a CPU, memory-mapped files.

The operating system writes pages of such a tensor to its file when memory is short and reads them back when they are
touched. The file never outlives the tensor: it has no name from the moment it is mapped, so its blocks are freed when
the mapping ends, also when the process crashes.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import BinaryIO
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bnb_core import registry
from bnb_core.checks import I64_MAX, as_device, check_sizes, shown

FOLDER_VARIABLE = "BNB_PAGED_DIR"


def paged_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of zeros in paged memory, with the attribute ``is_paged = True``.

    On a CPU it lies in a file in the folder that the environment variable BNB_PAGED_DIR names (default: the system's
    temporary folder, which should not itself be held in memory). The blocks are reserved at once.

    Raises:
        BackendError: a device that has no paged memory here.
        RuntimeError: it has too little.
        TypeError, ValueError: not a shape, a dtype or a device; more bytes than i64 counts.
        OSError: the folder does not exist, cannot be written to or has too little space; the errno says which.
    """
    check_sizes("shape", shape)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {shown(dtype)}")
    device = as_device("device", device)
    numel = math.prod(shape)
    if numel * dtype.itemsize > I64_MAX:
        raise ValueError(f"shape: expected at most {I64_MAX} bytes, got {shown(numel)} elements of {dtype}")
    memory = _host_memory if device.type == "cpu" else registry.paged_memory(device.type)
    flat = torch.zeros(0, dtype=dtype, device=device) if numel == 0 else memory.allocate(numel, dtype, device)
    tensor = flat.view(tuple(shape))
    tensor.is_paged = True  # type: ignore[attr-defined]
    tensor.page_process = os.getpid()  # type: ignore[attr-defined]
    GlobalPageManager.get_instance().add(tensor)
    return tensor


def prefetch(tensor: Tensor, to_cpu: bool) -> None:
    """Start to bring a paged tensor to its device before it is used, or to the host."""
    memory = _host_memory if tensor.device.type == "cpu" else registry.paged_memory(tensor.device.type)
    if tensor.numel():
        memory.prefetch(tensor, to_cpu)


class GlobalPageManager:
    """Every paged tensor of the process, as long as somebody else holds it; there is one, from :meth:`get_instance`."""

    _instance: GlobalPageManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalPageManager: there is one in a process, call GlobalPageManager.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalPageManager:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget every tensor; they stay what they are."""
        # By their identity, as tensors compare by their entries.
        self._tensors: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def add(self, tensor: Tensor) -> None:
        self._tensors[id(tensor)] = tensor

    @property
    def paged_tensors(self) -> list[Tensor]:
        """In the order in which they were made."""
        return list(self._tensors.values())

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """Start to bring every tensor to its device, or to the host; the newest first."""
        for tensor in reversed(self.paged_tensors):
            prefetch(tensor, to_cpu)


class _HostMemory:
    """The paged memory of a CPU (bnb_core.backend.PagedMemory)."""

    def allocate(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.frombuffer(_mapped_file(numel * dtype.itemsize), dtype=dtype, count=numel)

    def prefetch(self, tensor: Tensor, to_cpu: bool) -> None:
        """The operating system's read-ahead does so."""


_host_memory = _HostMemory()


def _mapped_file(size: int) -> mmap.mmap:
    folder = os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(prefix="bnb_paged_", dir=folder) as file:
            _reserve(file, folder, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot allocate {size} bytes of paged memory in {folder} ({error.strerror}; "
            f"{_free_space(folder)}); set {FOLDER_VARIABLE} to a writable folder with more space",
        ) from error


def _reserve(file: BinaryIO, folder: str, size: int) -> None:
    """Take the blocks now: a disk found full later, on a write to the mapping, would kill the process by SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        file.truncate(size)


def _free_space(folder: str) -> str:
    try:
        return f"{shutil.disk_usage(folder).free} bytes free"
    except OSError:
        return "free space unknown"
