"""The cases on a GPU: kernels timed in CUDA graphs, so that no host time is in them; what is run, beside whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

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
    return Contender(graph.replay, kind, 1 / len(turns))


def graphed_peer(name: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> dict[str, Contender]:
    """A peer that may be absent, or refuse this work or a graph: then there is none."""
    if peers.bitsandbytes is None:
        return {}
    try:
        return {name: graphed(function, arguments)}
    except Exception as error:
        torch.cuda.synchronize()
        print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return {}


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
    if peers.bitsandbytes is not None:
        theirs = peers.bitsandbytes
        quantize = theirs.functional.quantize_4bit
        weights = copies(lambda: quantize(_random_weight(N, K), **keywords), moved)
        multiply = partial(_bitsandbytes_linear, theirs, x)
        contenders |= graphed_peer(BITSANDBYTES, multiply, weights)
    return contenders, moved


def _bitsandbytes_linear(theirs: Any, x: torch.Tensor, packed: torch.Tensor, state: Any) -> torch.Tensor:
    return theirs.matmul_4bit(x, packed.t(), state)


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
    return Work(contenders, (Requirement(BITSANDBYTES, 1.0), Requirement(DENSE, 1.0)), moved, 2.0 * M * N * K)


def many_rows(M: int, N: int, K: int) -> Work:
    contenders, moved = _linear(M, N, K, False)
    contenders[DENSE] = dense(M, N, K)
    return Work(contenders, (Requirement(DENSE, 1 / 0.9),), moved, 2.0 * M * N * K)


def quantize_4bit() -> Work:
    N = K = 8192
    moved = N * K * (2 + 0.5 + 4 / 64)
    keywords: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4"}
    weights = copies(lambda: (_random_weight(N, K),), moved)
    contenders = {
        OURS: graphed(partial(functional.quantize_4bit, **keywords), weights, "ours"),
        COPY: copy(moved),
    }
    if peers.bitsandbytes is not None:
        theirs = partial(peers.bitsandbytes.functional.quantize_4bit, **keywords)
        contenders |= graphed_peer(BITSANDBYTES, theirs, weights)
    return Work(contenders, (Requirement(COPY, 1 / 0.7),), moved)


def dequantize_4bit() -> Work:
    N = K = 8192
    moved = N * K * (2 + 0.5 + 4 / 64)
    keywords: dict[str, Any] = {"blocksize": 64, "quant_type": "nf4"}
    ours = copies(lambda: functional.quantize_4bit(_random_weight(N, K), **keywords), moved)
    contenders = {OURS: graphed(functional.dequantize_4bit, ours, "ours"), COPY: copy(moved)}
    if peers.bitsandbytes is not None:
        theirs = peers.bitsandbytes.functional
        weights = copies(lambda: theirs.quantize_4bit(_random_weight(N, K), **keywords), moved)
        contenders |= graphed_peer(BITSANDBYTES, theirs.dequantize_4bit, weights)
    return Work(contenders, (Requirement(COPY, 1 / 0.85),), moved)


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
        **peers.optimizer("Adam8bit", {}, parameter),
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
    if peers.bitsandbytes is not None:
        theirs = peers.bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=0.0).to(DEVICE).eval()
        contenders |= graphed_peer(BITSANDBYTES, theirs, [(x.half(),)])
    return Work(contenders, (Requirement(INT_MM, 1 / 0.8),), N * K, 2.0 * M * N * K)


def host_time() -> Work:
    """An eager call whose kernel takes less time than the call: what is left is the host's."""
    x = torch.randn(1, 256, device=DEVICE, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(torch.randn(256, 256, device=DEVICE), quant_type="nf4")
    A, code = torch.randn(256, device=DEVICE), functional.create_dynamic_map().to(DEVICE)
    contenders = {
        OURS: Contender(lambda: functional.gemv_4bit(x, packed.t(), state=state), "ours"),
        f"{OURS} quantize_blockwise": Contender(lambda: primitives.quantize_blockwise(A, code, 256), "own"),
    }
    if peers.bitsandbytes is not None:
        theirs = peers.bitsandbytes.functional
        p, s = theirs.quantize_4bit(torch.randn(256, 256, device=DEVICE).bfloat16(), quant_type="nf4")
        contenders |= peers.function("gemv_4bit", x, p.t(), state=s)
    return Work(contenders, (Requirement(None, 10e-6),))


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
            for M in (512, 4096)
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
