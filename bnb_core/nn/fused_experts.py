"""Experts of other libraries' models, found by their structure, and the quantized ones that take their places.

Transformers keeps the experts of a layer in parameters of three dimensions. Its classes differ in what they are called,
not in how they are made; no library is imported here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core import functional
from bnb_core.checks import BLOCKSIZES
from bnb_core.nn.embedding import Embedding4bit
from bnb_core.nn.experts import Experts4bit, GroupedLinear4bit, RoutedExperts, gated
from bnb_core.nn.params4bit import Params4bit

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_ROUTED = ("hidden_states", "top_k_index", "top_k_weights")


def _grouped(weight: Tensor, bias: nn.Parameter | None, transposed: bool, options: dict[str, Any]) -> GroupedLinear4bit:
    """A layer with this weight, [groups, out, in] or transposed, quantized where it is, and with this very bias."""
    return _with_weight(GroupedLinear4bit, weight, bias, transposed, options)


def _with_weight(
    layer_class: type[GroupedLinear4bit],
    weight: Tensor,
    bias: nn.Parameter | None,
    transposed: bool,
    options: dict[str, Any],
) -> GroupedLinear4bit:
    groups, rows, columns = weight.shape
    out_features, in_features = (columns, rows) if transposed else (rows, columns)
    options = {"blocksize": _blocksize(rows * columns), **options, "device": "meta"}
    layer = layer_class(groups, in_features, out_features, False, transposed, **options)
    layer.weight = Params4bit(weight.data, **layer.weight.__dict__).to(weight.device)  # type: ignore[assignment]
    layer.quant_state = layer.weight.quant_state
    layer.bias = bias
    return layer


def _blocksize(elements: int) -> int | None:
    """None for the default; a smaller one where that does not divide the elements of a weight."""
    return None if elements % 64 == 0 else min(BLOCKSIZES)


def _take_over(module: nn.Module, source: nn.Module) -> None:
    """What a module's methods may ask for: its plain attributes and its children; and its class, to make it again."""
    kept = {name: value for name, value in source.__dict__.items() if name not in _OF_EVERY_MODULE}
    for name, value in kept.items():
        setattr(module, name, value)
    for name, child in source.named_children():
        setattr(module, name, child)
    module.__dict__["source_class"] = type(source)


def _own_parameters(module: nn.Module, dimensions: int = 3) -> dict[str, nn.Parameter]:
    return {
        name: parameter
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == dimensions and parameter.is_floating_point()
    }


def _arguments(module: nn.Module) -> tuple[str, ...]:
    """Of its forward, by name."""
    return tuple(inspect.signature(module.forward).parameters)


class FusedExperts4bit(Experts4bit):
    """Experts that have the activation, the gating and the norm of the module whose place they take.

    Args:
        source: a module with ``gate_up_proj`` or ``up_proj``, and ``down_proj``, of three dimensions; with or without
            their ``..._bias``, ``_apply_gate``, ``act_fn``, ``is_transposed`` and ``post_expert_norm``.
        options: of :class:`~bnb_core.nn.GroupedLinear4bit`.
    """

    def __init__(self, source: nn.Module, **options: Any) -> None:
        first = "gate_up_proj" if hasattr(source, "gate_up_proj") else "up_proj"
        transposed = _is_transposed(source, first)
        weights: dict[str, Any] = {name: getattr(source, name) for name in (first, "down_proj")}
        groups, hidden_size, intermediate_size = weights["down_proj"].shape
        if transposed:
            hidden_size, intermediate_size = intermediate_size, hidden_size
        super().__init__(
            groups, hidden_size, intermediate_size, getattr(source, "act_fn", None), first == "gate_up_proj",
            **{"blocksize": _blocksize(hidden_size * intermediate_size), **options, "device": "meta"},
        )  # fmt: skip
        if not hasattr(source, "act_fn"):
            del self.act_fn
        _take_over(self, source)
        self.num_experts = groups
        for name, weight in weights.items():
            bias: Any = getattr(source, f"{name}_bias", None)
            setattr(self, name, _grouped(weight[:groups], bias, transposed, options))

    def _between(self, projected: Tensor) -> Tensor:
        source_class: Any = self.__dict__["source_class"]
        gate = getattr(source_class, "_apply_gate", None)
        return gate(self, projected) if self.has_gate and gate else super()._between(projected)

    def _after(self, projected: Tensor) -> Tensor:
        norm: Any = self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None
        return projected if norm is None else norm(projected)


