"""The weights of a checkpoint, each with all entries that belong to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bnb_core import quant_state
from bnb_core.checkpoints.folder import CheckpointFolder
from bnb_core.checkpoints.headers import CheckpointFileError, StoredTensor
from bnb_core.checkpoints.pipeline import SpanReader
from bnb_core.checkpoints.tasks import Copy, Decode4bit, DecodeInt8, Span, Task
from bnb_core.checks import shown
from bnb_core.quant_state import MOST_PACKED_BYTES, PACKED_KEY, TENSOR_KEYS
from bnb_core.serialization import unpack_tensor_to_dict

SCALES, FORMAT = "SCB", "weight_format"


@dataclass(frozen=True)
class StoredWeight:
    """A weight as it is stored, quantized or not."""

    tensor: StoredTensor
    """Its codes or values."""
    parts: tuple[StoredTensor, ...] = ()
    """What belongs to codes: scales, tables, the JSON entry."""
    format: str = ""
    """``nf4``, ``fp4``, ``int8``; otherwise the dtype in a header."""
    state: dict[str, object] | None = None
    """Of a 4-bit weight: what its JSON entry holds."""

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.tensor.shape if self.state is None else tuple(self.state["shape"])  # type: ignore[arg-type]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """With all its parts."""
        return self.tensor.nbytes + sum(part.nbytes for part in self.parts)

    @property
    def is_quantized(self) -> bool:
        return bool(self.parts)

    @property
    def described(self) -> str:
        """The format in words."""
        if self.state is None:
            return self.format
        nested = ", double quantization" if "nested_blocksize" in self.state else ""
        return f"{self.format}, blocks of {self.state['blocksize']}{nested}"

    def decoded(self, dtype: torch.dtype | None, piece: int, device: torch.device) -> Task:
        """The task that gives the values.

        Args:
            dtype: of the values; None for what they had before, or f32 where that is not known.
        """
        if self.state is not None:
            parts = {part.name: part for part in self.parts}
            return Decode4bit(self.tensor, parts, self.shape, self.state, dtype, piece, device)
        if self.is_quantized:
            scales = next(part for part in self.parts if part.name.endswith(SCALES))
            return DecodeInt8(self.tensor, scales, dtype or torch.float32, piece, device)
        return Copy(self.tensor, piece)


def weights_of(folder: CheckpointFolder) -> list[StoredWeight]:
    """All weights, in the order of the files. A 4-bit weight's few bytes of JSON are read for this, no data.

    Raises:
        CheckpointFileError: parts without codes, or of another kind than bitsandbytes writes.
    """
    tensors = folder.tensors
    owners = {tensor.name: _owner(tensor.name, tensors) for tensor in tensors.values()}
    parts: dict[str, list[StoredTensor]] = {}
    for name, owner in owners.items():
        if owner is not None:
            if owner not in tensors:
                raise CheckpointFileError(
                    f"{tensors[name].file}: {name}: belongs to {owner}, which is missing; expected both in the folder"
                )
            parts.setdefault(owner, []).append(tensors[name])
    with SpanReader() as reader:
        return [_weight(tensors[name], parts.get(name, ()), reader) for name, owner in owners.items() if owner is None]


def _owner(name: str, tensors: dict[str, StoredTensor]) -> str | None:
    """The weight that an entry belongs to; None for an entry of its own."""
    prefix, dot, last = name.rpartition(".")
    if dot and last in TENSOR_KEYS:
        return prefix
    if PACKED_KEY in name:
        return name.partition(f".{PACKED_KEY}")[0]
    if last in (SCALES, FORMAT) and f"{prefix}{dot}weight" in tensors:
        return f"{prefix}{dot}weight"
    return None


def _weight(tensor: StoredTensor, parts: Sequence[StoredTensor], reader: SpanReader) -> StoredWeight:
    if not parts:
        return StoredWeight(tensor, format=tensor.dtype)
    packed = [part for part in parts if PACKED_KEY in part.name]
    if not packed:
        if not any(part.name.endswith(SCALES) for part in parts) or tensor.dtype != "I8":
            raise CheckpointFileError(
                f"{tensor.file}: {tensor.name}: has {', '.join(part.name for part in parts)}, but neither a quant "
                "state nor int8 codes with their scales; expected one of them"
            )
        return StoredWeight(tensor, tuple(parts), "int8")
    if len(packed) > 1 or packed[0].nbytes > MOST_PACKED_BYTES or packed[0].dtype != "U8":
        raise CheckpointFileError(
            f"{tensor.file}: {packed[-1].name}: expected one quant state in U8 of at most {MOST_PACKED_BYTES} bytes, "
            f"got {len(packed)}, the first in {packed[0].dtype} of {packed[0].nbytes}"
        )
    state = _state(packed[0], reader)
    return StoredWeight(tensor, tuple(parts), str(state["quant_type"]), state)


def _state(packed: StoredTensor, reader: SpanReader) -> dict[str, object]:
    try:
        state = unpack_tensor_to_dict(reader.read(Span(packed, 0, packed.nbytes)))
    except ValueError as error:
        raise CheckpointFileError(f"{packed.file}: {packed.name}: {error}") from None
    shape, blocksize = state.get("shape"), state.get("blocksize")
    sound = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sound or type(blocksize) is not int or blocksize < 1 or state.get("dtype") not in quant_state.DTYPES:
        raise CheckpointFileError(
            f"{packed.file}: {packed.name}: expected JSON with a shape, a blocksize and a dtype of "
            f"{', '.join(quant_state.DTYPES)}, got {shown(state)}"
        )
    return state
