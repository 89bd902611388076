"""The cases on a GPU: kernels timed in CUDA graphs, so that no host time is in them; what is run, beside whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NoReturn

import peers
import torch
from measure import OURS, Case, Contender, Requirement, Work

import bnb_core.optim
from bnb_core import functional, nn, primitives

DEVICE = "cuda"
BITSANDBYTES = peers.BITSANDBYTES
SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
ROTATED_BYTES = 2**30
"""More than any L2 cache: what a call reads was last read this many bytes ago."""
COPIED_BYTES = 2**28
GRAPH_CALLS = 16
MOST_FEW_ROWS = 64
"""Up to so many rows the product is required to be faster than a dense one."""
REQUIRED_ROWS = (512, 4096)
"""With so many it is required to be nearly as fast; what lies between shows where which kernel is the faster one."""
COPY = "copy bandwidth"
DENSE = "torch dense bf16"
INT_MM = "torch _int_mm"


def graphed(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], kind: str = "peer") -> Contender:
    """Calls on each of ``arguments`` in turn, as one graph; its time stands for one of them."""
    turns = [arguments[i % len(arguments)] for i in range(max(GRAPH_CALLS, len(arguments)))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function(*turns[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [function(*turn) for turn in turns]
    del results
    return Contender(partial(_replay, graph, function, turns), kind, 1 / len(turns))


def _replay(graph: torch.cuda.CUDAGraph, *_read_by_it: Any) -> None:
    """A graph holds the addresses of what it reads, so whoever replays it has to hold the tensors."""
    graph.replay()


def peer(make: Callable[[ModuleType], Contender]) -> dict[str, Contender]:
    """What ``make`` makes of bitsandbytes, where it is installed; if that fails, so do the calls, which is reported."""
    if peers.bitsandbytes is None:
        return {}
    try:
        return {BITSANDBYTES: make(peers.bitsandbytes)}
    except Exception as error:
        return {BITSANDBYTES: Contender(partial(_fail, error.with_traceback(None)))}


def _fail(error: Exception) -> NoReturn:
    raise error


def copies(make: Callable[[], tuple[Any, ...]], moved_bytes: float) -> list[tuple[Any, ...]]:
    return [make() for _ in range(int(ROTATED_BYTES // moved_bytes) + 1)]


def copy(moved_bytes: float) -> Contender:
    """A device-to-device copy; bytes read and bytes written both count."""
    pairs = [tuple(torch.empty(COPIED_BYTES // 4, device=DEVICE).normal_() for _ in range(2)) for _ in range(2)]
    limit = graphed(lambda source, target: target.copy_(source), pairs, "limit")
    return Contender(limit.call, "limit", limit.scale * moved_bytes / (2 * COPIED_BYTES))


def dense(M: int, N: int, K: int) -> Contender:
    weights = copies(lambda: (torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16),), 2 * N * K)
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    return graphed(lambda weight: torch.nn.functional.linear(x, weight), weights, "limit")


def _random_weight(N: int, K: int) -> torch.Tensor:
    return torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16)


def _linear(M: int, N: int, K: int, nested: bool) -> tuple[dict[str, Contender], float]:
    """Ours and bitsandbytes' product of the same shape, and the bytes that one must move."""
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    keywords: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": nested}
    moved = N * K / 2 + N * K / 64 * (1 if nested else 4) + 2 * M * (N + K)
    ours = copies(lambda: functional.quantize_4bit(_random_weight(N, K), **keywords), moved)
    contenders = {OURS: graphed(lambda packed, state: functional.gemm_4bit(x, packed, state), ours, "ours")}

    def bitsandbytes_linear(theirs: Any) -> Contender:
        weights = copies(lambda: theirs.functional.quantize_4bit(_random_weight(N, K), **keywords), moved)
        return graphed(lambda packed, state: theirs.matmul_4bit(x, packed.t(), state), weights)

    return contenders | peer(bitsandbytes_linear), moved


def decode(N: int, K: int, nested: bool) -> Work:
    contenders, moved = _linear(1, N, K, nested)
    contenders[COPY] = copy(moved)
    requirements = [Requirement(BITSANDBYTES, 1.0)]
    if N >= 8192:
        requirements.append(Requirement(COPY, 1 / 0.8))
    return Work(contenders, requirements, moved, 2.0 * N * K)


def few_rows(M: int, N: int, K: int) -> Work:
    contenders, moved = _linear(M, N, K, False)
    contenders[DENSE] = dense(M, N, K)
    requirements = [Requirement(BITSANDBYTES, 1.0)]
    if M <= MOST_FEW_ROWS:
        requirements.append(Requirement(DENSE, 1.0))
    return Work(contenders, requirements, moved, 2.0 * M * N * K)


def many_rows(M: int, N: int, K: int) -> Work:
    contenders, moved = _linear(M, N, K, False)
    contenders[DENSE] = dense(M, N, K)
    requirements = [Requirement(DENSE, 1 / 0.9)] if M in REQUIRED_ROWS else []
    return Work(contenders, requirements, moved, 2.0 * M * N * K)


def quantize_4bit() -> Work:
    """The kernel alone: the function above it also copies the codebook into the state that it returns."""
    N = K = 8192
    moved = N * K * (2 + 0.5 + 4 / 64)
    weights = copies(lambda: (_random_weight(N, K),), moved)
    contenders = {
        OURS: graphed(lambda A: primitives.quantize_4bit(A, 64, "nf4", torch.uint8), weights, "ours"),
        COPY: copy(moved),
        **peer(
            lambda theirs: graphed(partial(theirs.functional.quantize_4bit, blocksize=64, quant_type="nf4"), weights)
        ),
    }
    return Work(contenders, (Requirement(COPY, 1 / 0.7),), moved)


