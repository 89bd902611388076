"""Run a kernel where its tensors are. The sizes of all tiles here are not tuned on hardware yet."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .first_call import told_when_long
from .interpreter import mended

TILE = 2**11
"""Elements that one program of an elementwise kernel works on."""

SMALLEST_DOT = 16
"""Rows of the smallest tile that tl.dot takes."""


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the current stream of its tensors' device, without fused multiply-adds; no program, no launch.

    Programs are counted in one dimension: of the others, some GPUs take 65,535 only.
    """
    if programs == 0:
        return
    device = next(argument for argument in arguments if isinstance(argument, Tensor)).device
    with _ready(device), _told(kernel, device, arguments, constants):
        kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


def _told(kernel: Any, device: torch.device, arguments: tuple[Any, ...], constants: Any) -> AbstractContextManager[Any]:
    """A variant is what Triton compiles by itself: the GPU, the kinds of the arguments, the constants."""
    if device.type == "cpu":
        return nullcontext()
    kinds = tuple(argument.dtype if isinstance(argument, Tensor) else type(argument) for argument in arguments)
    return told_when_long(kernel.__name__, (device, kinds, tuple(constants.items())))


def _ready(device: torch.device) -> AbstractContextManager[Any]:
    """Where there are several GPUs, Triton launches on the current one; on the CPU it interprets."""
    if device.type == "cpu":
        return mended()
    module = getattr(torch, device.type)
    return nullcontext() if module.device_count() == 1 else module.device(device)


@triton.jit
def tile_of_program(columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """The rows i64[TILE_ROWS] and the columns i64[TILE_COLUMNS] of this program's tile of a matrix."""
    tiles = tl.cdiv(columns, TILE_COLUMNS)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = (program % tiles).to(tl.int64) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    return row, column


def tiles(rows: int, columns: int, tile_rows: int, tile_columns: int) -> int:
    """Of a matrix: the programs for a kernel that calls tile_of_program."""
    return triton.cdiv(rows, tile_rows) * triton.cdiv(columns, tile_columns)


@triton.jit
def touch_kernel(memory):
    tl.store(memory, tl.load(memory))


def touch(tensor: Tensor) -> None:
    """Have the GPU read and write the first element, which stays as it is."""
    launch(touch_kernel, 1, tensor)
    getattr(torch, tensor.device.type).synchronize(tensor.device)
