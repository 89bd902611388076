"""A 4-bit format is a row in each of three tables: one that no release has, and where its rows go.

What CONTRIBUTING.md says of adding a format is what happens here.
"""

from __future__ import annotations

from pathlib import Path

NAME = "even4"
VALUES = [step / 8 for step in range(-7, 9)]
"""Evenly spaced, ascending, with a code for 0.0 and one for 1.0: no format of ours."""
CODES = ", ".join(map(str, VALUES))

ROWS = {
    "bnb_core/formats.py": (
        "FORMATS = {each.name: each for each in (FP4, NF4)}",
        f"EVEN4 = Format4bit('even4', ({CODES}), Encoder.NEAREST, zero=7)\n"
        "FORMATS = {each.name: each for each in (FP4, NF4, EVEN4)}",
    ),
    "csrc_shared/formats.h": (
        "enum class QuantType : int32_t { fp4 = 0, nf4 = 1 };",
        "enum class QuantType : int32_t { fp4 = 0, nf4 = 1, even4 = 2 };",
        "     0x1.a374b0p+0f},\n};",
        "     0x1.a374b0p+0f},\n"
        f'    {{"even4", QuantType::even4, {{{CODES}}}, Encoder::nearest, 7, 1.0f, 1.0f}},\n}};',
    ),
    "bnb_core/conformance/oracle.py": (
        '    "fp4": Format4bit(',
        f'    "even4": Format4bit(_f32({CODES}), _codes),\n    "fp4": Format4bit(',
    ),
}
"""What stands in each file, and what stands there with the format, in turn."""


def add_to(source: Path) -> None:
    """Add the format to a copy of the sources."""
    for name, replacements in ROWS.items():
        file = source / name
        text = file.read_text()
        for before, after in zip(replacements[::2], replacements[1::2], strict=True):
            assert text.count(before) == 1, (name, before)
            text = text.replace(before, after)
        file.write_text(text)
