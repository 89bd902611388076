"""The cases: what is run, beside whom, and what is required of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import batch_cases
import expert_cases
import limits
import optimizer_cases
import peers
import torch
from limits import ROTATED_BYTES
from measure import OURS, Case, Contender, Requirement, Work, rotating

from bnb_core import functional, nn

BITSANDBYTES = peers.BITSANDBYTES
SHAPES = ((4096, 4096), (11008, 4096))
N = K = 4096
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

READ = "read bandwidth"
CACHED_READ = "cached read bandwidth"
COPY = "copy bandwidth"


def _share(against: str, share: float) -> Requirement:
    return Requirement(against, 1 / share)


def _times_faster(factor: float) -> Requirement:
    return Requirement(BITSANDBYTES, 1 / factor)


def _weight(n: int, k: int, quant_type: str, nested: bool) -> tuple[torch.Tensor, functional.QuantState, float]:
    """A packed weight, its state, and the bytes of both."""
    packed, state = functional.quantize_4bit(
        torch.randn(n, k), compress_statistics=nested, quant_type=quant_type, blocksize=64
    )
    scales = n * k // 64
    return packed, state, packed.numel() + (scales + 4 * (scales // 256) if nested else 4 * scales)


def _gemm(x: torch.Tensor, n: int, k: int, quant_type: str, nested: bool, rotated: bool) -> tuple[Any, float]:
    """Our call, over enough copies of the weight that it comes from memory, and the bytes it must read."""
    packed, state, moved = _weight(n, k, quant_type, nested)
    count = int(ROTATED_BYTES // moved) + 1 if rotated else 1
    states = [functional.QuantState(
        state.absmax.clone(), state.shape, state.code, state.blocksize, state.quant_type, state.dtype, state.offset,
        state.state2,
    ) for _ in range(count)]  # fmt: skip
    weights = [(packed.clone(), each) for each in states]
    return rotating(lambda weight: functional.gemm_4bit(x, *weight), weights), moved


def decode(n: int, k: int, quant_type: str, dtype: str, nested: bool, rotated: bool) -> Work:
    """One row times a 4-bit weight, from memory or from the last-level cache."""
    x = torch.randn(1, k).to(DTYPES[dtype])
    call, moved = _gemm(x, n, k, quant_type, nested, rotated)
    limit, name = (limits.read, READ) if rotated else (limits.read_cached, CACHED_READ)
    contenders = {OURS: Contender(call, "ours"), name: limit(moved)}
    contenders |= peers.linear_4bit(n, k, x, quant_type, nested, rotated)
    if rotated:
        contenders[f"torch dense {dtype}"] = limits.dense_rotated(n, k, x.dtype)
    share = 0.85 if rotated else 0.80
    return Work(contenders, (_share(name, share), *([_times_faster(2)] if rotated else [])), moved, 2.0 * n * k)


def few_rows(M: int) -> Work:
    """The same weights for M rows: how much longer than for one."""
    x = torch.randn(M, K).bfloat16()
    call, moved = _gemm(x, N, K, "nf4", False, True)
    one, _ = _gemm(x[:1], N, K, "nf4", False, True)
    contenders = {OURS: Contender(call, "ours"), f"{OURS} M=1": Contender(one, "own")}
    contenders |= peers.linear_4bit(N, K, x, "nf4", False, True)
    contenders["torch dense bf16"] = limits.dense(M, N, K, torch.bfloat16)
    requirement = Requirement(f"{OURS} M=1", 1.6 if M <= 8 else 2.2)
    return Work(contenders, (requirement,), moved, 2.0 * M * N * K)


def many_rows(M: int, n: int, k: int, dtype: str) -> Work:
    """Compute-bound: beside torch's dense linear."""
    x = torch.randn(M, k).to(DTYPES[dtype])
    call, moved = _gemm(x, n, k, "nf4", False, False)
    name = f"torch dense {dtype}"
    contenders = {OURS: Contender(call, "ours"), name: limits.dense(M, n, k, x.dtype)}
    contenders |= peers.linear_4bit(n, k, x, "nf4", False, False)
    requirements = [_share(name, 0.9)] if dtype == "f32" else [_share(name, 1.0), _times_faster(8)]
    return Work(contenders, requirements, moved, 2.0 * M * n * k)


