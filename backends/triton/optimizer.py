"""Optimizer steps with 32-bit and with blockwise 8-bit state (docs/SPEC.md section 5), from one template.

Parameters are updated in blocks of 256, all of it computed in f32. What an optimizer computes stands once, in
``advance``; 8-bit state only adds decoding and encoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from bnb_core.primitives import OPTIMIZER_BLOCKSIZE
from bnb_core.records import OptimizerState8bit, OptimizerState32bit, OptimizerStep
from bnb_core.step_numbers import corrections, scheduled

from .encode import INFINITY_BITS, MAGNITUDE_BITS, count_below, is_usable, midpoints_of, scaled_blocks
from .launch import TILE, launch
from .step_numbers import ALPHA, BETA3, DECAY, EPS, IS_FIRST, REST3, SIZE, UNIT, numbers_in_memory

BLOCKSIZE = tl.constexpr(OPTIMIZER_BLOCKSIZE)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)

RULES = {"lamb": "adam", "lars": "momentum"}
"""Those that differ from another in the size of their update only."""


@triton.jit
def advance(
    RULE: tl.constexpr,
    is_first,
    size,
    g,
    p,
    m,
    slow,
    v,
    beta1,
    beta2,
    beta3,
    rest1,
    rest2,
    rest3,
    alpha,
    eps,
    weight_decay,
):
    """size * numerator / denominator of the update, and the three states one step ahead."""
    if RULE == "momentum" or RULE == "rmsprop" or RULE == "adagrad":
        g += weight_decay * p
    if RULE == "adam":
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        update = tl.div_rn(size * m, tl.sqrt_rn(v) + eps)
    elif RULE == "ademamix":
        m = beta1 * m + rest1 * g
        slow = beta3 * slow + rest3 * g
        v = beta2 * v + rest2 * g * g
        update = tl.div_rn(size * (m + alpha * slow), tl.sqrt_rn(v) + eps)
    elif RULE == "momentum":
        m = tl.where(is_first, g, beta1 * m + g)
        update = size * m
    elif RULE == "lion":
        direction = beta1 * m + rest1 * g
        m = beta2 * m + rest2 * g
        update = tl.where(direction > 0, size, tl.where(direction < 0, -size, 0.0))
    else:
        if RULE == "rmsprop":
            m = beta1 * m + rest1 * g * g
        else:
            m += g * g
        update = tl.div_rn(size * g, tl.sqrt_rn(m) + eps)
    return update, m, slow, v


@triton.jit
def read_state(state, qmap, absmax, first, index, left):
    """f32 values of a tile of a state; absmax None: it is f32, else codes u8."""
    inside = index < left
    stored = tl.load(state + first + index, mask=inside, other=0)
    if absmax is None:
        return stored
    else:
        scales = tl.load(absmax + (first + index) // BLOCKSIZE, mask=inside, other=0.0)
        return tl.load(qmap + stored.to(tl.int32)) * scales


@triton.jit
def write_state(state, qmap, absmax, first, index, left, values, DIVIDES: tl.constexpr, BLOCKS: tl.constexpr):
    """DIVIDES: a positive value takes the smallest positive code rather than that of zero: it will be divided by."""
    if absmax is None:
        tl.store(state + first + index, values, mask=index < left)
    else:
        TILE: tl.constexpr = BLOCKS * BLOCKSIZE
        block = tl.arange(0, BLOCKS)
        blocks = tl.reshape(values, [BLOCKS, BLOCKSIZE])
        scaled, scales = scaled_blocks(blocks)
        midpoints = midpoints_of(qmap)
        codes = count_below(midpoints, tl.reshape(scaled, [TILE]), 8)
        if DIVIDES:
            zero = tl.sum((midpoints < 0).to(tl.int32), axis=0)
            positive = tl.reshape((blocks > 0) & is_usable(scales)[:, None], [TILE])
            codes = tl.where(positive & (codes == zero), zero + 1, codes)
        tl.store(state + first + index, codes.to(tl.uint8), mask=index < left)
        tl.store(absmax + first // BLOCKSIZE + block, scales, mask=block * BLOCKSIZE < left)


@triton.jit
def square_sum(values):
    """The largest magnitude of the finite ones, and the sum of their squares over that squared: neither overflows."""
    bits = values.to(tl.int32, bitcast=True) & MAGNITUDE_BITS
    finite = tl.where(bits < INFINITY_BITS, values, 0.0)
    largest = tl.maximum(tl.max(tl.abs(finite), axis=0), SMALLEST_NORMAL)
    share = tl.div_rn(finite, largest)
    return largest, tl.sum(share * share, axis=0)


@triton.jit
def optimizer_kernel(
    g,
    p,
    state1,
    state2,
    qmap1,
    qmap2,
    absmax1,
    absmax2,
    sums,
    ratio,
    numbers,
    n,
    size,
    gnorm_scale,
    beta1,
    beta2,
    beta3,
    rest1,
    rest2,
    rest3,
    alpha,
    eps,
    weight_decay,
    decay,
    RULE: tl.constexpr,
    FIRST_STEP: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Step a tile of p and its states; or, given sums, only measure p and the update.

    ratio: f32[1] that size is multiplied by. numbers: as step_numbers.py has them, in place of their arguments.
    qmap and absmax: None where state is f32. FIRST_STEP: of momentum.
    """
    TILE: tl.constexpr = BLOCKS * BLOCKSIZE
    HAS_SLOW: tl.constexpr = RULE == "ademamix"
    HAS_SECOND: tl.constexpr = RULE == "adam" or RULE == "ademamix"
    DECOUPLED: tl.constexpr = RULE == "adam" or RULE == "ademamix" or RULE == "lion"
    DIVIDES_BY_FIRST: tl.constexpr = RULE == "rmsprop" or RULE == "adagrad"

    program = tl.program_id(0).to(tl.int64)
    first = program * TILE
    left = tl.minimum(n - first, TILE).to(tl.int32)
    index = tl.arange(0, TILE)
    inside = index < left
    state_slow = state1 + n
    absmax_slow = None if absmax1 is None else absmax1 + ((n - 1) // BLOCKSIZE + 1)

    gradient = gnorm_scale * tl.load(g + first + index, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(p + first + index, mask=inside, other=0.0).to(tl.float32)
    m = read_state(state1, qmap1, absmax1, first, index, left)
    slow = read_state(state_slow, qmap1, absmax_slow, first, index, left) if HAS_SLOW else m
    v = read_state(state2, qmap2, absmax2, first, index, left) if HAS_SECOND else m
    is_first = FIRST_STEP
    if numbers is not None:
        size = tl.load(numbers + (SIZE if sums is None else UNIT))
        alpha = tl.load(numbers + ALPHA)
        eps = tl.load(numbers + EPS)
        beta3 = tl.load(numbers + BETA3)
        rest3 = tl.load(numbers + REST3)
        decay = tl.load(numbers + DECAY)
        is_first = tl.load(numbers + IS_FIRST) != 0
    if ratio is not None:
        size = size * tl.load(ratio)
    update, new_m, new_slow, new_v = advance(
        RULE, is_first, size, gradient, before, m, slow, v, beta1, beta2, beta3, rest1, rest2, rest3, alpha, eps,
        weight_decay,
    )  # fmt: skip
    if SKIP_ZEROS:
        skipped = gradient == 0
        update = tl.where(skipped, 0.0, update)
        new_m = tl.where(skipped, m, new_m)
        new_slow = tl.where(skipped, slow, new_slow)
        new_v = tl.where(skipped, v, new_v)

    if sums is not None:
        largest, total = square_sum(before)
        tl.store(sums + program * 4, largest)
        tl.store(sums + program * 4 + 1, total)
        largest, total = square_sum(update)
        tl.store(sums + program * 4 + 2, largest)
        tl.store(sums + program * 4 + 3, total)
    else:
        after = (before * decay if DECOUPLED else before) - update
        if SKIP_ZEROS:
            after = tl.where(skipped, before, after)
        tl.store(p + first + index, after.to(p.dtype.element_ty), mask=inside)
        write_state(state1, qmap1, absmax1, first, index, left, new_m, DIVIDES_BY_FIRST, BLOCKS)
        if HAS_SLOW:
            write_state(state_slow, qmap1, absmax_slow, first, index, left, new_slow, False, BLOCKS)
        if HAS_SECOND:
            write_state(state2, qmap2, absmax2, first, index, left, new_v, True, BLOCKS)


@triton.jit
def norm(sums, count, TILE: tl.constexpr):
    """From pairs of a largest magnitude and a sum, four f32 apart: the norm of all, summed up in one order."""
    largest = tl.full([TILE], SMALLEST_NORMAL, tl.float32)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE).to(tl.int64)
        largest = tl.maximum(largest, tl.load(sums + index * 4, mask=index < count, other=SMALLEST_NORMAL))
    overall = tl.max(largest, axis=0)
    total = tl.zeros([TILE], tl.float32)
    for first in range(0, count, TILE):
        index = first + tl.arange(0, TILE).to(tl.int64)
        share = tl.div_rn(tl.load(sums + index * 4, mask=index < count, other=0.0), overall)
        total += tl.load(sums + index * 4 + 1, mask=index < count, other=0.0) * share * share
    return overall * tl.sqrt_rn(tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["count"])
def trust_ratio_kernel(sums, ratio, unorm, count, max_unorm, TILE: tl.constexpr):
    """s of the rules: the update is at most max_unorm times as long as the parameter."""
    p_norm = norm(sums, count, TILE)
    update_norm = norm(sums + 2, count, TILE)
    bound = max_unorm * tl.div_rn(p_norm, update_norm)
    tl.store(ratio, tl.where(bound < 1, bound, 1.0))
    tl.store(unorm, update_norm)


def _f32(value: float) -> float:
    return float(np.float32(value))


def _coefficients(rule: str, h: OptimizerStep) -> tuple[float, dict[str, float]]:
    """The factor of an update beside lr, and what is the same for every entry, each rounded to f32 once."""
    unit, alpha, eps = 1.0, h.alpha, h.eps
    if rule in ("adam", "ademamix"):
        c1, c2 = corrections(h)
        unit, alpha, eps = c2 / c1, alpha * c1, eps * c2
    exact = {
        "gnorm_scale": h.gnorm_scale,
        "beta1": h.beta1,
        "beta2": h.beta2,
        "beta3": h.beta3,
        "rest1": 1 - h.beta1,
        "rest2": 1 - h.beta2,
        "rest3": 1 - h.beta3,
        "alpha": alpha,
        "eps": eps,
        "weight_decay": h.weight_decay,
        "decay": 1 - h.lr * h.weight_decay,
    }
    return unit, {name: _f32(value) for name, value in exact.items()}


def _update(h: OptimizerStep, p: Tensor, others: tuple[Tensor | None, ...], unorm_vec: Tensor | None) -> None:
    """``others``: g and the fields of an OptimizerState8bit, those that f32 state lacks None."""
    (g, *state), n = others, p.numel()
    tensors = (g, p, *state)
    rule = RULES.get(h.optimizer_name, h.optimizer_name)
    numbers = numbers_in_memory(rule, h, p.device)
    h = scheduled(h)
    unit, scalars = _coefficients(rule, h)
    programs = triton.cdiv(n, TILE)
    constants: dict[str, Any] = {
        **scalars,
        "RULE": rule,
        "FIRST_STEP": rule == "momentum" and h.step == 1,
        "SKIP_ZEROS": h.skip_zeros,
        "BLOCKS": TILE // OPTIMIZER_BLOCKSIZE,
    }
    ratio = None
    if h.max_unorm > 0:
        assert unorm_vec is not None
        sums = torch.empty(4 * programs, dtype=torch.float32, device=unorm_vec.device)
        ratio = torch.empty(1, dtype=torch.float32, device=unorm_vec.device)
        launch(optimizer_kernel, programs, *tensors, sums, None, numbers, n, _f32(unit), **constants)
        launch(trust_ratio_kernel, 1, sums, ratio, unorm_vec, programs, _f32(h.max_unorm), TILE=1024)
    launch(optimizer_kernel, programs, *tensors, None, ratio, numbers, n, _f32(h.lr * unit), **constants)


def optimizer_update_32bit(
    step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState32bit, unorm_vec: Tensor | None
) -> None:
    _update(step, p, (g, *state, None, None, None, None), unorm_vec)


def optimizer_update_8bit_blockwise(
    step: OptimizerStep, g: Tensor, p: Tensor, state: OptimizerState8bit, unorm_vec: Tensor | None
) -> None:
    _update(step, p, (g, *state), unorm_vec)
