"""Reads ahead, converts, writes behind: three threads with a few pieces between them."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import torch
from torch import Tensor

from bnb_core.checkpoints.headers import CheckpointFileError
from bnb_core.checkpoints.tasks import Span

READ_AHEAD = 1
"""Pieces that wait to be converted, beside one being read and one being converted."""
WRITE_BEHIND = 2
_POLL = 0.1
_END = object()


class _Stopped(Exception):
    """The other side of a queue is gone."""


class _Channel:
    """A queue of a few items; a side that ends, ends the other one."""

    def __init__(self, size: int) -> None:
        self.queue: Queue[Any] = Queue(size)
        self.stopped = threading.Event()

    def put(self, item: Any) -> None:
        while not self.stopped.is_set():
            try:
                return self.queue.put(item, timeout=_POLL)
            except Full:
                continue
        raise _Stopped

    def get(self) -> Any:
        while True:
            try:
                return self.queue.get(timeout=_POLL)
            except Empty:
                if self.stopped.is_set():
                    raise _Stopped from None


class SpanReader:
    """Reads spans, each file opened once."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> SpanReader:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def read(self, span: Span) -> Tensor:
        """The bytes, u8 in fresh memory.

        Raises:
            CheckpointFileError: the file ends before.
        """
        path = span.tensor.file
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        memory = _fresh_memory(span.nbytes)
        view, at = memoryview(memory)[: span.nbytes], span.tensor.start + span.begin
        while view:
            got = _read_into(self._files[path], view, at)
            if not got:
                raise CheckpointFileError(
                    f"{path}: truncated: it ends within {span.tensor.name}; copy or download the file again"
                )
            view, at = view[got:], at + got
        return torch.frombuffer(memory, dtype=torch.uint8)[: span.nbytes]


def _fresh_memory(nbytes: int) -> mmap.mmap:
    """Not from malloc, which keeps what is freed for each thread; in huge pages, where the system has them."""
    if os.name == "nt":
        return mmap.mmap(-1, max(nbytes, 1))
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _read_into(file: int, view: memoryview, at: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], at)
    os.lseek(file, at, os.SEEK_SET)
    data = os.read(file, len(view))
    view[: len(data)] = data
    return len(data)


@contextmanager
def reading_ahead(spans: Iterable[Span], on_bytes: Callable[[int], None]) -> Iterator[Iterator[Tensor]]:
    """The bytes of each span in turn, read by a thread.

    Args:
        on_bytes: called with the size of each span when it is taken.
    """
    channel = _Channel(READ_AHEAD)

    def read() -> None:
        try:
            with SpanReader() as reader:
                for span in spans:
                    channel.put(reader.read(span))
            channel.put(_END)
        except _Stopped:
            pass
        except BaseException as error:
            channel.put(error)

    def taken() -> Iterator[Tensor]:
        while (item := channel.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            on_bytes(item.numel())
            yield item

    thread = threading.Thread(target=read, name="read ahead", daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        channel.stopped.set()
        thread.join()


@contextmanager
def writing_behind(write: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """A function that has a thread call ``write`` with its arguments, in order; all is written in the end.

    What ``write`` raises is raised by the next call, or in the end.
    """
    channel = _Channel(WRITE_BEHIND)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while (arguments := channel.get()) is not _END:
                write(*arguments)
        except _Stopped:
            pass
        except BaseException as error:
            failed.append(error)
            channel.stopped.set()

    def hand_over(*arguments: Any) -> None:
        try:
            channel.put(arguments)
        except _Stopped:
            raise failed[0] from None

    thread = threading.Thread(target=work, name="write behind", daemon=True)
    thread.start()
    with ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(channel.stopped.set)
        yield hand_over
        stack.pop_all()
        with suppress(_Stopped):
            channel.put(_END)
        thread.join()
    if failed:
        raise failed[0]