def _is_transposed(source: Any, first: str) -> bool:
    """Whether weights are [experts, in, out]; where the module does not say, a gate beside ``up`` tells."""
    if hasattr(source, "is_transposed"):
        return bool(source.is_transposed)
    return source.down_proj.shape[2] == getattr(source, first).shape[1]


class SortedExperts4bit(FusedExperts4bit):
    """Experts that are given rows in order, as many for each expert (Llama 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[num_experts * n, hidden_size], the rows of expert 0 first, to the same shape."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        return self._by_expert(rows, _equal_parts(self.num_experts, rows))


def _equal_parts(groups: int, rows: Tensor) -> Tensor:
    return torch.arange(groups + 1, dtype=torch.int32, device=rows.device) * (rows.shape[0] // groups)


class ExpertsWithIdentity4bit(FusedExperts4bit):
    """Experts of which those from num_experts on leave a token as it is (LongCat)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        kept = top_k_weights.masked_fill(top_k_index < self.num_experts, 0.0).sum(dim=1, keepdim=True)
        changed = super().forward(hidden_states, top_k_index, top_k_weights)
        return changed + (hidden_states * kept).to(hidden_states.dtype)


class SharedExperts4bit(nn.Module):
    """Experts that every token sees, each counted by a factor of the token (Inkling)."""

    gate_proj: GroupedLinear4bit
    up_proj: GroupedLinear4bit
    down_proj: GroupedLinear4bit
    act_fn: Callable[[Tensor], Tensor]

    def __init__(self, source: Any, **options: Any) -> None:
        super().__init__()
        _take_over(self, source)
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, _grouped(getattr(source, name), None, False, options))

    def forward(self, hidden_states: Tensor, gammas: Tensor) -> Tensor:
        groups = self.down_proj.groups
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).repeat(groups, 1)
        offsets = _equal_parts(groups, rows)
        factors = gammas.reshape(-1, groups).t().reshape(-1, 1)
        activated = self.act_fn(self.gate_proj(rows, offsets)) * self.up_proj(rows, offsets) * factors
        down = self.down_proj(activated.to(rows.dtype), offsets)
        return down.float().view(groups, *hidden_states.shape).sum(dim=0).to(hidden_states.dtype)


class ParallelExperts4bit(GroupedLinear4bit):
    """One projection of experts, called with how many rows each of them has (JetMoe)."""

    def forward(self, inputs: Tensor, expert_size: Iterable[int] | Tensor) -> Tensor:
        sizes = torch.as_tensor(expert_size, device=inputs.device)
        offsets = nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
        return super().forward(inputs, offsets)


class StackedExperts4bit(RoutedExperts):
    """Experts whose weights lie one below the other in matrices ``mlp.w1``, ``mlp.v1`` and ``mlp.w2`` (DBRX)."""

    def __init__(self, source: Any, **options: Any) -> None:
        super().__init__()
        mlp, self.num_experts = source.mlp, source.num_experts
        self.__dict__["source_class"] = type(source)
        self.hidden_size, self.act_fn = source.hidden_size, mlp.activation_fn
        shape = (self.num_experts, -1, self.hidden_size)
        self.mlp = nn.ModuleDict(
            {name: _grouped(getattr(mlp, name).view(shape), None, name == "w2", options) for name in ("w1", "v1", "w2")}
        )

    def _of_rows(self, rows: Tensor, offsets: Tensor) -> Tensor:
        gate_and_up = torch.cat([self.mlp[name](rows, offsets) for name in ("w1", "v1")], dim=-1)
        return self.mlp["w2"](gated(self.act_fn, gate_and_up), offsets)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        rows = super().forward(hidden_states.reshape(-1, self.hidden_size), top_k_index, top_k_weights)
        return rows.view(hidden_states.shape[0], -1, self.hidden_size)


def _is_routed(module: nn.Module) -> bool:
    """Transformers' own interface, or the same arguments without it."""
    weights = _own_parameters(module)
    if not ("down_proj" in weights and ("gate_up_proj" in weights or "up_proj" in weights)):
        return False
    return (hasattr(module, "has_gate") and hasattr(module, "is_transposed")) or _arguments(module) == _ROUTED


def _is_sorted(module: nn.Module) -> bool:
    return {"gate_up_proj", "down_proj"} <= _own_parameters(module).keys() and _arguments(module) == _ROUTED[:1]


def _is_shared(module: nn.Module) -> bool:
    weights = {"gate_proj", "up_proj", "down_proj"}
    return weights <= _own_parameters(module).keys() and _arguments(module) == ("hidden_states", "gammas")


