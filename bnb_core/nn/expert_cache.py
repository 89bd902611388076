"""Weights of experts on a device for a number of bytes, and their reading ahead of use in a thread."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from bnb_core.nn.device_copies import copies_to

Copy = Callable[[Tensor], Tensor]
Read = Callable[[list[Any], Copy], Iterable[Tensor]]
"""Gives what belongs to keys, in their order, each moved by the copy to where it is used."""


class ExpertCache:
    """Weights of experts on a device, up to a number of bytes; those used longest ago leave first.

    Counted are the weights that lie here and those that are being read ahead. The weights of one product, side by
    side, are a copy of their own and not counted. Of those that were read ahead, what the next batch has not asked for
    leaves first.

    Weights for a GPU go by two pinned buffers in the host's memory, each of the size of one and not counted, and on a
    stream of their own; this has not run on hardware yet. A copy of a cache, by ``copy`` or ``pickle``, is empty.

    Args:
        limit: bytes.
        device: where the products are computed.

    ``bytes`` says how many it holds, ``hits`` and ``misses`` how often an expert was there or had to be read. Of the
    misses, ``reads_ahead_used`` had been read before they were asked for; ``reads_ahead`` counts all such reads.
    """

    def __init__(self, limit: int, device: torch.device | str = "cpu") -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ValueError(f"limit: expected a positive number of bytes, got {limit!r}")
        self.limit, self.device = limit, torch.device(device)
        self.bytes = self.hits = self.misses = self.reads_ahead = self.reads_ahead_used = 0
        self._copies = copies_to(self.device)
        self._kept: OrderedDict[Any, Tensor] = OrderedDict()
        self._unused: set[Any] = set()
        self._lock = threading.Lock()
        self._reading: _ReadAhead | None = None
        self._start_reader()

    def _start_reader(self) -> None:
        # Its thread starts with the first reading, and ends when the executor goes, with the cache.
        self._reader, self._process = ThreadPoolExecutor(1, "bnb_core reads experts ahead"), os.getpid()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit, self.device)

    def __del__(self) -> None:
        if getattr(self, "_reading", None) is not None:
            self._reading.ending = True  # type: ignore[union-attr]

    def get(self, keys: Sequence[Any], read: Read) -> list[Tensor]:
        """What belongs to these keys; those that are not there are read in one call. A reading ahead ends here.

        They are all given, even where they are more than the limit; then not all of them are kept.

        Raises:
            Exception: that of the read, or of a reading ahead that failed at one of the keys.
        """
        with self._lock:
            self._take_over(keys)
            missing = [key for key in keys if key not in self._kept]
            found = {key: self._kept[key] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            ahead = len(self._unused.intersection(keys))
            self._unused.difference_update(keys)
            self.reads_ahead_used += ahead
            self.hits, self.misses = self.hits + len(found) - ahead, self.misses + len(missing) + ahead
            if missing:
                for key, tensor in zip(missing, read(missing, self._copies), strict=True):
                    found[key] = tensor
                    self._keep(key, tensor)
            self._copies.arrive(found.values())
            return [found[key] for key in keys]

    def read_ahead(self, keys: Sequence[Any], size: int, read: Read, needed: Collection[Any]) -> None:
        """Begin to read what is not there, in a thread: as many as find room beside what is here of ``needed``.

        Args:
            keys: those that are wanted first come first.
            size: bytes of each.
            read: as of :meth:`get`; the thread keeps it until it ends, so it should not lead to the cache.
            needed: keys of what must not leave for it.
        """
        with self._lock:
            self._take_over(())
            staying = {*keys, *needed}
            missing = [key for key in keys if key not in self._kept]
            room = self.limit - sum(self._kept[key].nbytes for key in staying if key in self._kept)
            missing = missing[: max(0, room) // size]
            if missing:
                self._make_room(len(missing) * size, staying)
                reading = _ReadAhead(missing, size)
                reading.future = self._reader.submit(reading.run, read, self._copies)
                self._reading = reading
                self.bytes += len(missing) * size

    def _take_over(self, keys: Collection[Any]) -> None:
        """End the reading ahead and keep what it has read; what is not among the keys leaves first."""
        forked, reading = self._process != os.getpid(), self._reading
        if forked:  # The thread has stayed behind.
            self._start_reader()
        if reading is not None:
            reading.ending = True
            if not (forked or reading.future.cancel()):
                reading.future.result()
            self._reading = None
            self.bytes -= reading.size * len(reading.keys)
            self.reads_ahead += len(reading.done)
            for key, tensor in reading.done.items():
                self._keep(key, tensor)
            self._unused.update(self._kept.keys() & reading.done.keys())
            if reading.error is not None and reading.keys[len(reading.done)] in keys:
                raise reading.error
        for key in self._unused.difference(keys):
            self._kept.move_to_end(key, last=False)

    def _keep(self, key: Any, tensor: Tensor) -> None:
        self._make_room(tensor.nbytes)
        if tensor.nbytes <= self.limit:
            self._kept[key] = tensor
            self.bytes += tensor.nbytes

    def _make_room(self, size: int, staying: Collection[Any] = ()) -> None:
        leaving, room = [], self.limit - self.bytes
        for key, tensor in self._kept.items():
            if room >= size:
                break
            if key not in staying:
                leaving.append(key)
                room += tensor.nbytes
        for key in leaving:
            self.bytes -= self._kept.pop(key).nbytes
            self._unused.discard(key)


class _ReadAhead:
    """Keys that a thread reads, one after the other, until it is told to end."""

    future: Future[None]

    def __init__(self, keys: list[Any], size: int) -> None:
        self.keys, self.size = keys, size
        self.done: dict[Any, Tensor] = {}
        self.error: Exception | None = None
        self.ending = False

    def run(self, read: Read, copy: Copy) -> None:
        try:
            for key, tensor in zip(self.keys, read(self.keys, copy), strict=True):
                self.done[key] = tensor
                if self.ending:
                    return
        except Exception as error:
            self.error = error
