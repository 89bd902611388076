"""What primitives take as one argument though it is many values: a weight, an optimizer's step and state.

torch's operators know no such thing: their arguments are the fields, one after the other, as ``SCHEMAS`` says. The
compiled kernels read the same records (csrc_shared/records.h), so that the order of the fields is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

NESTED_BLOCKSIZE = 256


class Weight4bit(NamedTuple):
    """A packed 4-bit tensor and its scales.

    With double quantization (QLoRA, section 3) ``absmax`` holds the u8 codes of the scales, and the other three what it
    takes to decode them; otherwise it is f32 and they are None.
    """

    packed: Tensor
    """What quantize_4bit gave, in any storage dtype and shape; errors call it by the argument's name."""
    shape: Sequence[int]
    """Of the tensor before it was quantized: (N, K) of a weight."""
    absmax: Tensor
    """One value per block."""
    blocksize: int
    quant_type: str
    nested_absmax: Tensor | None = None
    """f32[ceil(blocks / nested_blocksize)]."""
    nested_code: Tensor | None = None
    """f32[256]."""
    offset: Tensor | None = None
    """f32[1]."""
    nested_blocksize: int = NESTED_BLOCKSIZE

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.packed, self.absmax, self.nested_absmax, self.nested_code, self.offset

    def with_tensors(self, tensors: Sequence[Any]) -> Weight4bit:
        """The same weight with other :meth:`tensors`."""
        packed, absmax, nested_absmax, nested_code, offset = tensors
        _, shape, _, blocksize, quant_type, _, _, _, last = self
        nested = nested_absmax, nested_code, offset, last
        return make_weight_4bit((packed, shape, absmax, blocksize, quant_type, *nested))

    def with_packed(self, packed: Tensor) -> Weight4bit:
        return make_weight_4bit((packed, *self[1:]))


make_weight_4bit: Callable[[tuple[Any, ...]], Weight4bit] = partial(tuple.__new__, Weight4bit)
"""Of all its fields, in half the time: for what is done at every call of a layer."""
NOT_NESTED = (None, None, None, NESTED_BLOCKSIZE)
"""Its last fields where the scales are f32."""


class Int8Rows(NamedTuple):
    """An input in int8, row by row: ``codes * row_stats / 127``. Errors call the codes by the argument's name."""

    codes: Tensor
    """i8[..., K]."""
    row_stats: Tensor
    """f32, one value per row."""


class Int8Weight(NamedTuple):
    """A weight in int8, row by row: ``codes * col_stats / 127``. Its rows are the columns of a product with it."""

    codes: Tensor
    """i8[N, K]."""
    col_stats: Tensor
    """f32[N]."""


class OptimizerStep(NamedTuple):
    """The settings of one step. Numbers are such that f32 holds; lr may be a tensor of one, which is read by the host.

    A CUDA graph repeats the numbers of its capture. So those that change from step to step may be in the memory of the
    parameter's device instead, where kernels read them: step_tensor and lr_tensor.
    """

    optimizer_name: str
    """A key of :data:`bnb_core.primitives.OPTIMIZERS`."""
    step: int
    """From 1, as far as i64 goes."""
    lr: float
    beta1: float
    beta2: float = 0.0
    beta3: float = 0.0
    alpha: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    gnorm_scale: float = 1.0
    max_unorm: float = 0.0
    skip_zeros: bool = False
    t_alpha: float = 0.0
    """Steps over which ademamix's alpha rises from 0 to its value; 0 for that value from the start."""
    t_beta3: float = 0.0
    """Steps over which ademamix's slow decay rises from beta1 to beta3; 0 for beta3 from the start."""
    step_tensor: Tensor | None = None
    """f64, one whole number: counts in place of ``step``."""
    lr_tensor: Tensor | None = None
    """f64, one number: counts in place of ``lr``."""


class OptimizerState32bit(NamedTuple):
    """f32 in the parameter's shape, [2, *shape] for ademamix's state1; state2 is None where there is one state."""

    state1: Tensor
    state2: Tensor | None = None


class OptimizerState8bit(NamedTuple):
    """u8 codes shaped like :class:`OptimizerState32bit`, in blocks of 256.

    Each state has a codebook f32[256] and scales f32[blocks], [2, blocks] for ademamix's absmax1.
    """

    state1: Tensor
    state2: Tensor | None
    qmap1: Tensor
    qmap2: Tensor | None
    absmax1: Tensor
    absmax2: Tensor | None


SCHEMAS: dict[Any, str] = {
    Weight4bit: "Tensor {argument}, SymInt[] shape, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int nested_blocksize",
    Int8Rows: "Tensor {argument}, Tensor row_stats",
    Int8Weight: "Tensor {argument}, Tensor col_stats",
    OptimizerStep: "str optimizer_name, int step, float lr, float beta1, float beta2, float beta3, float alpha, "
    "float eps, float weight_decay, float gnorm_scale, float max_unorm, bool skip_zeros, float t_alpha, float t_beta3, "
    "Tensor? step_tensor, Tensor? lr_tensor",
    OptimizerState32bit: "Tensor(b!) state1, Tensor(c!)? state2",
    OptimizerState8bit: "Tensor(b!) state1, Tensor(c!)? state2, Tensor qmap1, Tensor? qmap2, Tensor(d!) absmax1, "
    "Tensor(e!)? absmax2",
}
"""The fields in torch's schema language; ``{argument}`` is what the primitive calls the record."""

RECORDS: dict[str, Any] = {record.__name__: record for record in SCHEMAS}

_TYPES = frozenset(SCHEMAS)


def is_record(argument: object) -> bool:
    return type(argument) in _TYPES


def flat(arguments: Iterable[Any]) -> list[Any]:
    """The arguments with the fields of each record in its place."""
    result: list[Any] = []
    for argument in arguments:
        if type(argument) in _TYPES:
            result += argument
        else:
            result.append(argument)
    return result


def map_tensors(function: Any, arguments: Iterable[Any]) -> tuple[Any, ...]:
    """The arguments, those of records too, with ``function`` of each tensor in its place."""
    return tuple([_mapped(function, argument) for argument in arguments])


def _mapped(function: Any, argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return function(argument)
    if type(argument) in _TYPES:
        return type(argument)._make(map_tensors(function, argument))
    return argument
