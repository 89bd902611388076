"""The codebooks: the values that a code stands for.

The dynamic map is from 8-bit Optimizers (arXiv 2110.02861, section 1.3), ``af4`` from NF4 Isn't Information
Theoretically Optimal (arXiv 2306.06965).
Every function returns a fresh tensor, on the CPU unless told otherwise: editing one changes no other.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from bnb_core.checks import as_device, check_choice, check_flag, check_number, check_whole, shown
from bnb_core.formats import FORMATS

FOUR_BIT_CODES: dict[str, tuple[float, ...]] = {
    **{each.name: each.codebook for each in FORMATS.values()},
    "int4": tuple(sign * step / 7 for sign, steps in ((1.0, range(7, -1, -1)), (-1.0, range(0, 8))) for step in steps),
    "af4": (
        1.0,
        0.72424863,
        0.55496234,
        0.42563882,
        0.31675666,
        0.21961274,
        0.12934483,
        0.04273164,
        0.0,
        -0.04934812,
        -0.14982478,
        -0.25607552,
        -0.3736951,
        -0.51243739,
        -0.69441008,
        -1.0,
    ),
}


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 values of a 4-bit type, f32[16], indexed by code.

    Args:
        typename: ``nf4``, ``fp4``, ``int4`` or ``af4``.
        device: where the tensor is made; the default is the CPU.
        blocksize: ``af4`` was derived for blocks of 64 and takes no other.

    Raises:
        ValueError: an unknown type, or ``af4`` with another block size.
    """
    check_choice("typename", typename, tuple(FOUR_BIT_CODES))
    check_whole("blocksize", blocksize, minimum=1)
    if typename == "af4" and blocksize != 64:
        raise ValueError(f"blocksize: af4 is defined for 64 only, got {blocksize}")
    device = torch.device("cpu") if device is None else as_device("device", device)
    return torch.tensor(FOUR_BIT_CODES[typename], dtype=torch.float32, device=device)


def _check_bits(total_bits: int) -> None:
    check_whole("total_bits", total_bits, minimum=1, maximum=8)


def _padded(values: list[float] | np.ndarray) -> Tensor:
    """Sorted f32[256], short codebooks filled up with zeros."""
    code = np.zeros(256, dtype=np.float32)
    code[: len(values)] = values
    return torch.from_numpy(np.sort(code))


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values on [-1, 1] (unsigned: [0, 1]), f32[256] ascending.

    With fewer than 8 bits, or with ``add_zero`` (the signed grid then has an odd number of values and so holds 0),
    the entries left over are zeros in the middle.

    Raises:
        ValueError: total_bits is not 1 to 8.
    """
    check_flag("signed", signed)
    _check_bits(total_bits)
    check_flag("add_zero", add_zero)
    count = 2**total_bits
    if add_zero or total_bits < 8:
        count -= 1 if signed else 0
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, count, device="cpu")
    middle, missing = count // 2, 256 - count
    return torch.cat([values[:middle], values.new_zeros(missing), values[middle:]])


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution scaled to [-1, 1], f32[256] ascending (QLoRA, section 3).

    Args:
        offset: the probability that the largest quantile stands for, above 0.5 and below 1 in f32.
        use_extra_value: eight positive values and seven negative ones, instead of seven each.

    Raises:
        TypeError, ValueError: an argument that is not as above, by its name.
    """
    check_number("offset", offset, minimum=0.5 + 2**-24, maximum=1 - 2**-24)
    check_flag("use_extra_value", use_extra_value)

    def quantiles(count: int) -> list[float]:
        probabilities = torch.linspace(offset, 0.5, count + 1, device="cpu")[:-1].tolist()
        return [NormalDist().inv_cdf(probability) for probability in probabilities]

    positive = quantiles(8 if use_extra_value else 7)
    code = _padded(positive + [-value for value in quantiles(7)])
    return code / code.max()


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """A floating-point format scaled to [-1, 1], f32[256] ascending.

    Its subnormals lie a factor of 4 below where IEEE 754 puts them: so they stand in the checkpoints in use.

    Raises:
        ValueError: the fields do not add up to ``total_bits``, or that is not 1 to 8.
    """
    check_flag("signed", signed)
    check_whole("exponent_bits", exponent_bits)
    check_whole("precision_bits", precision_bits)
    _check_bits(total_bits)
    if exponent_bits + precision_bits + int(signed or 0) != total_bits:
        raise ValueError(
            f"total_bits: expected signed + exponent_bits + precision_bits = "
            f"{shown(int(signed or 0) + exponent_bits + precision_bits)}, got {total_bits}"
        )
    bias = 2 ** (exponent_bits - 1)
    fractions = [i / 2**precision_bits for i in range(2**precision_bits)]
    magnitudes = [fraction * 2.0**-bias for fraction in fractions]
    for exponent in range(1, 2**exponent_bits):
        magnitudes += [(1 + fraction) * 2.0 ** (exponent + 1 - bias) for fraction in fractions]
    if magnitudes == [0.0]:
        raise ValueError("exponent_bits: expected a bit for exponents or fractions, without which all values are 0")
    magnitudes = [magnitude / 2 for magnitude in magnitudes]  # f32 does not hold 2^128
    values = magnitudes + [-magnitude for magnitude in magnitudes] if signed else magnitudes
    code = _padded(values)
    return code / code.max()


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic tree data type, f32[256] ascending (8-bit Optimizers, section 1.3).

    A code is a sign, a decimal exponent counted in leading zeros, and a fraction in what bits remain: each decade
    of [10^-max_exponent_bits, 1] is cut into twice as many intervals as the one below, whose centres are the values.
    Decades that no bit remains for have none. Where fewer exponents than bits leave codes over, they cut the highest
    decade once more. The values 0 and 1 complete it.

    Raises:
        ValueError: total_bits is not 1 to 8, or max_exponent_bits negative.
    """
    check_flag("signed", signed)
    check_whole("max_exponent_bits", max_exponent_bits)
    _check_bits(total_bits)
    max_exponent_bits = min(max_exponent_bits, total_bits)
    exponents = range(1 - max_exponent_bits, 1)
    cuts = [(exponent, int(2.0 ** (exponent + total_bits - 1 - int(signed or 0)))) for exponent in exponents]
    cuts.append((0, int(2.0 ** (total_bits - 1 - max_exponent_bits)) - 1))
    values = [0.0, 1.0]
    for exponent, intervals in cuts:
        edges = torch.linspace(0.1, 1.0, max(intervals, 0) + 1, device="cpu")
        centres = (edges[:-1] + edges[1:]) / 2.0
        decade = (10.0**exponent * centres).tolist()
        values += decade + ([-value for value in decade] if signed else [])
    return _padded(values)
