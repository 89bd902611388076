"""The experts of a mixture in a checkpoint, fused or one tensor for each, as the weights that Transformers 5 has.

It has one weight [experts, out, in] for a projection of all experts of a layer, gate and up beside each other.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from bnb_core.checkpoints.headers import DTYPES, StoredTensor
from bnb_core.checks import BLOCKSIZES, FLOAT_DTYPES

_OF_ONE = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
_FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj)")
_GATED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_NUMBERED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_COUNTED = {"gate_up_proj": ("fc1", "fc3"), "down_proj": ("fc2",)}
_WITHOUT_GATE = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_NAMINGS = {frozenset(sum(each.values(), ())): each for each in (_GATED, _NUMBERED, _COUNTED, _WITHOUT_GATE)}
"""The layers of an expert: what is fused of which. Transformers 5 does so whatever the model type."""

_LAYERS = {"jetmoe": re.compile(r"(.*)\.(input_linear|output_linear)\.weight")}
"""By model type: fused weights of modules, which keep their names."""

STORED_OTHERWISE = (
    "qwen3_vl_moe", "qwen3_vl_moe_text", "ernie4_5_vl_moe", "ernie4_5_vl_moe_text", "longcat_flash",
)  # fmt: skip
"""Model types whose experts Transformers turns round, deals out or cuts when it loads them: they stay as they are."""


class Experts(NamedTuple):
    """One projection of all experts of a layer."""

    owner: str
    """The module that has the experts."""
    name: str
    """The weight in a quantized checkpoint."""
    parts: tuple[StoredTensor, ...]
    """Its values, one part after the other."""
    shape: tuple[int, ...]
    """[experts, ...], as the model has it."""
    bias: StoredTensor | None = None

    @property
    def bias_name(self) -> str:
        """The bias in a quantized checkpoint."""
        return self.name.removesuffix("weight") + "bias"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def blocksize(self, wanted: int) -> int | None:
        """The one wanted, or a smaller one, as no block reaches from an expert into the next; None if none divides."""
        elements = math.prod(self.shape[1:])
        return next((size for size in (wanted, min(BLOCKSIZES)) if elements % size == 0), None)

    def skipped_by(self, patterns: Sequence[str]) -> str | None:
        """The first of these patterns that means the experts or a part of them."""
        modules = {self.owner, *(part.name.removesuffix(".weight") for part in self.parts)}
        names = {*modules, *(part.name for part in self.parts), *(module.rpartition(".")[2] for module in modules)}
        return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def is_of_one(name: str) -> bool:
    """Whether this is the weight of a layer of one expert that Transformers 5 would fuse with others."""
    match = _OF_ONE.fullmatch(name)
    return match is not None and any(match[3].removesuffix(".weight") in naming for naming in _NAMINGS)


def find_experts(tensors: Mapping[str, StoredTensor], model_type: str | None) -> list[Experts]:
    """All experts whose weights are floats, in the order of the tensors; what does not fit together is left out."""
    of_one: dict[str, dict[int, dict[str, StoredTensor]]] = defaultdict(lambda: defaultdict(dict))
    found = []
    for tensor in tensors.values():
        if match := _OF_ONE.fullmatch(tensor.name):
            of_one[match[1]][int(match[2])][match[3]] = tensor
        elif (fused := _fused(tensor, tensors, model_type)) is not None:
            found.append(fused)
    for owner, experts in of_one.items():
        found += _merged(owner, experts)
    return found


def _fused(tensor: StoredTensor, tensors: Mapping[str, StoredTensor], model_type: str | None) -> Experts | None:
    if len(tensor.shape) != 3 or DTYPES.get(tensor.dtype) not in FLOAT_DTYPES or not tensor.numel:
        return None
    if match := _FUSED.fullmatch(tensor.name):
        bias = tensors.get(f"{tensor.name}_bias")
        return Experts(match[1], f"{tensor.name}.weight", (tensor,), tensor.shape, bias)
    layers = _LAYERS.get(model_type or "")
    if layers is not None and (match := layers.fullmatch(tensor.name)):
        return Experts(match[1], tensor.name, (tensor,), tensor.shape)
    return None


def _merged(owner: str, experts: Mapping[int, Mapping[str, StoredTensor]]) -> Iterator[Experts]:
    naming = _NAMINGS.get(frozenset(name.removesuffix(".weight") for name in experts.get(0, ())))
    shapes = {(name, tensor.dtype, tensor.shape) for each in experts.values() for name, tensor in each.items()}
    complete = experts.keys() == set(range(len(experts)))
    if naming is None or not complete or len(shapes) != len(experts[0]):
        return
    if any(each.keys() != experts[0].keys() for each in experts.values()):
        return
    for fused, names in naming.items():
        parts = tuple(experts[e][f"{name}.weight"] for e in range(len(experts)) for name in names)
        first = parts[0]
        if len({part.shape for part in parts}) > 1 or len(first.shape) != 2 or not first.numel:
            return
        if DTYPES.get(first.dtype) not in FLOAT_DTYPES:
            return
        rows, columns = first.shape
        yield Experts(owner, f"{owner}.{fused}.weight", parts, (len(experts), rows * len(names), columns))


def dense_names(name: str) -> tuple[str, str]:
    """What the weight and the bias of quantized experts are called in a model that is not quantized."""
    module = name.removesuffix(".weight")
    return (module, f"{module}_bias") if _FUSED.fullmatch(module) else (name, f"{module}.bias")
