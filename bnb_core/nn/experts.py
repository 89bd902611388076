"""The experts of a mixture with frozen weights of 4 bits: all of a layer's in one tensor, multiplied in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core import functional
from bnb_core.autograd import grouped_linear_4bit
from bnb_core.checks import check_dimensions, check_float
from bnb_core.nn.linear4bit import Weight4bitMixin
from bnb_core.nn.params4bit import Params4bit
from bnb_core.nn.quantized_weight import not_quantized
from bnb_core.nn.tensor_parallel import Cut, cut_4bit, own_codes
from bnb_core.quant_state import QuantState
from bnb_core.sharding import is_sharded


class GroupedLinear4bit(Weight4bitMixin, nn.Module):
    """Linear layers of one shape, each for a group of rows, with their weights quantized in one tensor.

    The weights are quantized when the module moves to a device, once, as :class:`~bnb_core.nn.Linear4bit`'s is. No
    block of a weight reaches into the next.

    Args:
        groups: how many layers.
        in_features, out_features, bias: of each.
        transposed: the weights are [groups, in_features, out_features] rather than [groups, out_features, in_features].
        compute_dtype: inputs are converted to it; None leaves them as they are. The output has the input's dtype.
        compress_statistics, quant_type, quant_storage, device: as of Linear4bit.
        blocksize: None for 64.

    Raises:
        ValueError: the block size does not divide the elements of a weight.
    """

    weight: Params4bit
    bias: nn.Parameter | None
    _cut: Cut | None = None

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        transposed: bool = False,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        blocksize: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.in_features, self.out_features = groups, in_features, out_features
        self.transposed, self.compute_dtype = transposed, compute_dtype
        self.weight = Params4bit(
            torch.empty(self._weight_shape(), device=device),
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            blocksize=blocksize,
            module=self,
        )
        if in_features * out_features % self.weight.blocksize != 0:
            raise ValueError(
                f"blocksize: expected one that divides the {in_features * out_features} elements of a weight, "
                f"got {self.weight.blocksize}"
            )
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(groups, out_features, device=device)) if bias else None
        )
        self.quant_state: QuantState | None = None
        self.reset_parameters()

    def _weight_shape(self) -> tuple[int, ...]:
        features = (self.out_features, self.in_features)
        return self.groups, *(reversed(features) if self.transposed else features)

    def reset_parameters(self) -> None:
        """As of nn.Linear."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Each row by the layer of its group.

        Args:
            x: [T, in_features], f32, f16 or bf16: the rows of group 0, then those of group 1, and so on.
            offsets: i32[groups + 1], ascending from 0 to T: group e has rows offsets[e] to offsets[e + 1].

        Returns:
            [T, out_features] in x's dtype.
        """
        check_float("x", x)
        if self._cut is not None:
            weight: Tensor = own_codes(self.weight)
            quant_state = self.quant_state
        else:
            weight = self.weight
            quant_state = getattr(weight, "quant_state", None) or self._current_quant_state()
        if quant_state is None:
            raise RuntimeError(not_quantized(weight))
        dtype = self.compute_dtype or x.dtype
        bias: Any = self.bias
        if bias is not None:
            bias = (bias.to_local() if is_sharded(bias) and self._cut is not None else bias).to(dtype)
        return grouped_linear_4bit(x.to(dtype), weight, quant_state, offsets, bias, self.transposed).to(x.dtype)

    def cut_groups(self, mesh: Any) -> None:
        """Leave this process its part of the groups, which the processes of a mesh divide, in order; for
        :func:`~bnb_core.nn.parallelize_experts`.
        """
        from torch.distributed.tensor import DTensor, Shard

        cut, state = Cut(mesh, 0), self.weight.quant_state
        own, own_state = cut_4bit(self.weight.data, state, cut)  # type: ignore[arg-type]
        if self.bias is not None:
            of_groups = self.bias.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            cut_bias = DTensor.from_local(of_groups, mesh, [Shard(0)], run_check=False)
            self.bias = nn.Parameter(cut_bias, requires_grad=self.bias.requires_grad)
        self._cut, self.quant_state = cut, own_state
        self._parameters["weight"] = nn.Parameter(own, requires_grad=False)
        self.groups //= mesh.size()

    @torch.no_grad()
    def add_(self, change: Callable[[int], Tensor]) -> None:
        """Add ``change(e)`` to the weight of each group e, in the weight's own shape, and quantize the sums anew.

        One dequantized weight is in memory at a time.

        Raises:
            RuntimeError: the weight is not quantized yet, or its groups are on several processes.
        """
        if self._cut is not None:
            raise RuntimeError("weight: its groups are on several processes; add to it before parallelize_experts")
        weight, state = self.weight, getattr(self.weight, "quant_state", None) or self._current_quant_state()
        if state is None:
            raise RuntimeError(not_quantized(weight))
        shape = self._weight_shape()[1:]
        codes = weight.data.view(torch.uint8).view(self.groups, -1).clone()
        scales = functional.dequantize_absmax(state).view(self.groups, -1).clone()
        for e in range(self.groups):
            of_group = QuantState(scales[e], shape, state.code, state.blocksize, state.quant_type, state.dtype)
            values = functional.dequantize_4bit(codes[e].view(-1, 1), of_group)
            changed = (values.float() + change(e)).to(values.dtype)
            packed, requantized = functional.quantize_4bit(
                changed, blocksize=state.blocksize, quant_type=str(state.quant_type)
            )
            codes[e], scales[e] = packed.view(-1), requantized.absmax
        nested: list[Any] = [None, None]
        absmax = scales.view(-1)
        if state.nested:
            absmax, *nested = functional.quantize_absmax(absmax)
        new_state = QuantState(
            absmax, torch.Size((self.groups, *shape)), state.code, state.blocksize, state.quant_type, state.dtype,
            *nested,
        )  # fmt: skip
        stored = codes.view(-1).view(weight.dtype).view(-1, 1)
        self._set_weight(Params4bit._from_codes(stored, new_state, module=self))

    def extra_repr(self) -> str:
        return (
            f"groups={self.groups}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}"
        )


def gated(activation: Callable[[Tensor], Tensor], gate_and_up: Tensor) -> Tensor:
    """``activation(gate) * up`` of gate and up side by side."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return activation(gate) * up


