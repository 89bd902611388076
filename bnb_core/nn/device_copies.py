"""Copies of what lies in memory-mapped files to where products are computed."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DirectCopies:
    """To a CPU, or a device without streams: a tensor is there when its copy returns.

    On a CPU no threads of torch's take part, which would want the cores of a product.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, source: Tensor) -> Tensor:
        if self._device.type != "cpu":
            return source.to(self._device, copy=True)
        target = torch.empty_like(source)
        np.copyto(_bytes(target).numpy(), _bytes(source).numpy())
        return target

    def arrive(self, tensors: Iterable[Tensor]) -> None:
        """Before they are used."""


class StagedCopies:
    """To a GPU, by way of pinned memory and on a stream of their own, beside which kernels go on.

    There are two buffers, each as large as the largest source; one is filled while the other is copied from. One
    thread copies at a time.

    Args:
        device: of the copies.
        streams: torch's module for the device, such as ``torch.cuda``.
    """

    def __init__(self, device: torch.device, streams: Any) -> None:
        self._device, self._streams = device, streams
        self._stream: Any = None
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied_from: list[Any] = []
        self._turn = 0

    def __call__(self, source: Tensor) -> Tensor:
        if self._stream is None:
            self._stream = self._streams.Stream(self._device)
            self._copied_from = [self._streams.Event(), self._streams.Event()]
        turn, self._turn = self._turn, 1 - self._turn
        self._copied_from[turn].synchronize()
        if self._buffers[turn].numel() < source.nbytes:
            self._buffers[turn] = _pinned(source.nbytes)
        staged = self._buffers[turn][: source.nbytes]
        np.copyto(staged.numpy(), _bytes(source).numpy())
        with self._streams.stream(self._stream):
            target = torch.empty_like(source, device=self._device)
            _bytes(target).copy_(staged, non_blocking=True)
            self._copied_from[turn].record(self._stream)
        return target

    def arrive(self, tensors: Iterable[Tensor]) -> None:
        """The caller's stream waits for the copies, and their memory for its kernels before it is used anew."""
        if self._stream is None:
            return
        current = self._streams.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)


def copies_to(device: torch.device) -> DirectCopies | StagedCopies:
    """Staged where torch's module for the device has streams."""
    streams = None if device.type == "cpu" else getattr(torch, device.type, None)
    has_streams = all(hasattr(streams, name) for name in ("Stream", "Event", "stream", "current_stream"))
    return StagedCopies(device, streams) if has_streams else DirectCopies(device)


_madvise: Any = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_WILLNEED") else None
if _madvise is not None:
    _madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def will_need(source: Tensor) -> None:
    """Have the system read a memory-mapped tensor in one go, where it can, rather than a few pages at each fault."""
    if _madvise is not None and source.nbytes:
        begin = source.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise(begin, source.data_ptr() + source.nbytes - begin, mmap.MADV_WILLNEED)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
