"""What the machine can do: read and copy bandwidth, and torch's dense matmuls, timed beside the cases they bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from measure import Case, Contender, Work, rotating

ROTATED_BYTES = 2**30 + 2**28
"""More than any last-level cache: what a call touches was last touched this many bytes ago."""
CHUNK_BYTES = 64 * 2**20


@cache
def _chunks(name: str) -> list[torch.Tensor]:
    count = ROTATED_BYTES // CHUNK_BYTES
    return [torch.ones(CHUNK_BYTES // 4) for _ in range(count)]


def _read_once(chunk: torch.Tensor) -> torch.Tensor:
    """The dot product with itself: of torch's reductions the one that comes nearest to the memory's speed."""
    return torch.dot(chunk, chunk)


def read(moved_bytes: float) -> Contender:
    """Reading from memory with all threads."""
    return Contender(rotating(_read_once, _chunks("read")), "limit", moved_bytes / CHUNK_BYTES)


def read_cached(moved_bytes: float) -> Contender:
    """Reading a buffer of the same size over and over."""
    buffer = torch.ones(int(moved_bytes) // 4)
    return Contender(lambda: _read_once(buffer), "limit")


def copy(moved_bytes: float) -> Contender:
    """Copying from memory to memory with all threads; bytes read and bytes written both count."""
    pairs = list(zip(_chunks("read"), _chunks("written"), strict=True))
    return Contender(rotating(lambda pair: pair[1].copy_(pair[0]), pairs), "limit", moved_bytes / (2 * CHUNK_BYTES))


def dense(M: int, N: int, K: int, dtype: torch.dtype, transposed: bool = False) -> Contender:
    """torch's dense matmul of the same shape; ``_int_mm`` for int8."""
    return Contender(dense_call(M, N, K, dtype, transposed), "limit")


def dense_call(M: int, N: int, K: int, dtype: torch.dtype, transposed: bool = False) -> Callable[[], Any]:
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (rows, K), dtype=dtype) for rows in (M, N))
        return lambda: torch._int_mm(a, b.t())
    weight = torch.randn(N, K).to(dtype)
    x = torch.randn(M, N if transposed else K).to(dtype)
    if transposed:
        return lambda: x @ weight
    return lambda: torch.nn.functional.linear(x, weight)


def dense_rotated(N: int, K: int, dtype: torch.dtype) -> Contender:
    """One row through torch's dense linear, weights from memory."""
    weight = torch.randn(N, K).to(dtype)
    weights = [weight.clone() for _ in range(ROTATED_BYTES // (weight.numel() * weight.itemsize) + 1)]
    x = torch.randn(1, K).to(dtype)
    return Contender(rotating(lambda w: torch.nn.functional.linear(x, w), weights))


def cases() -> list[Case]:
    """The limits by themselves, as the first rows of the table. Each of them is its own limit."""
    n = 4096

    def bandwidth(limit: Callable[[float], Contender], moved_bytes: int) -> Callable[[], Work]:
        return lambda: Work({"machine": limit(moved_bytes)}, (), moved_bytes)

    def matmul(dtype: torch.dtype) -> Callable[[], Work]:
        return lambda: Work({"machine": dense(512, n, n, dtype)}, (), 0, 2 * 512 * n * n)

    return [
        Case("limit/read", bandwidth(read, CHUNK_BYTES)),
        Case("limit/read 9 MiB in cache", bandwidth(read_cached, 9 * 2**20)),
        Case("limit/copy", bandwidth(copy, 2 * CHUNK_BYTES)),
        *(
            Case(f"limit/dense {str(d).removeprefix('torch.')} M=512", matmul(d))
            for d in (torch.bfloat16, torch.float32, torch.int8)
        ),
    ]
