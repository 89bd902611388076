"""A folder of safetensors files as Transformers keeps a model: shards, their index, config.json, other files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnb_core.checkpoints.headers import CheckpointFileError, Header, StoredTensor, read_header

CONFIG = "config.json"
QUANTIZATION = "quantization_config"
INDEX = ".safetensors.index.json"
WEIGHTS = "model.safetensors"
OTHER_WEIGHTS = re.compile(r"\.(bin|pt|pth|ckpt|h5|msgpack|onnx|gguf|ot|tflite|mlmodel)(\.index\.json)?$|\.onnx_data$")
"""Files that hold the same weights in other forms; a converted folder has none of them."""


@dataclass(frozen=True)
class CheckpointFolder:
    """What is in a folder, by its file names and headers."""

    path: Path
    shards: Mapping[str, Header]
    """By file name."""
    config: dict[str, Any] | None
    index: str | None = None
    """The name of the file that says which file holds which tensor."""

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name."""
        return {tensor.name: tensor for header in self.shards.values() for tensor in header.tensors}

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config of config.json."""
        return None if self.config is None else self.config.get(QUANTIZATION)

    def other_files(self) -> Iterator[Path]:
        """What belongs to a model beside its weights: configurations, tokenizers, code. Relative paths."""
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if any(part.startswith(".") for part in relative.parts) or not path.is_file():
                continue
            name = path.name
            if name.endswith((".safetensors", INDEX)) or OTHER_WEIGHTS.search(name) or relative == Path(CONFIG):
                continue
            yield relative


def open_checkpoint(path: Path) -> CheckpointFolder:
    """Read the headers of a folder of safetensors files, or of one such file.

    Raises:
        CheckpointFileError: no such files, a missing shard, a malformed or truncated file, a tensor in two files.
        OSError: what cannot be read.
    """
    if path.is_file():
        return CheckpointFolder(path.parent, {path.name: read_header(path)}, None)
    if not path.is_dir():
        raise CheckpointFileError(f"{path}: no such folder; give a folder of safetensors files, or one such file")
    index = _index_of(path)
    names = _shard_names(path) if index is None else _indexed_names(index)
    shards = {name: read_header(path / name) for name in names}
    _check_unique(shards)
    if index is not None:
        _check_indexed(index, shards)
    return CheckpointFolder(path, shards, _config(path / CONFIG), index.name if index else None)


def _index_of(path: Path) -> Path | None:
    indices = sorted(path.glob(f"*{INDEX}"))
    if len(indices) > 1:
        raise CheckpointFileError(f"{path}: expected one index, found {', '.join(each.name for each in indices)}")
    return indices[0] if indices else None


def _shard_names(path: Path) -> list[str]:
    """Where there is no index."""
    names = sorted(each.name for each in path.glob("*.safetensors"))
    if not names:
        raise CheckpointFileError(
            f"{path}: no safetensors files in this folder; convert its weights to safetensors first"
        )
    return [WEIGHTS] if WEIGHTS in names else names


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = _json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFileError(f"{index}: expected a weight_map of names of tensors to names of files")
    return weight_map


def _indexed_names(index: Path) -> list[str]:
    names = sorted({name if isinstance(name, str) else "" for name in _weight_map(index).values()})
    for name in names:
        if not name or Path(name).name != name:
            raise CheckpointFileError(f"{index}: expected names of files in this folder, got {name!r}")
        if not (index.parent / name).is_file():
            raise CheckpointFileError(
                f"{index.parent / name}: missing, though {index.name} names it; copy or download that file, too"
            )
    return names


def _check_indexed(index: Path, shards: Mapping[str, Header]) -> None:
    found = {tensor.name: name for name, header in shards.items() for tensor in header.tensors}
    for tensor, name in _weight_map(index).items():
        if found.get(tensor) != name:
            raise CheckpointFileError(
                f"{index.parent / name}: lacks {tensor}, which {index.name} says it holds"
                "; take the index and the files from the same place"
            )


def _check_unique(shards: Mapping[str, Header]) -> None:
    seen: dict[str, Path] = {}
    for header in shards.values():
        for tensor in header.tensors:
            if tensor.name in seen:
                raise CheckpointFileError(
                    f"{tensor.file}: {tensor.name}: also in {seen[tensor.name].name}; expected each tensor in one file"
                )
            seen[tensor.name] = tensor.file


def _config(path: Path) -> dict[str, Any] | None:
    return _json_object(path) if path.exists() else None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointFileError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointFileError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    return content
