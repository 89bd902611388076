"""What NVIDIA's machine code does for each weight or element: instructions and accesses, counted in the loops."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

SEGMENT = 64
"""The weights of a lane in a segment: a quarter of 64 columns of four rows."""
ACCESSES = {"LDS": 1, "LDS.64": 2, "LDS.128": 4, "LDGSTS.128": 4, "STS": 1, "STS.64": 2, "STS.128": 4, "SHFL": 1}
"""Of up to 128 bytes that one instruction of a warp makes of shared memory, or of its pipe; no two lanes in a bank."""


def disassembler() -> str | None:
    """cuobjdump of the PATH, or of the wheel nvidia-cuda-cuobjdump, beside the nvdisasm that it calls."""
    found = shutil.which("cuobjdump")
    if found is not None:
        return found
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations or [] if spec else []
    return next((str(path) for folder in folders for path in Path(folder).glob("cu*/bin/cuobjdump")), None)


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers
    target: int | None  # of a branch


@dataclass(frozen=True)
class Loop:
    """Places in the code, the last one too."""

    first: int
    last: int

    def __contains__(self, place: int) -> bool:
        return self.first <= place <= self.last

    def is_in(self, other: Loop) -> bool:
        return self.first in other and self.last in other

    @property
    def places(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def length(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Counts:
    """For each weight of a lane."""

    instructions: float
    accesses: float


def functions(object_file: Path, arch: str) -> dict[str, list[Instruction]]:
    """The instructions of each kernel, by its mangled name."""
    tool = disassembler()
    assert tool is not None
    command = [tool, "-sass", "-arch", arch, str(object_file)]
    environment = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in text.split("Function : ")[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)([^;]*);", part)
        found[part.split("\n", 1)[0].strip()] = [
            Instruction(int(address, 16), name, _target(name, operands)) for address, name, operands in lines
        ]
    return found


def _target(name: str, operands: str) -> int | None:
    match = re.search(r"(0x[0-9a-f]+)\s*$", operands) if name.split(".")[0] == "BRA" else None
    return int(match[1], 16) if match else None


def counts(code: list[Instruction], products_of_segment: int) -> Counts:
    """Of the loop over steps of the weight: the one that has all products and no more than it needs.

    A step may have a loop over segments in it, of ``products_of_segment`` mma instructions each; what stands beside
    that is shared by the segments of a step. All of a loop counts, whether a branch passes it by or not.
    """
    products = [i for i, instruction in enumerate(code) if instruction.name.startswith("HMMA")]
    loops = sorted(_loops(code), key=lambda loop: loop.length)
    around = [loop for loop in loops if all(product in loop for product in products)]
    copies = [i for i, instruction in enumerate(code) if instruction.name.startswith("LDGDEPBAR")]
    step = next(loop for loop in around if any(copy in loop for copy in copies))
    inner = around[0]
    in_code = len(products) // products_of_segment
    if inner == step:
        return Counts(step.length / in_code / SEGMENT, _accesses(code, step) / in_code / SEGMENT)
    segments = _segments_of_step(code, step)
    beside = Counts(step.length - inner.length, _accesses(code, step) - _accesses(code, inner))
    return Counts(
        (inner.length + beside.instructions / segments) / SEGMENT,
        (_accesses(code, inner) + beside.accesses / segments) / SEGMENT,
    )


def bulk_instructions(code: list[Instruction]) -> int:
    """Those of one turn of the loop over whole blocks or tiles: the outermost loop that stores with the fewest loads.

    What a branch passes by is left out if it has a call or a loop in it: operands out of a division's range, maps and
    block sizes that need more steps.
    """
    loops = _loops(code)
    whole = [loop for loop in loops if _has(code, loop, "LDG") and _has(code, loop, "STG")]
    bulk = min(
        (loop for loop in whole if not any(loop != other and loop.is_in(other) for other in whole)),
        key=lambda loop: sum(code[i].name.startswith("LDG") for i in loop.places),
    )
    skipped: set[int] = set()
    for passed in _passed_by(code):
        if passed.is_in(bulk) and (_has(code, passed, "CALL") or any(loop.is_in(passed) for loop in loops)):
            skipped |= set(passed.places)
    return bulk.length - len(skipped)


def _loops(code: list[Instruction]) -> list[Loop]:
    return [Loop(target, i) for i, target in _branches(code) if target < i]


def _passed_by(code: list[Instruction]) -> list[Loop]:
    """The places between each branch and where it leads to, further on."""
    return [Loop(i + 1, target - 1) for i, target in _branches(code) if target > i + 1]


def _branches(code: list[Instruction]) -> list[tuple[int, int]]:
    """The place of each branch, and the one that it leads to."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    return [(i, place[instruction.target]) for i, instruction in enumerate(code) if instruction.target in place]


def _has(code: list[Instruction], places: Loop, name: str) -> bool:
    return any(code[i].name.startswith(name) for i in places.places)


def _accesses(code: list[Instruction], loop: Loop) -> int:
    total = 0
    for instruction in code[loop.first : loop.last + 1]:
        parts = instruction.name.split(".")
        width = next((part for part in parts if part in ("64", "128")), "")
        total += ACCESSES.get(f"{parts[0]}.{width}".rstrip("."), 0)
    return total


def _segments_of_step(code: list[Instruction], step: Loop) -> int:
    """A lane copies two pieces of codes for each segment, and one of X."""
    copies = sum(instruction.name.startswith("LDGSTS") for instruction in code[step.first : step.last + 1])
    return (copies - 1) // 2
