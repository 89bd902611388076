"""docs/SPEC.md once more, in numpy and independent of every backend: what the suite compares with.

Sections 2 and 4 are computed in f32 as written there, for bits are promised; the others in f64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnb_core.records import OptimizerStep

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
CodesOf = Callable[[F32, F32], NDArray[np.uint8]]
"""From values between -1 and 1 and a codebook to codes."""


def blocks_of(values: F32, blocksize: int) -> list[F32]:
    return [values[start : start + blocksize] for start in range(0, len(values), blocksize)]


def _absmax(block: F32) -> np.float32:
    if np.isnan(block).any():
        return np.float32(np.nan)
    largest = np.abs(block).max()
    return np.float32(0) if largest < np.float32(2.0**-126) else largest


def _codes(scaled: F32, code: F32) -> NDArray[np.uint8]:
    midpoints = (code[:-1] + code[1:]) * np.float32(0.5)
    return (midpoints[None, :] < scaled[:, None]).sum(axis=1).astype(np.uint8)


def _signed_codes(scaled: F32, code: F32) -> NDArray[np.uint8]:
    """Bit 3 is the sign; the codebook begins with the magnitudes."""
    order = np.argsort(code[:8])
    index = order[_codes(np.abs(scaled), code[order])]
    return (index + 8 * (scaled < 0)).astype(np.uint8)


class Format4bit(NamedTuple):
    """A 4-bit format of section 1, and its rule of section 2."""

    codebook: F32
    codes_of: CodesOf


def _f32(*values: float) -> F32:
    return np.array(values, dtype=np.float32)


FORMATS = {
    "nf4": Format4bit(
        _f32(
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ),
        _codes,
    ),
    "fp4": Format4bit(
        _f32(
            0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4,
            0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4,
        ),
        _signed_codes,
    ),
}  # fmt: skip


def _zero(code: F32) -> int:
    """The code of 0.0, or of what is nearest to it."""
    return int(np.abs(code).argmin())


def _quantize_blocks(values: F32, blocksize: int, code: F32, codes_of: CodesOf) -> tuple[NDArray[np.uint8], F32]:
    codes, scales = [], []
    for block in blocks_of(values, blocksize):
        absmax = _absmax(block)
        if absmax > 0 and np.isfinite(absmax):
            codes.append(codes_of(block * (np.float32(1) / absmax), code))
        else:
            codes.append(np.full(len(block), _zero(code), dtype=np.uint8))
        scales.append(absmax)
    empty = np.zeros(0, dtype=np.uint8)
    return np.concatenate([empty, *codes]), np.array(scales, dtype=np.float32)


def quantize_blockwise(values: F32, code: F32, blocksize: int) -> tuple[NDArray[np.uint8], F32]:
    return _quantize_blocks(values, blocksize, code, _codes)


def quantize_4bit(values: F32, blocksize: int, quant_type: str) -> tuple[NDArray[np.uint8], F32]:
    """Packed bytes and scales."""
    code, codes_of = FORMATS[quant_type]
    codes, scales = _quantize_blocks(values, blocksize, code, codes_of)
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(_zero(code)))
    return (codes[0::2] << 4 | codes[1::2]).astype(np.uint8), scales


def dequantize(codes: NDArray[np.uint8], scales: F32, code: F32, blocksize: int) -> F32:
    return code[codes] * np.repeat(scales, blocksize)[: len(codes)]


def dequantize_4bit(packed: NDArray[np.uint8], scales: F32, n: int, blocksize: int, quant_type: str) -> F32:
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]
    return dequantize(codes, scales, FORMATS[quant_type].codebook, blocksize)


def double_quantized_scales(
    codes: NDArray[np.uint8], nested_blocksize: int, nested_absmax: F32, nested_code: F32, offset: F32
) -> F32:
    return dequantize(codes, nested_absmax, nested_code, nested_blocksize) + offset


class Int8Rows(NamedTuple):
    """Rows quantized to int8."""

    q: NDArray[np.int8]
    stats: F32
    outlier_columns: NDArray[np.bool_]


def _outliers(values: F32, threshold: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which entries are outliers, and which columns hold one."""
    outliers = np.abs(values) >= threshold if threshold > 0 else np.zeros(values.shape, dtype=np.bool_)
    return outliers, np.asarray(outliers.any(axis=0))


