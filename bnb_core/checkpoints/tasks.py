"""How a tensor of one checkpoint becomes entries of another, piece by piece, so that no tensor is held as a whole."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnb_core import functional, quant_state
from bnb_core.checkpoints.experts import Experts
from bnb_core.checkpoints.headers import DTYPES, NAMES, CheckpointFileError, StoredTensor
from bnb_core.checks import BLOCKSIZES
from bnb_core.formats import FORMATS
from bnb_core.functional import QuantState
from bnb_core.primitives import block_count, packed_numel
from bnb_core.quant_state import PACKED_KEY
from bnb_core.quantize import QuantizationConfig
from bnb_core.records import NESTED_BLOCKSIZE
from bnb_core.utils import LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING

WHOLE_BLOCKS = max(BLOCKSIZES)
"""A piece of a tensor has a multiple of these elements, so that it begins with a block, and its codes with a byte."""
LONGEST_OFFSET = torch.tensor(-1.1754943508222875e-38)
"""No f32 takes more digits in JSON."""


class Span(NamedTuple):
    """Bytes that a task reads, all at once."""

    tensor: StoredTensor
    begin: int
    """Byte in the tensor."""
    nbytes: int


class Output(NamedTuple):
    """An entry of the new checkpoint."""

    name: str
    dtype: str
    """By its name in a header."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Task(ABC):
    """One tensor to convert, a weight with its scales or a plain one."""

    name: str
    outputs: tuple[Output, ...]
    """Their sizes are known before anything is read."""
    texts: dict[str, int]
    """Entries of JSON, whose lengths depend on their numbers: name to the most bytes."""
    spans: tuple[Span, ...]

    @abstractmethod
    def run(self, buffers: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The next piece of an output, or a whole text, by the entry's name; the pieces of an entry in order.

        Args:
            buffers: u8, the bytes of each span.
        """

    @property
    def nbytes_read(self) -> int:
        return sum(span.nbytes for span in self.spans)


def spans_of(tensor: StoredTensor, piece: int) -> tuple[Span, ...]:
    """All of a tensor, in pieces of at most ``piece`` bytes, but of at least one."""
    piece = max(piece, 1)
    return tuple(Span(tensor, at, min(piece, tensor.nbytes - at)) for at in range(0, tensor.nbytes, piece))


def whole_blocks(tensor: StoredTensor, piece: int) -> int:
    """The bytes of a piece that has whole blocks."""
    unit = WHOLE_BLOCKS * DTYPES[tensor.dtype].itemsize
    return max(piece // unit, 1) * unit


class Copy(Task):
    """The tensor as it is, whatever its dtype."""

    def __init__(self, tensor: StoredTensor, piece: int) -> None:
        self.name = tensor.name
        if tensor.dtype not in DTYPES:
            raise CheckpointFileError(
                f"{tensor.file}: {tensor.name}: dtype {tensor.dtype} is none of {', '.join(DTYPES)}"
            )
        self.outputs = (Output(tensor.name, tensor.dtype, tensor.shape),)
        self.texts = {}
        self.spans = spans_of(tensor, piece)

    def run(self, buffers: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
        for buffer in buffers:
            yield self.name, buffer


class Encode(Task):
    """A float matrix, in pieces of values on the device that quantizes them."""

    def __init__(self, tensor: StoredTensor, transposed: bool, piece: int, device: torch.device) -> None:
        self.name = tensor.name
        self.tensor = tensor
        self.dtype = DTYPES[tensor.dtype]
        self.transposed = transposed
        self.device = device
        rows, columns = tensor.shape
        self.shape: tuple[int, ...] = (columns, rows) if transposed else (rows, columns)
        self.piece = piece
        self.texts = {}

    def _values(self, buffers: Iterator[Tensor], unit: int) -> Iterator[Tensor]:
        """The matrix, as [rows of the piece, columns] or flat; pieces have a multiple of ``unit`` elements."""
        if not self.transposed:
            for buffer in buffers:
                yield buffer.view(self.dtype).to(self.device)
            return
        stored = next(buffers).view(self.dtype).view(self.tensor.shape)
        columns = self.shape[1]
        rows = max(self.piece // (columns * self.dtype.itemsize), 1)
        step = math.lcm(columns, unit) // columns
        rows = max(rows // step, 1) * step
        for at in range(0, self.shape[0], rows):
            yield stored[:, at : at + rows].T.contiguous().view(-1).to(self.device)

    def _spans(self, piece: int) -> tuple[Span, ...]:
        return spans_of(self.tensor, max(self.tensor.nbytes, 1) if self.transposed else piece)


class Encode4bit(Encode):
    """To packed codes with their scales and a quant state."""

    def __init__(
        self, tensor: StoredTensor, transposed: bool, config: QuantizationConfig, piece: int, device: torch.device
    ) -> None:
        super().__init__(tensor, transposed, piece, device)
        self._lay_out(config, self._spans(whole_blocks(tensor, piece)))

    def _lay_out(self, config: QuantizationConfig, spans: tuple[Span, ...]) -> None:
        self.config, self.spans = config, spans
        numel, storage = math.prod(self.shape), config.quant_storage
        blocks = block_count(numel, config.blocksize)
        like = self._quant_state(torch.empty(0), LONGEST_OFFSET if config.double_quantization else None)
        entries = like.as_dict(packed=True)
        self.text_name = next(f"{self.name}.{key}" for key in entries if key.startswith(PACKED_KEY))
        shapes = {"absmax": (blocks,), "nested_absmax": (block_count(blocks, NESTED_BLOCKSIZE),), "quant_map": (16,)}
        shapes["nested_quant_map"] = (256,)
        self.outputs = (
            Output(self.name, NAMES[storage], (packed_numel(numel, storage), 1)),
            *(
                Output(f"{self.name}.{key}", NAMES[value.dtype], shapes[key])
                for key, value in entries.items()
                if key in shapes
            ),
        )
        self.texts = {self.text_name: entries[self.text_name.removeprefix(f"{self.name}.")].numel()}

    def _check(self, absmax: Tensor) -> None:
        _check_finite(self.tensor, absmax)

    def _quant_state(self, absmax: Tensor, offset: Tensor | None = None) -> QuantState:
        config, state2 = self.config, None
        if config.double_quantization:
            absmax, mean, state2 = functional.quantize_absmax(absmax)
            offset = mean if offset is None else offset
        code = functional.get_4bit_type(config.method, "cpu")
        return QuantState(absmax, self.shape, code, config.blocksize, config.method, self.dtype, offset, state2)

    def run(self, buffers: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
        config, at = self.config, 0
        absmax = torch.empty(block_count(math.prod(self.shape), config.blocksize))
        for values in self._values(buffers, WHOLE_BLOCKS):
            packed, state = functional.quantize_4bit(
                values, blocksize=config.blocksize, quant_type=config.method, quant_storage=config.quant_storage
            )
            absmax[at : at + len(state.absmax)] = state.absmax
            at += len(state.absmax)
            yield self.name, packed.cpu()
        self._check(absmax)
        for key, value in self._quant_state(absmax).as_dict(packed=True).items():
            yield f"{self.name}.{key}", value


class EncodeInt8(Encode):
    """To int8 by rows, with a scale each (LLM.int8())."""

    def __init__(
        self, tensor: StoredTensor, transposed: bool, config: QuantizationConfig, piece: int, device: torch.device
    ) -> None:
        super().__init__(tensor, transposed, piece, device)
        rows, columns = self.shape
        row = columns * self.dtype.itemsize
        self.spans = self._spans(max(piece // row, 1) * row)
        module = self.name.removesuffix("weight")
        self.scales_name, self.format_name = f"{module}SCB", f"{module}weight_format"
        self.outputs = (
            Output(self.name, "I8", (rows, columns)),
            Output(self.scales_name, "F32", (rows,)),
            Output(self.format_name, "U8", ()),
        )

    def run(self, buffers: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
        for values in self._values(buffers, self.shape[1]):
            codes, scales, _ = functional.int8_vectorwise_quant(values.view(-1, self.shape[1]))
            scales = scales.cpu()
            _check_finite(self.tensor, scales)
            yield self.name, codes.cpu()
            yield self.scales_name, scales
        yield self.format_name, torch.tensor(LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"], dtype=torch.uint8)


class EncodeExperts4bit(Encode4bit):
    """A projection of all experts of a layer, from one tensor or from one for each expert, part after part.

    Args:
        config: its block size divides the elements of an expert.
    """

    def __init__(self, experts: Experts, config: QuantizationConfig, piece: int, device: torch.device) -> None:
        self.name, self.shape, self.parts = experts.name, experts.shape, experts.parts
        self.dtype, self.device = DTYPES[self.parts[0].dtype], device
        self._lay_out(config, tuple(s for part in experts.parts for s in spans_of(part, whole_blocks(part, piece))))

    def _check(self, absmax: Tensor) -> None:
        not_finite = (~absmax.isfinite()).nonzero()
        first = int(not_finite[0]) if len(not_finite) else 0
        _check_finite(self.parts[first * self.config.blocksize // self.parts[0].numel], absmax)

    def _values(self, buffers: Iterator[Tensor], unit: int) -> Iterator[Tensor]:
        unit, rest = self.config.blocksize, torch.empty(0, dtype=self.dtype)
        for buffer in buffers:
            values = buffer.view(self.dtype)
            if rest.numel():
                values = torch.cat([rest, values])
            whole = values.numel() // unit * unit
            rest = values[whole:]
            if whole:
                yield values[:whole].to(self.device)


ENCODERS = {**dict.fromkeys(FORMATS, Encode4bit), "int8": EncodeInt8}
"""By the method of a QuantizationConfig: what converts a linear layer's weight. Another shape gets its row here."""
EXPERT_ENCODERS = dict.fromkeys(FORMATS, EncodeExperts4bit)
"""The same for experts."""


def _check_finite(tensor: StoredTensor, scales: Tensor) -> None:
    if not scales.isfinite().all():
        raise CheckpointFileError(
            f"{tensor.file}: {tensor.name}: holds values that are not finite, which would spoil whole blocks; "
            "mend the weight, or keep it as it is by --skip"
        )


class Decode(Task):
    """A quantized weight as a float matrix."""

    def __init__(self, tensor: StoredTensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.name = tensor.name
        self.shape = tuple(shape)
        self.dtype = dtype
        self.device = device
        self.outputs = (Output(tensor.name, NAMES[dtype], self.shape),)
        self.texts = {}


class Decode4bit(Decode):
    """From packed codes and their parts.

    Args:
        parts: the other entries of the weight, by their full names.
        shape: of the values.
        state: what the JSON entry among the parts holds.
        dtype: of the result; None for what the weight had before.
    """

    def __init__(
        self,
        tensor: StoredTensor,
        parts: Mapping[str, StoredTensor],
        shape: Sequence[int],
        state: Mapping[str, Any],
        dtype: torch.dtype | None,
        piece: int,
        device: torch.device,
    ) -> None:
        super().__init__(tensor, shape, dtype or quant_state.DTYPES[state["dtype"]], device)
        self.tensor, self.parts, self.blocksize = tensor, parts, state["blocksize"]
        unit = math.lcm(WHOLE_BLOCKS, self.blocksize) // 2
        self.spans = (
            *(Span(part, 0, part.nbytes) for part in parts.values()),
            *spans_of(tensor, max(piece // unit, 1) * unit),
        )

    def run(self, buffers: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
        parts = {name: next(buffers).view(DTYPES[part.dtype]).view(part.shape) for name, part in self.parts.items()}
        try:
            state = QuantState.from_dict(parts, "cpu")
            state.check_packed("the packed codes", self._like_packed())
        except ValueError as error:
            raise CheckpointFileError(f"{self.tensor.file}: {self.name}: {error}") from None
        absmax = functional.dequantize_absmax(state)
        left = math.prod(self.shape)
        block = 0
        for buffer in buffers:
            count = min(buffer.numel() * 2, left)
            blocks = block_count(count, self.blocksize)
            piece = QuantState(
                absmax[block : block + blocks], (count,), state.code, self.blocksize, state.quant_type, self.dtype
            ).to(self.device)
            packed = buffer[: (count + 1) // 2].view(-1, 1).to(self.device)
            yield self.name, functional.dequantize_4bit(packed, piece).cpu()
            left -= count
            block += blocks

    def _like_packed(self) -> Tensor:
        """Of the dtype and shape of the packed codes, without memory."""
        return torch.empty(self.tensor.shape, dtype=DTYPES[self.tensor.dtype], device="meta")


class DecodeInt8(Decode):
    """From int8 by rows."""

    def __init__(
        self, tensor: StoredTensor, scales: StoredTensor, dtype: torch.dtype, piece: int, device: torch.device
    ) -> None:
        super().__init__(tensor, tensor.shape, dtype, device)
        if (scales.dtype, scales.shape) != ("F32", tensor.shape[:1]) or len(tensor.shape) != 2:
            raise CheckpointFileError(
                f"{scales.file}: {scales.name}: expected F32 of shape {tensor.shape[:1]}, got {scales.dtype} of shape "
                f"{scales.shape}"
            )
        columns = tensor.shape[1]
        self.spans = (Span(scales, 0, scales.nbytes), *spans_of(tensor, max(piece // columns, 1) * columns))

    def run(self, buffers: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
        scales, row = next(buffers).view(torch.float32), 0
        for buffer in buffers:
            codes = buffer.view(torch.int8).view(-1, self.shape[1])
            rows = slice(row, row + len(codes))
            values = functional.int8_vectorwise_dequant(codes.to(self.device), scales[rows].to(self.device))
            yield self.name, values.to(self.dtype).cpu()
            row += len(codes)


class Renamed(Task):
    """Another task's only output under another name."""

    def __init__(self, task: Task, name: str) -> None:
        self.name, self.spans, self.texts = name, task.spans, {}
        self.task = task
        self.outputs = (task.outputs[0]._replace(name=name),)

    def run(self, buffers: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
        for _, piece in self.task.run(buffers):
            yield self.name, piece


class Transposed(Task):
    """Another task's only output, turned round: for layers that store their weight as [in, out]."""

    def __init__(self, task: Decode) -> None:
        self.name, self.spans, self.texts = task.name, task.spans, {}
        self.task = task
        rows, columns = task.shape
        self.outputs = (Output(task.name, NAMES[task.dtype], (columns, rows)),)

    def run(self, buffers: Iterator[Tensor]) -> Iterator[tuple[str, Tensor]]:
        whole = torch.empty(self.task.shape, dtype=self.task.dtype)
        flat, at = whole.view(-1), 0
        for _, piece in self.task.run(buffers):
            flat[at : at + piece.numel()] = piece.view(-1)
            at += piece.numel()
        yield self.name, whole.T.contiguous()