def backward(M: int) -> Work:
    """The gradient of the input of a 4-bit linear."""
    packed, state, moved = _weight(N, K, "nf4", False)
    dY = torch.randn(M, N).bfloat16()

    def gradient_of(matmul: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
        with torch.enable_grad():
            x = torch.randn(M, K).bfloat16().requires_grad_()
            y = matmul(x)
        return lambda: torch.autograd.grad(y, x, dY, retain_graph=True)

    from bnb_core import autograd

    contenders = {
        OURS: Contender(gradient_of(lambda x: autograd.matmul_4bit(x, packed.t(), state)), "ours"),
        "torch dense bf16": limits.dense(M, N, K, torch.bfloat16, transposed=True),
    }
    if peers.bitsandbytes is not None:
        theirs = peers.bitsandbytes
        p, s = theirs.functional.quantize_4bit(torch.randn(N, K).bfloat16(), quant_type="nf4", blocksize=64)
        contenders[BITSANDBYTES] = Contender(gradient_of(lambda x: theirs.matmul_4bit(x, p.t(), s)))
    return Work(contenders, (_share("torch dense bf16", 0.9),), moved, 2.0 * M * N * K)


def quantize_4bit(dtype: str) -> Work:
    """With double quantization; the bytes are the input's and the packed ones'."""
    A = torch.randn(N, K).to(DTYPES[dtype])
    keywords = {"blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
    moved = A.numel() * (A.itemsize + 0.5 + 1 / 64)
    contenders = {
        OURS: Contender(partial(functional.quantize_4bit, A, **keywords), "ours"),
        COPY: limits.copy(moved),
        **peers.function("quantize_4bit", A, **keywords),
    }
    return Work(contenders, (_share(COPY, 0.5), _times_faster(30)), moved)


def dequantize_4bit(dtype: str, fresh: bool) -> Work:
    """Into ``out``, or into a fresh tensor, whose page faults are the floor: torch's clone of a tensor pays them too.

    bitsandbytes has no ``out`` on the CPU: it gives a fresh tensor in both.
    """
    packed, state, moved = _weight(N, K, "nf4", False)
    out = torch.empty(N, K, dtype=DTYPES[dtype])
    state.dtype = out.dtype
    moved += out.numel() * out.itemsize
    keywords = {} if fresh else {"out": out}
    contenders = {OURS: Contender(partial(functional.dequantize_4bit, packed, state, **keywords), "ours")}
    if peers.bitsandbytes is not None:
        p, s = peers.bitsandbytes.functional.quantize_4bit(torch.randn(N, K).to(out.dtype), blocksize=64)
        contenders |= peers.function("dequantize_4bit", p, s)
    return _into(contenders, out, moved, fresh)


def dequantize_blockwise(fresh: bool) -> Work:
    codes, state = functional.quantize_blockwise(torch.randn(N, K), blocksize=256)
    out = torch.empty(N, K)
    moved = 5 * out.numel() + 4 * state.absmax.numel()
    keywords = {} if fresh else {"out": out}
    contenders = {OURS: Contender(partial(functional.dequantize_blockwise, codes, state, **keywords), "ours")}
    if peers.bitsandbytes is not None:
        p, s = peers.bitsandbytes.functional.quantize_blockwise(torch.randn(N, K), blocksize=256)
        contenders |= peers.function("dequantize_blockwise", p, s)
    return _into(contenders, out, moved, fresh)


def _into(contenders: dict[str, Contender], out: torch.Tensor, moved: float, fresh: bool) -> Work:
    if fresh:
        contenders["torch clone"] = Contender(out.clone, "limit")
        return Work(contenders, (_share("torch clone", 1.0),), moved)
    return Work({**contenders, COPY: limits.copy(moved)}, (_share(COPY, 0.75),), moved)


def quantize_blockwise() -> Work:
    A = torch.randn(N, K)
    codes, absmax = torch.empty(N, K, dtype=torch.uint8), torch.empty(A.numel() // 256)
    moved = 5 * A.numel() + 4 * absmax.numel()
    keywords = {"blocksize": 256, "out": codes, "absmax": absmax}
    contenders = {
        OURS: Contender(partial(functional.quantize_blockwise, A, **keywords), "ours"),
        COPY: limits.copy(moved),
        **peers.function("quantize_blockwise", A, **keywords),
    }
    return Work(contenders, (_share(COPY, 0.4), _times_faster(6)), moved)


def _outlier_input(M: int) -> torch.Tensor:
    """Normal values with 1 % of the columns above the threshold of 6."""
    x = torch.randn(M, K).clamp(-5, 5)
    x[:, ::100] = 20.0
    return x.bfloat16()


def _linear_int8(threshold: float, rotated: bool = False) -> list[nn.Linear8bitLt]:
    layer = nn.Linear8bitLt(K, N, bias=True, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
    layer.bias.data = layer.bias.data.bfloat16()
    layers = [layer]
    for _ in range(ROTATED_BYTES // (N * K) if rotated else 0):
        other = nn.Linear8bitLt(K, N, bias=True, has_fp16_weights=False, threshold=threshold).to("cpu").eval()
        other.bias.data = layer.bias.data
        layers.append(other)
    return layers


def int8_linear(M: int) -> Work:
    """Quantize the activations, multiply, dequantize, add the bias: a whole layer."""
    x = torch.randn(M, K).bfloat16()
    moved = N * K + 2.0 * M * (N + K)
    ours = rotating(lambda layer: layer(x), _linear_int8(0.0, rotated=M == 1))
    contenders = {OURS: Contender(ours, "ours")}
    if M == 1:
        contenders[READ] = limits.read(moved)
        requirement = _share(READ, 0.85)
    else:
        contenders["torch _int_mm"] = limits.dense(M, N, K, torch.int8)
        requirement = _share("torch _int_mm", 0.8)
    contenders |= peers.linear_int8(N, K, x, 0.0)
    return Work(contenders, (requirement,), moved, 2.0 * M * N * K)


def int8_outliers(M: int) -> Work:
    x = _outlier_input(M)
    (plain,), (mixed,) = _linear_int8(0.0), _linear_int8(6.0)
    own = f"{OURS} threshold 0"
    contenders = {OURS: Contender(lambda: mixed(x), "ours"), own: Contender(lambda: plain(x), "own")}
    contenders |= peers.linear_int8(N, K, x, 6.0)
    return Work(contenders, (Requirement(own, 1.25),), N * K, 2.0 * M * N * K)


def tiny_gemv() -> Work:
    """64 x 64: what is left is Python."""
    x = torch.randn(1, 64)
    packed, state, _ = _weight(64, 64, "nf4", False)
    contenders = {OURS: Contender(lambda: functional.gemv_4bit(x, packed.t(), state=state), "ours")}
    if peers.bitsandbytes is not None:
        p, s = peers.bitsandbytes.functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4", blocksize=64)
        contenders |= peers.function("gemv_4bit", x.bfloat16(), p.t(), state=s)
    return Work(contenders, (Requirement(None, 5e-6),))


def tiny_quantize(name: str) -> Work:
    A = torch.randn(64)
    keywords = {"blocksize": 64}
    contenders = {OURS: Contender(partial(getattr(functional, name), A, **keywords), "ours")}
    contenders |= peers.function(name, A, **keywords)
    return Work(contenders, (Requirement(None, 8e-6),))


def _matmul_cases() -> list[Case]:
    found = [
        Case(
            f"decode/{quant_type} {dtype}{' nested' if nested else ''} N={n}",
            partial(decode, n, k, quant_type, dtype, nested, True),
            quick=(quant_type, n) == ("nf4", 4096) and not nested,
        )
        for n, k in SHAPES
        for quant_type in ("nf4", "fp4")
        for dtype in DTYPES
        for nested in (False, True)
    ]
    found += [
        Case(f"decode in cache/{t} {d}", partial(decode, N, K, t, d, False, False), quick=t == "nf4")
        for t in ("nf4", "fp4")
        for d in DTYPES
    ]
    found += [Case(f"few rows/nf4 bf16 M={M}", partial(few_rows, M), quick=M in (4, 16)) for M in (2, 4, 8, 16)]
    found += [
        Case(f"many rows/nf4 bf16 M={M} N={n}", partial(many_rows, M, n, k, "bf16"), quick=(M, n) == (512, 4096))
        for n, k in SHAPES
        for M in (128, 512, 2048)
    ]
    found.append(Case("many rows/nf4 f32 M=512", partial(many_rows, 512, N, K, "f32")))
    found.append(Case("backward/nf4 bf16 M=512", partial(backward, 512)))
    return found


def all_cases() -> list[Case]:
    """In the order of the table."""
    return [
        *limits.cases(),
        *_matmul_cases(),
        *(Case(f"quantize_4bit/nested {d}", partial(quantize_4bit, d)) for d in DTYPES),
        *(Case(f"dequantize_4bit/into out {d}", partial(dequantize_4bit, d, False)) for d in DTYPES),
        Case("dequantize_4bit/fresh f32", partial(dequantize_4bit, "f32", True)),
        Case("quantize_blockwise/dynamic f32", quantize_blockwise),
        Case("dequantize_blockwise/into out f32", partial(dequantize_blockwise, False)),
        Case("dequantize_blockwise/fresh f32", partial(dequantize_blockwise, True), quick=False),
        *optimizer_cases.cases(),
        *expert_cases.cases(),
        *batch_cases.cases(),
        *(Case(f"int8 linear/M={M}", partial(int8_linear, M), quick=M == 512) for M in (1, 512, 2048)),
        *(Case(f"int8 linear/1 % outliers M={M}", partial(int8_outliers, M), quick=M == 512) for M in (1, 512, 2048)),
        Case("overhead/gemv_4bit", tiny_gemv),
        Case("overhead/quantize_4bit", partial(tiny_quantize, "quantize_4bit")),
        Case("overhead/quantize_blockwise", partial(tiny_quantize, "quantize_blockwise")),
    ]