def int8_rows(values: F32, threshold: float) -> Int8Rows:
    """``int8_vectorwise_quant`` of [M, K]."""
    outliers, columns = _outliers(values, threshold)
    q, stats = _int8_rows(values, outliers, columns[None, :])
    return Int8Rows(q, stats, columns)


def int8_columns(values: F32, threshold: float) -> Int8Rows:
    """The column half of ``int8_double_quant``, as [M, K]."""
    outliers, columns = _outliers(values, threshold)
    q, stats = _int8_rows(values.T, outliers.T, columns[:, None])
    return Int8Rows(q.T, stats, columns)


def _int8_rows(values: F32, outliers: NDArray, zeroed: NDArray) -> tuple[NDArray[np.int8], F32]:
    stats = np.zeros(values.shape[0], dtype=np.float32)
    if values.shape[1]:
        stats = np.where(outliers, np.float32(0), np.abs(values)).max(axis=1)
    scale = np.float32(127) / stats
    stats = np.where(np.isinf(scale), np.float32(0), stats)
    usable = (stats > 0) & np.isfinite(stats)
    codes = np.rint(np.where(usable[:, None] & ~outliers & ~zeroed, values * scale[:, None], np.float32(0)))
    return codes.astype(np.int8), stats


class Moments(NamedTuple):
    """The result of one optimizer step."""

    p: F64
    state1: F64
    state2: F64 | None
    update: F64


def _scheduled(h: OptimizerStep) -> tuple[float, float]:
    """AdEMAMix' alpha and beta3 at a step."""
    alpha, beta3 = h.alpha, h.beta3
    if h.t_alpha:
        alpha = min(h.alpha * h.step / h.t_alpha, h.alpha)
    if h.t_beta3:
        share, first, last = h.step / h.t_beta3, np.log(h.beta1), np.log(h.beta3)
        beta3 = min(np.exp(first * last / ((1 - share) * last + share * first)), h.beta3)
    return alpha, beta3


def optimizer_step(h: OptimizerStep, g: F64, p: F64, state1: F64, state2: F64 | None) -> Moments:
    """One step in f64. ``update`` is what the learning rate multiplies."""
    name = h.optimizer_name
    g = g * h.gnorm_scale
    c1, c2 = 1 - h.beta1**h.step, np.sqrt(1 - h.beta2**h.step)
    alpha, beta3 = _scheduled(h)
    start, kept, decay = p, g == 0, 1 - h.lr * h.weight_decay
    new1, new2 = state1, state2
    if name in ("adam", "lamb"):
        p = p * decay
        new1 = h.beta1 * state1 + (1 - h.beta1) * g
        new2 = h.beta2 * state2 + (1 - h.beta2) * g * g  # type: ignore[operator]
        update = c2 / c1 * new1 / (np.sqrt(new2) + h.eps * c2)
    elif name == "ademamix":
        p = p * decay
        new1 = np.stack([h.beta1 * state1[0] + (1 - h.beta1) * g, beta3 * state1[1] + (1 - beta3) * g])
        new2 = h.beta2 * state2 + (1 - h.beta2) * g * g  # type: ignore[operator]
        update = (new1[0] / c1 + alpha * new1[1]) / (np.sqrt(new2) / c2 + h.eps)
    elif name in ("momentum", "lars"):
        g = g + h.weight_decay * p
        new1 = g if h.step == 1 else h.beta1 * state1 + g
        update = new1
    elif name == "lion":
        p = p * decay
        update = np.sign(h.beta1 * state1 + (1 - h.beta1) * g)
        new1 = h.beta2 * state1 + (1 - h.beta2) * g
    else:
        g = g + h.weight_decay * p
        new1 = h.beta1 * state1 + (1 - h.beta1) * g * g if name == "rmsprop" else state1 + g * g
        update = g / (np.sqrt(new1) + h.eps)
    if h.skip_zeros:
        update = np.where(kept, 0.0, update)
    scale = 1.0
    norm = np.sqrt((update**2).sum())
    if h.max_unorm > 0 and norm > 0:
        scale = min(1.0, h.max_unorm * np.sqrt((start**2).sum()) / norm)
    p = p - h.lr * scale * update
    if h.skip_zeros:
        p, new1 = np.where(kept, start, p), np.where(kept, state1, new1)
        new2 = None if new2 is None else np.where(kept, state2, new2)  # type: ignore[arg-type]
    return Moments(p, new1, new2, update)
