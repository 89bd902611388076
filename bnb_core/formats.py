"""The 4-bit formats, a row each (docs/SPEC.md section 1). csrc_shared/formats.h has the same rows by the same names."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Encoder(Enum):
    """How a value scaled to [-1, 1] becomes a code."""

    NEAREST = "nearest"
    """The codebook ascends: the nearest entry, of two equally near ones the lower."""
    SIGN_MAGNITUDE = "sign and magnitude"
    """Bit 3 is the sign; the nearest of the magnitudes in codes 0 to 7, in any order. Zero has no sign."""


class Format4bit(NamedTuple):
    """A way to write a number of [-1, 1] in 4 bits."""

    name: str
    codebook: tuple[float, ...]
    """The values of the 16 codes, as f32 holds them."""
    encoder: Encoder
    zero: int
    """The code of 0.0, which a block gets that cannot be scaled."""


NF4 = Format4bit(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    Encoder.NEAREST,
    zero=7,
)
"""NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E)."""

_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)

FP4 = Format4bit(
    "fp4",
    tuple(sign * magnitude + 0.0 for sign in (1.0, -1.0) for magnitude in _FP4_MAGNITUDES),  # + 0.0: zero has no sign
    Encoder.SIGN_MAGNITUDE,
    zero=0,
)

FORMATS = {each.name: each for each in (FP4, NF4)}
"""By name, in the order in which documents and errors list them."""
