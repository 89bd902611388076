"""A parameter that is quantized to 4 bits when it first moves to a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnb_core import functional
from bnb_core.checks import QUANT_STORAGES, QUANT_TYPES, check_blocksize, check_choice, check_dtype_argument
from bnb_core.functional import QuantState
from bnb_core.functional.blockwise import DEFAULT_BLOCKSIZE_4BIT
from bnb_core.nn.quantized_parameter import QuantizedParameter, in_any_mode, moved_codes
from bnb_core.primitive import plain_tensor_type


class CodeBytes(NamedTuple):
    """What shows that codes have been changed as if they were values."""

    dtype: torch.dtype
    total: Tensor | None
    """The sum of the bytes, i64[]; None where nothing takes them for values."""


def code_bytes(codes: Tensor) -> CodeBytes:
    if not codes.is_floating_point() or codes.is_meta:
        return CodeBytes(codes.dtype, None)
    return CodeBytes(codes.dtype, codes.contiguous().view(torch.uint8).sum(dtype=torch.int64))


_SPLITS = {torch.chunk, torch.split, Tensor.chunk, Tensor.split}


def _through_quant_state(name: str) -> property:
    def read(self: Params4bit) -> Any:
        if self.quant_state is None:
            raise AttributeError(f"{name}: the parameter is not quantized yet; move it to a device")
        owner, _, attribute = name.rpartition(".")
        state = self.quant_state.state2 if owner else self.quant_state
        if state is None:
            raise AttributeError(f"{name}: the parameter's scales are not double-quantized")
        return getattr(state, attribute)

    return property(read)


@plain_tensor_type
class Params4bit(QuantizedParameter):
    """A weight that :meth:`to` any device but meta quantizes, once.

    Args:
        data: the weight, f32, f16 or bf16; or its packed codes, with ``quant_state`` and ``bnb_quantized=True``.
        quant_state: of the packed codes.
        blocksize: elements per block, 64 by default.
        compress_statistics: quantize the scales as well.
        quant_type: ``fp4`` or ``nf4``.
        quant_storage: the dtype that the packed bytes are viewed as.
        module: the layer this is the weight of; it is told the quant state.
        bnb_quantized: whether ``data`` holds packed codes. Set to False, the next move quantizes ``data`` anew.

    Unknown keyword arguments are ignored, so that ``Params4bit(value, **old.__dict__)`` rebuilds a parameter that
    others have hung attributes on.
    """

    quant_state: QuantState | None
    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype
    module: Any
    bnb_quantized: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        **ignored: Any,
    ) -> Params4bit:
        blocksize = DEFAULT_BLOCKSIZE_4BIT if blocksize is None else blocksize
        check_blocksize(blocksize)
        check_choice("quant_type", quant_type, QUANT_TYPES)
        check_dtype_argument("quant_storage", quant_storage, QUANT_STORAGES)
        self = Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.quant_state = quant_state
        self.blocksize = blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_storage = quant_storage
        self.module = module
        self.bnb_quantized = bnb_quantized
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: Mapping[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: Any = None,
        **ignored: Any,
    ) -> Params4bit:
        """A parameter from packed codes and the entries of their quant state, as checkpoints hold them.

        Raises:
            ValueError: an entry that is missing, surplus or malformed, or codes that do not fit it.
        """
        quant_state = QuantState.from_dict(quantized_stats, device)
        quant_state.check_packed("data", data)
        self = cls._from_codes(data.to(device), quant_state, requires_grad, module)
        self._tell_module()
        return self

    @classmethod
    def _from_codes(
        cls, data: Tensor, quant_state: QuantState, requires_grad: bool = False, module: Any = None
    ) -> Params4bit:
        """A parameter of packed codes; that ``quant_state`` fits them is not looked at."""
        return cls(
            data,
            requires_grad=requires_grad,
            quant_state=quant_state,
            blocksize=quant_state.blocksize,
            compress_statistics=quant_state.nested,
            quant_type=quant_state.quant_type,  # type: ignore[arg-type]
            quant_storage=data.dtype,
            module=module,
            bnb_quantized=True,
        )

    absmax = _through_quant_state("absmax")
    code = _through_quant_state("code")
    quant_map = _through_quant_state("code")
    offset = _through_quant_state("offset")
    state2 = _through_quant_state("state2")
    nested_offset = _through_quant_state("offset")
    nested_absmax = _through_quant_state("state2.absmax")
    nested_blocksize = _through_quant_state("state2.blocksize")
    nested_quant_map = _through_quant_state("state2.code")
    nested_dtype = _through_quant_state("state2.dtype")

    def _tell_module(self) -> None:
        if self.module is not None:
            self.module.quant_state = self.quant_state
            self.module._codes_before_sharding = code_bytes(self.data)

    def _holds_codes(self) -> bool:
        return self.bnb_quantized

    def _like(self, data: Tensor) -> Params4bit:
        return type(self)(data, **{"requires_grad": self.requires_grad, **self.__dict__})

    def _quantize(self, device: torch.device) -> Params4bit:
        """In place, because torch moves a module by setting its parameters' data."""
        weight = self.data.contiguous().to(device)
        packed, self.quant_state = functional.quantize_4bit(
            weight,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.data = packed
        self.bnb_quantized = True
        self._tell_module()
        return self

    @in_any_mode
    def _moved(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> Params4bit:
        if not self.bnb_quantized:
            if device is not None and device.type != "meta":
                return self._quantize(device)
            return self._like(self.data.to(device, dtype, non_blocking))
        if device is None:
            return self
        if self.quant_state is not None and device.type != "meta":
            self.quant_state.to(device)
        return self._like(moved_codes(self.data, device, non_blocking))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As of all quantized parameters; splits keep the class and the state."""
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _SPLITS and isinstance(args[0], Params4bit):
            return tuple(args[0]._like(part) for part in result)
        return result
