"""``bitsandbytes.autograd._functions``: the differentiable matmuls, as functions and as torch's autograd functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnb_core import functional
from bnb_core.autograd import MatmulLtState, matmul, matmul_4bit
from bnb_core.autograd.product_int8 import int8_weight
from bnb_core.quant_state import QuantState

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]


class GlobalOutlierPooler:
    """The outlier columns of all layers of one width, gathered; there is one, from :meth:`get_instance`.

    The first width that it is told of is the model's; columns of inputs of another width are not taken.
    """

    _instance: GlobalOutlierPooler | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOutlierPooler: there is one in a process, call GlobalOutlierPooler.get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOutlierPooler:
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget the columns and the width."""
        self.outliers: set[int] = set()
        self.model_dim: int | None = None

    def add_outliers(self, outlier_idx: Tensor, feature_dim: int) -> None:
        """Add columns, i64, of an input that has ``feature_dim`` of them."""
        if self.model_dim is None:
            self.model_dim = feature_dim
        if feature_dim == self.model_dim:
            self.outliers.update(outlier_idx.tolist())

    def get_current_outlier_idx(self) -> Tensor:
        """All columns so far, i64, ascending."""
        return torch.tensor(sorted(self.outliers), dtype=torch.int64)


def _record(
    ctx: Any,
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The product of A and B, the first two inputs of a forward, and bias, the fourth, with its graph kept on ctx."""
    inputs: dict[int, Any] = {0: A, 1: B, 3: bias}
    ctx.leaves = {}
    for position, tensor in inputs.items():
        if ctx.needs_input_grad[position]:
            inputs[position] = ctx.leaves[position] = tensor.detach().requires_grad_()
    with torch.enable_grad():
        ctx.result = product(*inputs.values())
    result = ctx.result.detach()
    if out is not None:
        out.copy_(result)
    return result


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Of the five inputs of the forward that has been recorded."""
    gradients = torch.autograd.grad(
        ctx.result, list(ctx.leaves.values()), grad_output, retain_graph=True, create_graph=torch.is_grad_enabled()
    )
    by_position = dict(zip(ctx.leaves, gradients, strict=True))
    return tuple(by_position.get(position) for position in range(5))


class MatMul4Bit(torch.autograd.Function):
    """:func:`matmul_4bit` as an autograd function, for what calls its ``apply`` or derives from it."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        """``A @ W^T + bias``; ``out`` receives it, too."""

        def product(A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
            return matmul_4bit(A, B, quant_state, bias=bias)  # type: ignore[arg-type]

        return _record(ctx, product, A, B, out, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_output)


class MatMul8bitLt(torch.autograd.Function):
    """:func:`matmul` as an autograd function, for what calls its ``apply`` or derives from it."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        """``A @ B^T + bias`` by LLM.int8(); ``out`` receives it, too."""

        def product(A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
            return matmul(A, B, state=state, bias=bias)

        return _record(ctx, product, A, B, out, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_output)


class _ValuesOf(torch.autograd.Function):
    """The values of one tensor, with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return grad_output, None


class MatMul8bitFp(torch.autograd.Function):
    """The product with an int8 weight that is dequantized: inputs are not rounded, and outliers are like other values.

    The arguments are those of :class:`MatMul8bitLt`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        state: MatmulLtState | None = None,
    ) -> Tensor:
        """``A @ B^T + bias``, with B rounded to int8 by rows; ``out`` receives it, too."""
        state = MatmulLtState() if state is None else state

        def product(A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
            if state.has_fp16_weights:
                CB, SCB, _ = functional.int8_vectorwise_quant(B.detach())
            else:
                CB, SCB = int8_weight(B, state)
            weight = functional.int8_vectorwise_dequant(CB, SCB).to(A.dtype)
            if B.requires_grad:
                weight = _ValuesOf.apply(B, weight)
            return torch.nn.functional.linear(A, weight, bias)

        return _record(ctx, product, A, B, out, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_output)
