"""What the quantized layers of a model promise (docs/SPEC.md, sections 3 and 4), and a model that keeps it exactly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from ecosystem import models

import bnb_core
from bnb_core.conformance.compare import MATMUL_U, ROUNDOFF, SUBNORMAL_ROUNDOFF, matmul_bound, within
from bnb_core.conformance.oracle import F64


def quantized_layers(model: torch.nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear4bit | Linear8bitLt)}


def dense_weight(layer: Any) -> torch.Tensor:
    """Dequantized, in f32 whatever the dtype that the weight had before."""
    if isinstance(layer, Linear8bitLt):
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return bitsandbytes.functional.int8_vectorwise_dequant(layer.weight.data, scales)
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)


def _product(layer: Linear4bit, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and the magnitude of its terms, in f64, of the input in the dtype that is computed in."""
    x, weight = x.to(layer.compute_dtype).double(), dense_weight(layer).double()
    result, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    if layer.bias is None:
        return result, magnitude
    bias = layer.bias.to(layer.compute_dtype).double()
    return result + bias, magnitude + bias.abs()


def _bound_of_outliers(layer: Linear8bitLt, x: torch.Tensor, y: torch.Tensor) -> F64:
    """How far two orders of adding up the outliers may be apart; the rest is the same to the bit."""
    outliers = (x.abs() >= layer.state.threshold).flatten(0, -2).any(dim=0)
    if layer.state.threshold == 0 or not outliers.any():
        return np.zeros(y.shape)
    magnitude = x[..., outliers].double().abs() @ dense_weight(layer)[:, outliers].double().abs().T
    result = y.double().numpy()
    bound = matmul_bound(x.dtype, int(outliers.sum()), magnitude.numpy(), result) + ROUNDOFF[x.dtype] * abs(result)
    return 2 * bound


def check_output(name: str, layer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    """Raise Failure where the output is further from the exact one, or int8 from the reference's, than is allowed."""
    if isinstance(layer, Linear8bitLt):
        expected, bound = _by_the_reference(layer, x).double().numpy(), _bound_of_outliers(layer, x, y)
    else:
        expected, magnitude = (tensor.numpy() for tensor in _product(layer, x))
        bound = matmul_bound(layer.compute_dtype, layer.in_features, magnitude, expected)
        # Section 3 lets the output be rounded once, which may take twice the u that it counts for it.
        bound = bound + MATMUL_U[layer.compute_dtype] * abs(expected)
        if x.dtype != layer.compute_dtype:
            bound = bound + ROUNDOFF[x.dtype] * (abs(expected) + bound) + SUBNORMAL_ROUNDOFF[x.dtype]
    assert y.dtype == x.dtype, name
    within(name, y.double().numpy(), expected, bound)


def _by_the_reference(layer: Linear8bitLt, x: torch.Tensor) -> torch.Tensor:
    with bnb_core.use_backend("reference"):
        return type(layer).forward(layer, x)


def _exact_4bit(layer: Linear4bit, x: torch.Tensor) -> torch.Tensor:
    return _product(layer, x)[0].to(layer.compute_dtype).to(x.dtype)


def compute_exactly(model: torch.nn.Module) -> None:
    """Let a model's 4-bit layers compute in f64, rounded once to each dtype on the way, and int8 by the reference."""
    for layer in quantized_layers(model).values():
        exact = _by_the_reference if isinstance(layer, Linear8bitLt) else _exact_4bit
        layer.forward = partial(exact, layer)


# Where a decision is close, rounding alone makes it one way or the other, and from there on results differ by far more
# than rounding. What follows another run's decisions differs from it by rounding.


def follow_routes(model: torch.nn.Module, calls: dict[str, list[Any]]) -> None:
    """Let a model send each token to the experts that it had in another run.

    Whether there is more to another choice than rounding is seen in the logits: what a router sees reaches them, too.
    """
    for name, router in models.routers(model).items():
        outputs = iter([output for _, output in calls[name]])
        router.forward = lambda x, outputs=outputs: next(outputs)


def follow_int8_inputs(model: torch.nn.Module, calls: dict[str, list[Any]], tolerance: float) -> None:
    """Let int8 layers quantize the inputs that they had in another run.

    Args:
        tolerance: how far these may be from the model's own, in parts of the largest entry.
    """
    for name, layer in models.int8_layers(model).items():
        inputs = iter([x for x, _ in calls[name]])
        layer.forward = partial(_quantizing, name, layer.forward, inputs, tolerance)


def _quantizing(name: str, forward: Any, inputs: Iterator[torch.Tensor], tolerance: float, x: torch.Tensor) -> Any:
    followed = next(inputs)
    bound = np.float64(tolerance * x.abs().max().item())
    within(f"{name}, input", followed.double().numpy(), x.double().numpy(), bound)
    return forward(followed)
