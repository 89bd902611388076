"""What the headers of safetensors files say, without reading or mapping the data."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bnb_core.checks import shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in a header. A tensor of another dtype can be copied, not computed with."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = struct.Struct("<Q")
"""A file begins with the bytes of its header."""
MOST_HEADER_BYTES = 100_000_000
"""What the library safetensors takes."""
METADATA = "__metadata__"


class CheckpointFileError(ValueError):
    """A checkpoint that cannot be used; the message begins with the file or the tensor."""


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    name: str
    dtype: str
    """By its name in the header."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Byte in the file."""
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Header(NamedTuple):
    """Of one file."""

    tensors: tuple[StoredTensor, ...]
    """In the order of their data."""
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The tensors of a safetensors file.

    Raises:
        CheckpointFileError: it is no such file, or it is truncated.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(LENGTH.size)
        length = LENGTH.unpack(prefix)[0] if len(prefix) == LENGTH.size else 0
        if not 2 <= length <= MOST_HEADER_BYTES:
            raise CheckpointFileError(
                f"{path}: no safetensors file: its header would have {length} bytes"
                "; give a file that ends in .safetensors, downloaded whole"
            )
        text = file.read(length)
    if len(text) < length:
        raise CheckpointFileError(
            f"{path}: truncated: a header of {length} bytes in a file of {size}; copy or download the file again"
        )
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointFileError(f"{path}: no safetensors file: its header is not JSON: {error}") from None
    if not isinstance(entries, dict):
        raise CheckpointFileError(
            f"{path}: no safetensors file: its header is a {type(entries).__name__}, expected a JSON object"
        )
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise CheckpointFileError(f"{path}: {METADATA}: expected an object, got {shown(metadata)}")
    data = LENGTH.size + length
    tensors = sorted((_entry(path, data, name, entry) for name, entry in entries.items()), key=lambda t: t.start)
    _check_contiguous(path, tensors, data, size)
    return Header(tuple(tensors), metadata)


def _entry(path: Path, data: int, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
    except (TypeError, ValueError, KeyError):
        whole = False
    if not whole or end < begin or not isinstance(dtype, str):
        raise CheckpointFileError(f"{path}: {name}: no entry of a safetensors header: {shown(entry)}")
    tensor = StoredTensor(name, dtype, shape, path, data + begin, end - begin)
    if dtype in DTYPES and tensor.numel * DTYPES[dtype].itemsize != tensor.nbytes:
        raise CheckpointFileError(
            f"{path}: {name}: {dtype} of shape {shape} does not have {tensor.nbytes} bytes"
            "; copy or download the file again"
        )
    return tensor


def _check_contiguous(path: Path, tensors: Iterable[StoredTensor], data: int, size: int) -> None:
    end = data
    for tensor in tensors:
        if tensor.start != end:
            raise CheckpointFileError(
                f"{path}: {tensor.name}: its data overlap or leave a hole, expected one tensor after the other"
            )
        end += tensor.nbytes
    if end > size:
        raise CheckpointFileError(
            f"{path}: truncated: its header tells of {end} bytes, the file has {size}; copy or download the file again"
        )
    if end < size:
        raise CheckpointFileError(f"{path}: {size - end} bytes follow the last tensor, expected none")


def header_bytes(entries: Mapping[str, Mapping[str, Any]], length: int | None = None) -> bytes:
    """A header with the length before it, padded with spaces to a multiple of 8, or to ``length`` bytes in all."""
    text = json.dumps({METADATA: {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    if length is None:
        length = -(-(LENGTH.size + len(text)) // 8) * 8
    return LENGTH.pack(length - LENGTH.size) + text.ljust(length - LENGTH.size)
