"""One file of a checkpoint, written piece by piece at places that are known before."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bnb_core.checkpoints.headers import DTYPES, header_bytes
from bnb_core.checkpoints.partial import Partial
from bnb_core.checkpoints.tasks import Output, Task


class ShardWriter:
    """Writes the outputs of tasks to a file and, from time to time, to the journal what is on the disk.

    The order of the data is that of the library safetensors: large items first, then by name, so that each is aligned;
    entries of JSON, whose length only their numbers tell, come last. The header is written when all is known, in the
    room that it takes at most.

    Args:
        sync_bytes: how many may be written before what is done is made sure of.
    """

    def __init__(self, partial: Partial, name: str, tasks: Sequence[Task], sync_bytes: int) -> None:
        self.partial = partial
        self.name = name
        self.tasks = tasks
        self.sync_bytes = sync_bytes
        outputs = sorted(
            (output for task in tasks for output in task.outputs),
            key=lambda output: (-DTYPES[output.dtype].itemsize, output.name),
        )
        self._begin: dict[str, int] = {}
        self._outputs = {output.name: output for output in outputs}
        end = 0
        for output in outputs:
            self._begin[output.name] = end
            end += output.nbytes
        self.data_bytes = end
        longest = {name: size for task in tasks for name, size in task.texts.items()}
        self.header_length = len(header_bytes(self._entries(longest)))
        self.most_bytes = self.header_length + end + sum(longest.values())
        self._file = -1
        self._written: dict[str, int] = {}
        self._texts: dict[str, str] = {}
        self._finished: dict[str, dict[str, str]] = {}
        self._unsynced = 0

    def __enter__(self) -> ShardWriter:
        path: Path = self.partial.checkpoint / self.name
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def _entries(self, text_sizes: Mapping[str, int]) -> dict[str, Any]:
        """The header's, in the order of the data."""
        entries = {name: _entry(output, self._begin[name], output.nbytes) for name, output in self._outputs.items()}
        end = self.data_bytes
        for name in sorted(text_sizes):
            entries[name] = _entry(Output(name, "U8", (text_sizes[name],)), end, text_sizes[name])
            end += text_sizes[name]
        return entries

    def write(self, name: str, piece: Tensor) -> None:
        """The next piece of an output, or a text."""
        data = memoryview(piece.contiguous().view(-1).view(DTYPES["U8"]).numpy())  # type: ignore[arg-type]
        if name not in self._begin:
            self._texts[name] = bytes(data).decode()
            return
        written = self._written.get(name, 0)
        self._write_at(data, self.header_length + self._begin[name] + written)
        self._written[name] = written + len(data)
        self._unsynced += len(data)

    def end_task(self, task: Task) -> None:
        """All of a task's pieces have been written."""
        for output in task.outputs:
            written = self._written.pop(output.name, 0)
            if written != output.nbytes:
                raise AssertionError(f"{output.name}: {written} bytes were written instead of {output.nbytes}")
        self._finished[task.name] = {name: self._texts.pop(name) for name in task.texts}
        if self._unsynced >= self.sync_bytes:
            self.sync()

    def sync(self) -> None:
        """Make sure of what is done, and say so in the journal."""
        os.fsync(self._file)
        self.partial.record(self.name, self._finished)
        self._finished, self._unsynced = {}, 0

    def finish(self) -> dict[str, int]:
        """Write the texts and the header once all tasks are done; gives the bytes of each entry."""
        self.sync()
        texts = {
            name: text.encode() for task in self.tasks for name, text in self.partial.done[self.name, task.name].items()
        }
        sizes = {name: len(text) for name, text in texts.items()}
        data = b"".join(texts[name] for name in sorted(texts))
        self._write_at(memoryview(data), self.header_length + self.data_bytes)
        os.ftruncate(self._file, self.header_length + self.data_bytes + len(data))
        self._write_at(memoryview(header_bytes(self._entries(sizes), self.header_length)), 0)
        os.fsync(self._file)
        return {**{name: output.nbytes for name, output in self._outputs.items()}, **sizes}

    def _write_at(self, data: memoryview, at: int) -> None:
        while data:
            if hasattr(os, "pwrite"):
                count = os.pwrite(self._file, data, at)
            else:
                os.lseek(self._file, at, os.SEEK_SET)
                count = os.write(self._file, data)
            data, at = data[count:], at + count


def _entry(output: Output, begin: int, nbytes: int) -> dict[str, Any]:
    return {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [begin, begin + nbytes]}