def _is_parallel(module: nn.Module) -> bool:
    return [*_own_parameters(module)] == ["weight"] and _arguments(module) == ("inputs", "expert_size")


def _is_stacked(module: nn.Module) -> bool:
    mlp = getattr(module, "mlp", None)
    return (
        isinstance(mlp, nn.Module)
        and [*_own_parameters(mlp, 2)] == ["w1", "v1", "w2"]
        and _arguments(module) == _ROUTED
        and hasattr(mlp, "activation_fn")
    )


def _is_retrieved(module: nn.Module) -> bool:
    """Experts of one neuron each, looked up in embeddings (Doge)."""
    return bool(_of_experts(module))


def _of_experts(module: nn.Module) -> dict[str, nn.Embedding]:
    """The embeddings that have a row for each expert of this module."""
    count = module.__dict__.get("num_experts")
    return {
        name: child
        for name, child in module.named_children()
        if type(child) is nn.Embedding and child.num_embeddings == count
    }


def _retrieved(source: nn.Module, quant_type: str = "nf4", **options: Any) -> nn.Module:
    storage = {"quant_storage": options["quant_storage"]} if "quant_storage" in options else {}
    for name, embedding in _of_experts(source).items():
        rows, columns = embedding.weight.shape
        dtype, device = embedding.weight.dtype, embedding.weight.device
        quantized = Embedding4bit(rows, columns, dtype, quant_type, device="meta", **storage)
        quantized.weight = Params4bit(embedding.weight.data, **quantized.weight.__dict__).to(device)  # type: ignore[assignment]
        quantized.quant_state = quantized.weight.quant_state
        setattr(source, name, quantized)
    return source


def _parallel(source: Any, **options: Any) -> GroupedLinear4bit:
    layer = _with_weight(ParallelExperts4bit, source.weight, None, False, options)
    _take_over(layer, source)
    return layer


_KINDS: tuple[tuple[Callable[[nn.Module], bool], Callable[..., nn.Module]], ...] = (
    (lambda module: _is_routed(module) and bool(getattr(module, "zero_expert_num", 0)), ExpertsWithIdentity4bit),
    (_is_routed, FusedExperts4bit),
    (_is_sorted, SortedExperts4bit),
    (_is_shared, SharedExperts4bit),
    (_is_parallel, _parallel),
    (_is_stacked, StackedExperts4bit),
    (_is_retrieved, _retrieved),
)
"""What tells experts apart, and what serves them."""


def quantized_experts(module: nn.Module, **options: Any) -> nn.Module | None:
    """Quantized experts with the weights of ``module``, on its device; None if it is not known as experts.

    It is the very module where only children of it are replaced.

    Args:
        options: ``compute_dtype``, ``compress_statistics``, ``quant_type``, ``quant_storage``, ``blocksize`` of
            :class:`~bnb_core.nn.GroupedLinear4bit`.
    """
    make = next((make for recognizes, make in _KINDS if recognizes(module)), None)
    return None if make is None else make(module, **options).train(module.training)


def unknown_experts(module: nn.Module) -> list[str]:
    """The names of its own parameters of three dimensions, the first of which counts experts by an attribute."""
    counts = {value for name, value in module.__dict__.items() if "experts" in name and isinstance(value, int)}
    return [name for name, parameter in _own_parameters(module).items() if parameter.shape[0] in counts]


def dense_experts(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module | None:
    """The module whose place ``module`` has taken, with the dequantized weights; None if it is no such one.

    Raises:
        NotImplementedError: experts in matrices or embeddings.
    """
    source_class: Any = module.__dict__.get("source_class")
    if source_class is None:
        return None
    if isinstance(module, StackedExperts4bit):
        raise NotImplementedError(f"{source_class.__name__}: experts below each other are not dequantized in place")
    dense = source_class.__new__(source_class)
    nn.Module.__init__(dense)
    _take_over(dense, module)
    del dense.__dict__["source_class"]
    if isinstance(module, ParallelExperts4bit):
        dense.weight = _dense_weight(module, dtype)
    for name, layer in module.named_children():
        if isinstance(layer, GroupedLinear4bit):
            delattr(dense, name)
            setattr(dense, name, _dense_weight(layer, dtype))
            if layer.bias is not None:
                setattr(dense, f"{name}_bias", layer.bias)
    return dense.train(module.training)


def _dense_weight(layer: GroupedLinear4bit, dtype: torch.dtype | None) -> nn.Parameter:
    values = functional.dequantize_4bit(layer.weight.data, layer.quant_state or layer.weight.quant_state)
    return nn.Parameter(values.to(dtype or values.dtype), requires_grad=False)
