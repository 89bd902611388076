"""What is needed, beside the codes, to dequantize a tensor, and how checkpoints store it (docs/SPEC.md section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor

from bnb_core.checkpoint_entries import checked_entry, dense_entry, described, element_count
from bnb_core.checks import BLOCKSIZES, FLOAT_DTYPES, QUANT_STORAGES, QUANT_TYPES, check_any_blocksize
from bnb_core.primitives import block_count, packed_numel
from bnb_core.records import NOT_NESTED, Weight4bit, make_weight_4bit
from bnb_core.serialization import PackedValues, pack_dict_to_tensor, unpack_tensor_to_dict

PACKED_KEY = "quant_state.bitsandbytes__"
_PACKED_NAME = PACKED_KEY.rpartition(".")[2]
TENSOR_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
NESTED_TENSOR_KEYS = ("nested_absmax", "nested_quant_map")
VALUE_KEYS = ("quant_type", "blocksize", "dtype", "shape")
NESTED_VALUE_KEYS = ("nested_blocksize", "nested_dtype", "nested_offset")
MOST_PACKED_BYTES = 4096
"""Of JSON in a checkpoint; bitsandbytes and this library write some 200."""
F32_MAX = torch.finfo(torch.float32).max
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


class QuantState:
    """The state of a quantized tensor.

    Args:
        absmax: one scale per block, f32; with double quantization u8 codes of the scales.
        shape: of the tensor before quantization.
        code: the codebook, f32[16] or f32[256].
        blocksize: elements per block.
        quant_type: ``nf4`` or ``fp4``; None for 8-bit blockwise codes.
        dtype: of the tensor before quantization, and of the dequantized one.
        offset: with double quantization, the f32 mean of the scales, taken off before they were quantized.
        state2: with double quantization, the state of the quantized scales.
    """

    # Unsloth's own from_dict reads these: the types, the last part of a packed entry's key, the names of the entries.
    valid_quant_types = QUANT_TYPES
    valid_qs_type_keys = tuple(_PACKED_NAME + quant_type for quant_type in QUANT_TYPES)
    valid_qs_keys = (*TENSOR_KEYS, "quant_state", *VALUE_KEYS, *NESTED_VALUE_KEYS)

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | tuple[int, ...] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __getitem__(self, index: int) -> Any:
        """The old list form: [absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type]."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        return (
            self.shape == other.shape
            and self.dtype == other.dtype
            and self.blocksize == other.blocksize
            and self.quant_type == other.quant_type
            and self.nested == other.nested
            and self.state2 == other.state2
            and _equal(self.absmax, other.absmax)
            and _equal(self.code, other.code)
            and _equal(self.offset, other.offset)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"QuantState(quant_type={self.quant_type!r}, shape={self.shape}, dtype={self.dtype}, "
            f"blocksize={self.blocksize}, nested={self.nested})"
        )

    def check_complete(self) -> None:
        """Raise ValueError if this cannot describe a 4-bit tensor, as one that was put together by hand may not."""
        for name in ("shape", "dtype", "blocksize", "quant_type"):
            if getattr(self, name) is None:
                raise ValueError(f"quant_state: its {name} is None, expected a tensor")
        if self.nested and (self.state2 is None or self.offset is None):
            raise ValueError("quant_state: it is nested, but its state2 or its offset is None; expected both")

    def weight_4bit(self, packed: Tensor) -> Weight4bit:
        """What the primitives take: the packed codes with this state.

        Raises:
            ValueError: it is not complete (:meth:`check_complete`).
            TypeError: state2 is no QuantState.
        """
        shape, blocksize, quant_type = self.shape, self.blocksize, self.quant_type
        if shape is None or blocksize is None or quant_type is None or self.dtype is None:
            self.check_complete()
        if not self.nested:
            return make_weight_4bit((packed, shape, self.absmax, blocksize, quant_type, *NOT_NESTED))
        state2, offset = self.state2, self.offset
        if state2 is None or offset is None:
            self.check_complete()
        if not isinstance(state2, QuantState):
            raise TypeError(f"quant_state.state2: expected a QuantState, got {type(state2).__name__}")
        nested = state2.absmax, state2.code, offset, state2.blocksize
        return make_weight_4bit((packed, shape, self.absmax, blocksize, quant_type, *nested))

    def check_packed(self, name: str, packed: Tensor) -> None:
        """Raise ValueError if ``packed``, called ``name``, cannot hold the 4-bit codes of a tensor of this shape."""
        self.check_complete()
        n = math.prod(self.shape)  # type: ignore[arg-type]
        if packed.dtype not in QUANT_STORAGES or packed.numel() != packed_numel(n, packed.dtype):
            raise ValueError(
                f"{name}: expected {(n + 1) // 2} packed bytes for shape {tuple(self.shape)}, "  # type: ignore[arg-type]
                f"got {described(packed)}"
            )

    def to(self, device: torch.device | str) -> QuantState:
        """Move every tensor of this state, in place."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.offset is not None:
            self.offset = self.offset.to(device)
        if self.state2 is not None:
            self.state2.to(device)
        return self

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries of a state dict, without their prefix.

        Args:
            packed: what is not a tensor goes into one, as checkpoints of 4-bit weights want it; the entries of 8-bit
                blockwise codes stay as they are.
        """
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _dtype_name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested and self.state2 is not None:
            state |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                "nested_quant_map": self.state2.code,
                "nested_dtype": _dtype_name(self.state2.dtype),
                "nested_offset": self.offset.item(),  # type: ignore[union-attr]
            }
        if not packed or self.quant_type is None:
            return state
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        values = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        return {**tensors, PACKED_KEY + self.quant_type: pack_dict_to_tensor(values).as_subclass(PackedValues)}

    @classmethod
    def from_dict(cls, qs_dict: Mapping[str, Any], device: torch.device | str) -> QuantState:
        """Read what :meth:`as_dict` wrote, packed or not; keys may carry a prefix that ends in a dot.

        Raises:
            ValueError: a missing, surplus or malformed entry, named by its key.
        """
        if not isinstance(qs_dict, Mapping):
            raise TypeError(f"qs_dict: expected a dict, got {type(qs_dict).__name__}")
        entries = _Entries(qs_dict)
        entries.check()
        values, tensors = entries.values, entries.tensors
        state2, offset = None, None
        if entries.nested:
            offset = torch.tensor(float(values["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=tensors["nested_absmax"].to(device),
                shape=tensors["absmax"].shape,
                blocksize=values["nested_blocksize"],
                code=tensors["nested_quant_map"].to(device),
                dtype=DTYPES[values["nested_dtype"]],
            )
        return cls(
            absmax=tensors["absmax"].to(device),
            shape=torch.Size(values["shape"]),
            code=tensors["quant_map"].to(device),
            blocksize=values["blocksize"],
            quant_type=values["quant_type"],
            dtype=DTYPES[values["dtype"]],
            offset=offset,
            state2=state2,
        )


def _packed_entry(quant_type: str) -> property:
    name = _PACKED_NAME + quant_type

    def read(self: QuantState) -> Any:
        if self.quant_type != quant_type:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self.as_dict(packed=True)[PACKED_KEY + quant_type]

    return property(read, doc="The packed entry, by the end of its key in a state dict.")


# Walkers of state dicts (FSDP, torch.distributed.checkpoint) look up each key as a path of attributes.
for each in QUANT_TYPES:
    setattr(QuantState, _PACKED_NAME + each, _packed_entry(each))


class _Entries:
    """The entries of a quant state in a checkpoint, which may say anything: each is checked before it is used."""

    def __init__(self, qs_dict: Mapping[str, Any]) -> None:
        self.key_of: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        packed_type = None
        for key, value in qs_dict.items():
            prefix, separator, quant_type = key.rpartition(PACKED_KEY)
            if separator and (not prefix or prefix.endswith(".")):
                if packed_type is not None:
                    raise ValueError(f"{key}: a second packed quant state, expected one")
                packed_type = quant_type
                self._add_packed(key, value)
            else:
                self._add(key.rpartition(".")[2], key, value)
        if packed_type is not None and self.values.get("quant_type") != packed_type:
            raise ValueError(
                f"{self.key_of['quant_state']}: holds quant_type {self.values.get('quant_type')!r}, "
                f"its key says {packed_type!r}; expected the same"
            )
        self.nested = any(name in self.key_of for name in NESTED_TENSOR_KEYS + NESTED_VALUE_KEYS)

    def _add_packed(self, key: str, value: Any) -> None:
        self.key_of["quant_state"] = key
        packed = dense_entry(key, value)
        if packed.numel() > MOST_PACKED_BYTES:
            raise ValueError(f"{key}: expected at most {MOST_PACKED_BYTES} bytes of JSON, got {packed.numel()}")
        try:
            content = unpack_tensor_to_dict(packed)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        for name, entry in content.items():
            self._add(name, f"{key}: {name}", entry)

    def _add(self, name: str, key: str, value: Any) -> None:
        if name in self.key_of:
            raise ValueError(f"{key}: given twice; expected it once")
        if name in TENSOR_KEYS:
            self.tensors[name] = dense_entry(key, value)
        elif name in VALUE_KEYS + NESTED_VALUE_KEYS:
            self.values[name] = value
        else:
            raise ValueError(
                f"{key}: not a part of a 4-bit quant state; expected {', '.join(TENSOR_KEYS)} or {PACKED_KEY}..."
            )
        self.key_of[name] = key

    def check(self) -> None:
        wanted: tuple[str, ...] = ("absmax", "quant_map", *VALUE_KEYS)
        if self.nested:
            wanted += NESTED_TENSOR_KEYS + NESTED_VALUE_KEYS
        for name in wanted:
            if name not in self.key_of:
                raise ValueError(
                    f"{name}: missing from the quant state, which has {', '.join(sorted(self.key_of))}; "
                    "expected all parts of the weight"
                )
        if self.values["quant_type"] is None:
            check_any_blocksize(self.values["blocksize"], self.key_of["blocksize"])
        else:
            self._check_choice("quant_type", QUANT_TYPES)
            self._check_choice("blocksize", BLOCKSIZES)
        self._check_choice("dtype", tuple(DTYPES))
        blocks = block_count(element_count(self.key_of["shape"], self.values["shape"]), self.values["blocksize"])
        self._check_tensor("quant_map", torch.float32, 256 if self.values["quant_type"] is None else 16)
        self._check_tensor("absmax", torch.uint8 if self.nested else torch.float32, blocks)
        if self.nested:
            self._check_choice("nested_blocksize", BLOCKSIZES)
            self._check_choice("nested_dtype", ("float32",))
            offset = self.values["nested_offset"]
            if type(offset) is not float and not (type(offset) is int and abs(offset) <= F32_MAX):
                raise ValueError(f"{self.key_of['nested_offset']}: expected a number of float32, got {shown(offset)}")
            self._check_tensor("nested_absmax", torch.float32, block_count(blocks, self.values["nested_blocksize"]))
            self._check_tensor("nested_quant_map", torch.float32, 256)

    def _check_choice(self, name: str, accepted: tuple[Any, ...]) -> None:
        value = self.values[name]
        if type(value) not in (str, int) or value not in accepted:
            choices = ", ".join(str(choice) for choice in accepted)
            raise ValueError(f"{self.key_of[name]}: expected one of {choices}, got {shown(value)}")

    def _check_tensor(self, name: str, dtype: torch.dtype, numel: int) -> None:
        self.tensors[name] = checked_entry(self.key_of[name], self.tensors[name], (dtype,), (numel,))


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def check_quant_state(name: str, value: object) -> None:
    if value is None:
        raise ValueError(f"{name}: expected the QuantState of the codes, got None")
    if not isinstance(value, QuantState):
        raise TypeError(f"{name}: expected a QuantState, got {type(value).__name__}")


def weight_4bit(packed: Tensor, quant_state: QuantState, name: str = "quant_state") -> Weight4bit:
    """What the primitives take for packed codes and their quant state, which errors call ``name``."""
    try:
        return quant_state.weight_4bit(packed)
    except AttributeError:
        check_quant_state(name, quant_state)
        raise
