"""Optimizer steps as docs/SPEC.md section 5 defines them.

Sources: 8-bit Optimizers (arXiv 2110.02861), AdEMAMix (arXiv 2409.03137), LAMB (arXiv 1904.00962), LARS (arXiv
1708.03888), Lion (arXiv 2302.06675). A rule is one short function from gradient, parameter and state to the new
state and the update; which form the state is kept in, and how far the update goes, does not concern it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bnb_core.primitives import OPTIMIZER_BLOCKSIZE as BLOCKSIZE
from bnb_core.records import OptimizerState8bit, OptimizerState32bit, OptimizerStep
from bnb_core.step_numbers import at_hand, corrections, scheduled

from .quantize import dequantize_blockwise, quantize_blockwise

# Python's floats are f64: each is rounded to f32 once, where it meets a tensor.


def _decayed(h: OptimizerStep, p: Tensor) -> Tensor:
    return p * (1.0 - h.lr * h.weight_decay)


class Result(NamedTuple):
    """What a rule makes of one step: ``p`` (after decoupled weight decay) is still to lose ``lr * s * update``."""

    p: Tensor
    update: Tensor
    states: tuple[Tensor, ...]


def _adam(h: OptimizerStep, g: Tensor, p: Tensor, m: Tensor, v: Tensor) -> Result:
    m = h.beta1 * m + (1 - h.beta1) * g
    v = h.beta2 * v + (1 - h.beta2) * g * g
    c1, c2 = corrections(h)
    return Result(_decayed(h, p), c2 / c1 * m / (v.sqrt() + h.eps * c2), (m, v))


def _ademamix(h: OptimizerStep, g: Tensor, p: Tensor, moments: Tensor, v: Tensor) -> Result:
    fast = h.beta1 * moments[0] + (1 - h.beta1) * g
    slow = h.beta3 * moments[1] + (1 - h.beta3) * g
    v = h.beta2 * v + (1 - h.beta2) * g * g
    c1, c2 = corrections(h)
    update = c2 / c1 * (fast + h.alpha * c1 * slow) / (v.sqrt() + h.eps * c2)
    return Result(_decayed(h, p), update, (torch.stack([fast, slow]), v))


def _momentum(h: OptimizerStep, g: Tensor, p: Tensor, m: Tensor) -> Result:
    g = g + h.weight_decay * p
    m = g if h.step == 1 else h.beta1 * m + g
    return Result(p, m, (m,))


def _lion(h: OptimizerStep, g: Tensor, p: Tensor, m: Tensor) -> Result:
    update = (h.beta1 * m + (1 - h.beta1) * g).sign()
    return Result(_decayed(h, p), update, (h.beta2 * m + (1 - h.beta2) * g,))


def _rmsprop(h: OptimizerStep, g: Tensor, p: Tensor, v: Tensor) -> Result:
    g = g + h.weight_decay * p
    v = h.beta1 * v + (1 - h.beta1) * g * g
    return Result(p, g / (v.sqrt() + h.eps), (v,))


def _adagrad(h: OptimizerStep, g: Tensor, p: Tensor, v: Tensor) -> Result:
    g = g + h.weight_decay * p
    v = v + g * g
    return Result(p, g / (v.sqrt() + h.eps), (v,))


@dataclass(frozen=True)
class Rule:
    """``divisor``: the index of the state whose root an update is divided by; None if there is no such state."""

    function: Callable[..., Result]
    divisor: int | None


RULES = {
    "adam": Rule(_adam, divisor=1),
    "lamb": Rule(_adam, divisor=1),
    "ademamix": Rule(_ademamix, divisor=1),
    "momentum": Rule(_momentum, divisor=None),
    "lars": Rule(_momentum, divisor=None),
    "lion": Rule(_lion, divisor=None),
    "rmsprop": Rule(_rmsprop, divisor=0),
    "adagrad": Rule(_adagrad, divisor=0),
}


def optimizer_update_32bit(
    step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState32bit, unorm_vec: Tensor | None
) -> None:
    """Step ``p`` with f32 state, all in place."""
    states = _present(*state)
    result = _stepped(step, g, p, states, unorm_vec)
    p.copy_(result.p)
    for old, new in zip(states, result.states, strict=True):
        old.copy_(new)


def optimizer_update_8bit_blockwise(
    step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState8bit, unorm_vec: Tensor | None
) -> None:
    """Step ``p`` with 8-bit state, all in place; ``p`` moves by the new state before that is rounded to 8 bits."""
    codes, qmaps = _present(state.state1, state.state2), _present(state.qmap1, state.qmap2)
    quantized = list(zip(codes, qmaps, _present(state.absmax1, state.absmax2), strict=True))
    states = tuple(_decode(*each, p) for each in quantized)
    result = _stepped(step, g, p, states, unorm_vec)
    p.copy_(result.p)
    for index, (new, each) in enumerate(zip(result.states, quantized, strict=True)):
        _encode(new, *each, p, never_vanishes=index == RULES[step.optimizer_name].divisor)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _stepped(h: OptimizerStep, g: Tensor, p: Tensor, states: tuple[Tensor, ...], unorm_vec: Tensor | None) -> Result:
    """The new parameter and state in f32."""
    h = scheduled(at_hand(h))
    g, p = h.gnorm_scale * g.float(), p.float()
    result = RULES[h.optimizer_name].function(h, g, p, *states)
    if h.skip_zeros:
        result = _where(g != 0, result, Result(p, torch.zeros_like(p), states))
    scale = 1.0
    if h.max_unorm > 0:
        update_norm = _norm(result.update)
        if unorm_vec is not None:
            unorm_vec.fill_(update_norm)
        if update_norm > 0:
            scale = min(1.0, h.max_unorm * _norm(p) / update_norm)
    return result._replace(p=result.p - h.lr * scale * result.update)


def _where(condition: Tensor, yes: Result, no: Result) -> Result:
    return Result(
        torch.where(condition, yes.p, no.p),
        torch.where(condition, yes.update, no.update),
        tuple(torch.where(condition, new, old) for new, old in zip(yes.states, no.states, strict=True)),
    )


def _norm(x: Tensor) -> float:
    """The norm of the finite entries, in f64: one bad entry must not decide how far the others move."""
    # Taken on the CPU, because not every device has f64.
    return torch.where(x.isfinite(), x, 0.0).cpu().double().norm().item()


def _moments(state: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """The tensors that a state stacks: each is blocked by itself."""
    return state.unbind() if state.dim() > p.dim() else (state,)


def _decode(state: Tensor, qmap: Tensor, absmax: Tensor, p: Tensor) -> Tensor:
    moments = _moments(state, p)
    scales = absmax.reshape(-1).chunk(len(moments))
    decoded = [dequantize_blockwise(q, s, qmap, BLOCKSIZE, torch.float32) for q, s in zip(moments, scales, strict=True)]
    return torch.stack(decoded).view(state.shape)


def _encode(values: Tensor, state: Tensor, qmap: Tensor, absmax: Tensor, p: Tensor, never_vanishes: bool) -> None:
    """Round to 8 bits into ``state`` and ``absmax``.

    ``never_vanishes``: a positive value nearest to 0 takes the smallest positive code. Stored as 0, it would have the
    next step divide by eps.
    """
    encoded = [_encode_moment(moment, qmap, never_vanishes) for moment in _moments(values, p)]
    state.copy_(torch.stack([codes for codes, _ in encoded]).view(state.shape))
    absmax.copy_(torch.stack([scales for _, scales in encoded]).view(absmax.shape))


def _encode_moment(moment: Tensor, qmap: Tensor, never_vanishes: bool) -> tuple[Tensor, Tensor]:
    codes, absmax = quantize_blockwise(moment, qmap, BLOCKSIZE)
    if never_vanishes:
        zero = qmap.abs().argmin().to(torch.uint8)
        # A block without a usable scale keeps the code of 0.0, so that it decodes to 0 or to NaN as a whole.
        usable = ((absmax > 0) & absmax.isfinite()).repeat_interleave(BLOCKSIZE)[: moment.numel()].view(moment.shape)
        codes = torch.where((moment > 0) & (codes == zero) & usable, zero + 1, codes)
    return codes, absmax
