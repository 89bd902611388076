"""What the differentiable products share: who wants a gradient, which backend serves it, batches and tangents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import unwrap_if_dead
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from bnb_core import registry
from bnb_core.checks import check_dtype, check_same_device, check_shape


def sum_to_bias(dY: Tensor) -> Tensor:
    """The gradient of a bias."""
    return dY.sum_to_size(dY.shape[-1])


def remember_choice(ctx: Any) -> None:
    """Keep what ``use_backend`` names now for the gradient: autograd runs in threads of its own."""
    ctx.backend_choice = registry.choice()


def by_the_choice_of_the_forward(gradient: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Have a gradient served by what :func:`remember_choice` kept."""

    @wraps(gradient)
    def call(ctx: Any, *arguments: Any) -> Tensor:
        if ctx.backend_choice is None:
            return gradient(ctx, *arguments)
        with registry.carry(ctx.backend_choice):
            return gradient(ctx, *arguments)

    return call


def transforms() -> bool:
    """Whether torch.func, or forward-mode differentiation, is at work."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def eager(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Its ``apply`` where neither :func:`transforms` is nor torch compiles.

    torch's own goes through the arguments in Python first, which takes as long as half of all that follows.
    """
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*arguments: Any) -> Any:
        return apply(*[unwrap_if_dead(each) if isinstance(each, Tensor) else each for each in arguments])

    return call


def living(saved: Sequence[Any]) -> list[Any]:
    """Saved tensors without the wrappers that torch.func has left around them."""
    return [None if tensor is None else unwrap_if_dead(tensor) for tensor in saved]


def tangent(dA: Tensor | None, dbias: Tensor | None, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Of ``product(A) + bias``, where at least one of the two has one."""
    if dA is None:
        return dbias  # type: ignore[return-value]
    return product(dA) if dbias is None else product(dA) + dbias


def of_batch(
    product: Callable[[Tensor, Tensor | None], Tensor],
    A: Tensor,
    bias: Tensor | None,
    in_dims: tuple[Any, ...],
    bias_place: int | None,
) -> tuple[Tensor, int]:
    """A linear layer's rule for vmap: a batch of A, of biases, or of both; weights have none.

    Args:
        product: of A and a bias.
        in_dims: where each argument of the function has its batch, A's first; None where it has none.
        bias_place: of the bias among the arguments; None where the function takes none.
    """
    of_A, of_bias = in_dims[0], None if bias_place is None else in_dims[bias_place]
    batches = [dim for dim in tree_leaves(in_dims) if dim is not None]
    if len(batches) > (of_A is not None) + (of_bias is not None):
        raise NotImplementedError("torch.vmap over quantized weights is not possible: they are one tensor of codes")
    if of_A is not None:
        A = A.movedim(of_A, 0)
    if bias is None or of_bias is None:
        return product(A, bias), 0
    bias = bias.movedim(of_bias, 0)
    y = product(A, None)
    rows = y.dim() - (1 if of_A is None else 2)
    return y + bias.view(len(bias), *[1] * rows, -1), 0


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Also for torch.func and forward-mode differentiation, whose rules the autograd functions have."""
    return transforms() or asks_for_gradient(*tensors)


def asks_for_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass through one of them may come."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                return True
    return False


def write_out(result: Tensor, out: Tensor | None, *inputs: Tensor | None) -> Tensor:
    """The result, in the caller's tensor where there is one."""
    if out is None:
        return result
    if needs_gradient(*inputs):
        raise ValueError("out: cannot be given where a gradient is wanted; use torch.no_grad()")
    check_dtype("out", out, (result.dtype,))
    check_shape("out", out, result.shape)
    check_same_device([("the result", result), ("out", out)])
    return out.copy_(result)
