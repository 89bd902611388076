"""Converts a checkpoint, shard by shard, tensor by tensor: what quantizing and dequantizing have in common."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnb_core.checkpoints.folder import CONFIG, INDEX, CheckpointFolder
from bnb_core.checkpoints.headers import CheckpointFileError
from bnb_core.checkpoints.partial import Partial, partial_folder
from bnb_core.checkpoints.pipeline import reading_ahead, writing_behind
from bnb_core.checkpoints.shard import ShardWriter
from bnb_core.checkpoints.tasks import Task
from bnb_core.version import __version__

MOST_PIECE = 16 * 2**20
"""Bytes of a tensor that are read at once. A handful of pieces is in memory at a time."""
LEAST_PIECE = 2**20
SYNC_BYTES = 128 * 2**20
"""What is written between two moments from which a killed run is gone on with."""


@dataclass(frozen=True)
class Progress:
    """What a conversion tells of itself, as functions that do nothing unless they are given."""

    total: Callable[[int], None] = field(default=lambda nbytes: None)
    """Called once: how many bytes will be read."""
    advance: Callable[[int], None] = field(default=lambda nbytes: None)
    """Called with how many more have been read."""
    resumed: Callable[[int], None] = field(default=lambda nbytes: None)
    """Called once where an earlier run has read some."""


def piece_bytes(folder: CheckpointFolder) -> int:
    """How much of a tensor is read at once: less where all tensors are small, as memory is bounded by the largest."""
    largest = max((tensor.nbytes for tensor in folder.tensors.values()), default=0)
    return max(min(MOST_PIECE, largest // 8), LEAST_PIECE)


def convert(
    folder: CheckpointFolder,
    out: Path,
    tasks: Mapping[str, Sequence[Task]],
    config: Mapping[str, Any] | None,
    options: Mapping[str, Any],
    progress: Progress,
    sync_bytes: int = SYNC_BYTES,
) -> int:
    """Make the checkpoint ``out`` by these tasks, go on with what an earlier run has left, or leave nothing there.

    Args:
        tasks: by the name of the file that they write.
        config: the contents of config.json.
        options: what the result depends on beside the input; a run is gone on with under the same ones only.

    Returns:
        The bytes of the tensors written.

    Raises:
        CheckpointFileError: ``out`` exists, there is too little room, or a tensor cannot be converted.
        OSError: what cannot be read or written.
    """
    with partial_folder(out) as partial:
        writers = {name: ShardWriter(partial, name, each, sync_bytes) for name, each in tasks.items()}
        partial.begin(_plan(folder, options))
        _check_room(partial, writers)
        done = {(shard, task.name) for shard, each in tasks.items() for task in each} & partial.done.keys()
        progress.total(sum(task.nbytes_read for each in tasks.values() for task in each))
        progress.resumed(sum(t.nbytes_read for s, each in tasks.items() for t in each if (s, t.name) in done))
        sizes: dict[str, dict[str, int]] = {}
        for name, writer in writers.items():
            with writer:
                _run([task for task in tasks[name] if (name, task.name) not in done], writer, progress)
                sizes[name] = writer.finish()
        if folder.index is not None or len(sizes) > 1:
            _write_index(partial.checkpoint / (folder.index or f"model{INDEX}"), sizes)
        for relative in folder.other_files():
            (partial.checkpoint / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / relative, partial.checkpoint / relative)
        if config is not None:
            (partial.checkpoint / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        partial.finish()
    return sum(nbytes for each in sizes.values() for nbytes in each.values())


def _plan(folder: CheckpointFolder, options: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same for a run to be gone on with."""
    files = [(name, folder.path / name) for name in folder.shards]
    stats = [(name, path.stat()) for name, path in files]
    return {
        "bnb_core": __version__,
        "input": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "options": dict(options),
    }


def _check_room(partial: Partial, writers: Mapping[str, ShardWriter]) -> None:
    """Before any work: what is still to be written fits on the disk."""
    blocks = [path.stat().st_size for path in partial.checkpoint.glob("*") if path.is_file()]
    needed = sum(writer.most_bytes for writer in writers.values()) - sum(blocks)
    free = shutil.disk_usage(partial.folder).free
    if needed > free:
        raise CheckpointFileError(f"{partial.out}: needs {needed:,} more bytes on the disk, which has {free:,} free")


def _run(tasks: Sequence[Task], writer: ShardWriter, progress: Progress) -> None:
    def write(task: Task, name: str | None, piece: Any) -> None:
        if name is None:
            writer.end_task(task)
        else:
            writer.write(name, piece)

    spans = (span for task in tasks for span in task.spans)
    with reading_ahead(spans, progress.advance) as buffers, writing_behind(write) as hand_over:
        for task in tasks:
            for name, piece in task.run(_next(buffers, len(task.spans))):
                hand_over(task, name, piece)
            hand_over(task, None, None)


def _next(buffers: Iterator[Any], count: int) -> Iterator[Any]:
    """The next so many; an iterator that knows its end."""
    for _ in range(count):
        yield next(buffers)


def _write_index(path: Path, sizes: Mapping[str, Mapping[str, int]]) -> None:
    content = {
        "metadata": {"total_size": sum(nbytes for each in sizes.values() for nbytes in each.values())},
        "weight_map": {tensor: name for name, each in sizes.items() for tensor in sorted(each)},
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