class RoutedExperts(nn.Module):
    """Experts that each token sees a few of: tokens are sorted by expert, and their results added up.

    Subclasses set ``num_experts`` and say what experts make of the sorted rows.
    """

    num_experts: int
    ranks: Any = None
    """Where :func:`~bnb_core.nn.parallelize_experts` has left other processes experts, what sends them rows."""

    def _by_expert(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """``_of_rows``, wherever the experts are."""
        return self._of_rows(rows, offsets) if self.ranks is None else self.ranks.of_rows(rows, offsets, self._of_rows)

    def _of_rows(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """What its expert makes of each row; group e of the rows, by ``offsets``, is that of expert e."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of what its experts make of each token. The host reads no tensor.

        Args:
            hidden_states: [tokens, hidden_size], f32, f16 or bf16.
            top_k_index: i64[tokens, k], the experts of each token; one of num_experts and more stands for none.
            top_k_weights: [tokens, k], how much each of them counts.

        Returns:
            [tokens, hidden_size] in the dtype of hidden_states.

        Raises:
            TypeError, ValueError: an argument that is not as above, by its name.
        """
        check_float("hidden_states", hidden_states)
        check_dimensions("hidden_states", hidden_states, 2)
        check_dimensions("top_k_index", top_k_index, 2)
        top_k = top_k_index.shape[1]
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        weights = top_k_weights.reshape(-1)[order].masked_fill(experts >= self.num_experts, 0.0)
        borders = torch.arange(1, self.num_experts, device=experts.device, dtype=experts.dtype)
        inner = torch.searchsorted(experts, borders, out_int32=True)
        offsets = nn.functional.pad(nn.functional.pad(inner, (1, 0)), (0, 1), value=len(experts))
        counted = self._by_expert(hidden_states[order // top_k], offsets) * weights.unsqueeze(1)
        in_place = torch.empty_like(counted).index_copy(0, order, counted)
        return in_place.view(*top_k_index.shape, hidden_states.shape[1]).sum(dim=1).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}"


class Experts4bit(RoutedExperts):
    """The experts of one layer: an up projection, with a gate beside it or not, an activation, a down projection.

    Args:
        num_experts: how many.
        hidden_size: of the input and the output.
        intermediate_size: between the projections.
        act_fn: the activation.
        has_gate: whether the first projection gives a gate, too: ``down(act_fn(gate) * up)``; else
            ``down(act_fn(up))``.
        options: of :class:`GroupedLinear4bit`, for both projections; without biases where nothing is said.

    The first projection is called ``gate_up_proj``, or ``up_proj`` without a gate, the second one ``down_proj``.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: Callable[[Tensor], Tensor] | None = None,
        has_gate: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        options = {"bias": False, **options}
        self.num_experts, self.has_gate = num_experts, has_gate
        self.act_fn = nn.SiLU() if act_fn is None else act_fn
        first = GroupedLinear4bit(num_experts, hidden_size, intermediate_size * (1 + has_gate), **options)
        self.add_module("gate_up_proj" if has_gate else "up_proj", first)
        self.down_proj = GroupedLinear4bit(num_experts, intermediate_size, hidden_size, **options)

    def _between(self, projected: Tensor) -> Tensor:
        """From the first projection to the second."""
        return gated(self.act_fn, projected) if self.has_gate else self.act_fn(projected)

    def _after(self, projected: Tensor) -> Tensor:
        """What follows the second projection."""
        return projected

    def _of_rows(self, rows: Tensor, offsets: Tensor) -> Tensor:
        first: Any = self.gate_up_proj if self.has_gate else self.up_proj
        return self._after(self.down_proj(self._between(first(rows, offsets)), offsets))
