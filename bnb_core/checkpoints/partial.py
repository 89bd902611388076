"""The folder in which a checkpoint is made: it takes its place as a whole, or is gone on with after an interruption.

`OUT.partial/journal` has a line for each tensor whose bytes are on the disk; `OUT.partial/checkpoint` becomes `OUT`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnb_core.checkpoints.headers import CheckpointFileError

try:
    import fcntl
except ImportError:  # Windows: two at once are not noticed there
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".partial"


class Partial:
    """An unfinished checkpoint; use :func:`partial_folder`."""

    def __init__(self, out: Path, folder: Path, journal: Any) -> None:
        self.out = out
        self.folder = folder
        self._journal = journal
        self.done: dict[tuple[str, str], dict[str, str]] = {}
        """The texts of each tensor that is written, by shard and name."""

    @property
    def checkpoint(self) -> Path:
        """Where the files are made."""
        return self.folder / "checkpoint"

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Read what an earlier run has done; or, in a new folder, write down what is to be done.

        Raises:
            CheckpointFileError: the folder was begun for something else.
        """
        lines = self._whole_lines()
        if not lines:
            self._append([dict(plan)])
        elif lines[0] != json.loads(json.dumps(plan)):
            raise CheckpointFileError(
                f"{self.folder}: was begun from another input or with other options; go on with those, or remove it"
            )
        for line in lines[1:]:
            self.done[line["shard"], line["tensor"]] = line["texts"]
        self.checkpoint.mkdir(exist_ok=True)

    def _whole_lines(self) -> list[dict[str, Any]]:
        """Those that were written to their end; what follows them is cut off."""
        self._journal.seek(0)
        content = self._journal.read()
        end = content.rfind(b"\n") + 1
        self._journal.truncate(end)
        self._journal.seek(end)
        try:
            return [json.loads(line) for line in content[:end].splitlines()]
        except ValueError as error:
            raise CheckpointFileError(f"{self.folder}: its journal is damaged ({error}); remove the folder") from None

    def _append(self, lines: list[dict[str, Any]]) -> None:
        self._journal.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def record(self, shard: str, texts: Mapping[str, Mapping[str, str]]) -> None:
        """That these tensors are on the disk, each with its texts."""
        if texts:
            self._append([{"shard": shard, "tensor": name, "texts": dict(each)} for name, each in texts.items()])
            self.done.update({(shard, name): dict(each) for name, each in texts.items()})

    def finish(self) -> None:
        """Put the checkpoint in its place, at once."""
        for path in (*self.checkpoint.rglob("*"), self.checkpoint):
            _sync(path)
        refuse_existing(self.out)
        self.checkpoint.rename(self.out)
        _sync(self.out.parent)


@contextmanager
def partial_folder(out: Path) -> Iterator[Partial]:
    """The folder beside ``out`` in which it is made; it is removed in the end, and stays where something fails.

    Raises:
        CheckpointFileError: ``out`` exists, or another process makes it.
        OSError: the folder cannot be made.
    """
    folder = out.with_name(out.name + SUFFIX)
    if out.exists() and folder.is_dir() and not (folder / "checkpoint").exists():
        shutil.rmtree(folder)  # of a run that was killed after all was done
    refuse_existing(out)
    folder.mkdir(exist_ok=True, parents=True)
    with (folder / "journal").open("a+b") as journal:
        if fcntl is not None:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointFileError(
                    f"{folder}: another process is making {out}; wait for it, or choose another name"
                ) from None
        partial = Partial(out, folder, journal)
        yield partial
        shutil.rmtree(folder)


def refuse_existing(out: Path) -> None:
    """Raise where the result would replace something."""
    if os.path.lexists(out):
        raise CheckpointFileError(f"{out}: exists; choose another name, or remove it")


def _sync(path: Path) -> None:
    """Have a file or a folder on the disk."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