def dequantize_4bit() -> Work:
    N = K = 8192
    moved = N * K * (2 + 0.5 + 4 / 64)
    keywords: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4"}
    ours = copies(lambda: functional.quantize_4bit(_random_weight(N, K), **keywords), moved)
    contenders = {OURS: graphed(functional.dequantize_4bit, ours, "ours"), COPY: copy(moved)}

    def bitsandbytes_dequantize(theirs: Any) -> Contender:
        weights = copies(lambda: theirs.functional.quantize_4bit(_random_weight(N, K), **keywords), moved)
        return graphed(theirs.functional.dequantize_4bit, weights)

    return Work(contenders | peer(bitsandbytes_dequantize), (Requirement(COPY, 1 / 0.85),), moved)


def adam_8bit(dtype: torch.dtype) -> Work:
    """One launch on a parameter of 8192 x 8192: gradient read, parameter and two states read and written."""

    def parameter() -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.randn(8192, 8192, device=DEVICE).to(dtype))
        made.grad = torch.randn_like(made)
        return made

    n = 8192 * 8192
    moved = n * (3 * dtype.itemsize + 4 + 16 / 256)
    contenders = {
        OURS: Contender(peers.step_of(bnb_core.optim.Adam8bit, {}, parameter()), "ours"),
        COPY: copy(moved),
        "torch AdamW, fused": Contender(peers.step_of(torch.optim.AdamW, {"fused": True}, parameter())),
        **peer(lambda theirs: Contender(peers.step_of(theirs.optim.Adam8bit, {}, parameter()))),
    }
    return Work(contenders, (Requirement(COPY, 1 / 0.8),), moved)


def int8_linear(M: int, N: int, K: int) -> Work:
    """Quantize the activations, multiply, dequantize, add the bias."""
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    layer = nn.Linear8bitLt(K, N, bias=True, has_fp16_weights=False, threshold=0.0).to(DEVICE).eval()
    layer.bias.data = layer.bias.data.bfloat16()
    a, b = (torch.randint(-127, 128, (rows, K), dtype=torch.int8, device=DEVICE) for rows in (M, N))
    contenders = {
        OURS: graphed(layer, [(x,)], "ours"),
        INT_MM: graphed(lambda: torch._int_mm(a, b.t()), [()], "limit"),
    }

    def bitsandbytes_linear(theirs: Any) -> Contender:
        layer = theirs.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=0.0).to(DEVICE).eval()
        return graphed(layer, [(x.half(),)])

    return Work(contenders | peer(bitsandbytes_linear), (Requirement(INT_MM, 1 / 0.8),), N * K, 2.0 * M * N * K)


def host_time() -> Work:
    """An eager call whose kernel takes less time than the call: what is left is the host's."""
    x = torch.randn(1, 256, device=DEVICE, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(torch.randn(256, 256, device=DEVICE), quant_type="nf4")
    A, code = torch.randn(256, device=DEVICE), functional.create_dynamic_map().to(DEVICE)
    contenders = {
        OURS: Contender(lambda: functional.gemv_4bit(x, packed.t(), state=state), "ours"),
        f"{OURS} quantize_blockwise": Contender(lambda: primitives.quantize_blockwise(A, code, 256), "own"),
    }

    def bitsandbytes_gemv(theirs: Any) -> Contender:
        packed, state = theirs.functional.quantize_4bit(_random_weight(256, 256), quant_type="nf4")
        return Contender(lambda: theirs.functional.gemv_4bit(x, packed.t(), state=state))

    return Work(contenders | peer(bitsandbytes_gemv), (Requirement(None, 10e-6),))


def limit_copy() -> Work:
    return Work({"machine": copy(2 * COPIED_BYTES)}, (), 2 * COPIED_BYTES)


def limit_dense(M: int) -> Work:
    return Work({"machine": dense(M, 8192, 8192)}, (), 0, 2.0 * M * 8192 * 8192)


def all_cases() -> list[Case]:
    """In the order of the table."""
    return [
        Case("limit/copy", limit_copy),
        *(Case(f"limit/dense bf16 M={M} 8192x8192", partial(limit_dense, M)) for M in (512, 4096)),
        *(
            Case(f"decode/nf4 bf16{' nested' if nested else ''} {N}x{K}", partial(decode, N, K, nested))
            for N, K in SHAPES
            for nested in (False, True)
        ),
        *(
            Case(f"few rows/M={M} {N}x{K}", partial(few_rows, M, N, K), quick=(N, M) == (8192, 16))
            for N, K in SHAPES
            for M in (2, 4, 8, 16, 32, 48, 64, 96, 128)
        ),
        *(
            Case(f"many rows/M={M} {N}x{K}", partial(many_rows, M, N, K), quick=(N, M) == (8192, 512))
            for N, K in SHAPES
            for M in (256, 512, 1024, 2048, 4096)
        ),
        Case("quantize_4bit/nf4 bf16 8192x8192", quantize_4bit),
        Case("dequantize_4bit/nf4 bf16 8192x8192", dequantize_4bit),
        *(
            Case(f"Adam8bit/{str(d).removeprefix('torch.')} 8192x8192", partial(adam_8bit, d))
            for d in (torch.float32, torch.bfloat16)
        ),
        *(Case(f"int8 linear/M={M} {N}x{K}", partial(int8_linear, M, N, K)) for N, K in SHAPES for M in (512, 4096)),
        Case("overhead/host time", host_time),
    ]
