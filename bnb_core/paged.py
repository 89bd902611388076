"""Memory that may exceed RAM: on a CPU, tensors in memory-mapped files.

The kernel writes pages of such a tensor to its file when memory is short and reads them back when they are touched.
The file never outlives the tensor: it has no name from the moment it is mapped, so its blocks are freed when the
mapping ends, also when the process crashes.
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

import torch
from torch import Tensor

FOLDER_VARIABLE = "BNB_PAGED_DIR"


def paged_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor of zeros in paged memory, with the attribute ``is_paged = True``.

    On a CPU it lies in a file in the folder that the environment variable BNB_PAGED_DIR names (default: the system's
    temporary folder, which should not itself be held in memory). The blocks are reserved at once.

    Raises:
        ValueError: a device that has no paged memory here.
        OSError: the folder does not exist, cannot be written to or has too little space; the errno says which.
    """
    device = torch.device(device)
    if device.type != "cpu":
        raise ValueError(f"device: paged memory is available for cpu, got {device}")
    numel = math.prod(shape)
    if numel == 0:
        tensor = torch.zeros(tuple(shape), dtype=dtype)
    else:
        memory = _mapped_file(numel * dtype.itemsize)
        tensor = torch.frombuffer(memory, dtype=dtype, count=numel).view(tuple(shape))
    tensor.is_paged = True  # type: ignore[attr-defined]
    return tensor


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
