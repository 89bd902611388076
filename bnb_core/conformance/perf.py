"""How fast each primitive is, beside the device's own copy and dense matmul measured in the same run."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bnb_core import primitives, registry
from bnb_core.backend import Backend
from bnb_core.codebooks import create_dynamic_map
from bnb_core.conformance.timing import interleaved_seconds
from bnb_core.records import OptimizerState8bit, OptimizerStep, Weight4bit

SIZE = 4096
ROUNDS = 5
BATCHES = (1, 16, 512)


def _optimizer_call(A: torch.Tensor, code: torch.Tensor) -> Callable[[], None]:
    """An Adam step with 8-bit state on a parameter of A's shape."""
    p, g = A.clone(), torch.randn_like(A)
    blocks = primitives.block_count(A.numel(), primitives.OPTIMIZER_BLOCKSIZE)
    step = OptimizerStep("adam", 1, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)
    state = OptimizerState8bit(
        state1=torch.zeros_like(A, dtype=torch.uint8),
        state2=torch.zeros_like(A, dtype=torch.uint8),
        qmap1=code,
        qmap2=create_dynamic_map(signed=False).to(A.device),
        absmax1=torch.zeros(blocks, device=A.device),
        absmax2=torch.zeros(blocks, device=A.device),
    )
    return partial(primitives.optimizer_update_8bit_blockwise, step, g, p, state, None)


def measure(backend: Backend, device: torch.device, size: int = SIZE) -> list[dict[str, str]]:
    """A row per case: bytes that must move over time, and operations over time, with their share of the limits.

    ``size`` is the number of rows and of columns of the weight; below some hundreds, calls cost more than kernels.

    Raises:
        BackendError: the backend lacks a primitive.
    """
    A = torch.randn(size, size, device=device)
    code = create_dynamic_map().to(device)
    with registry.use_backend(backend.name):
        packed, absmax = primitives.quantize_4bit(A, 64, "nf4", torch.uint8)
        codes, scales = primitives.quantize_blockwise(A, code, 256)
        weight = Weight4bit(packed, A.shape, absmax, 64, "nf4")
        q, _, _ = primitives.int8_vectorwise_quant(A, 0.0)
        values, bytes_out = torch.empty_like(A), torch.empty_like(codes)
        n, x = A.numel(), {M: torch.randn(M, size, device=device, dtype=torch.bfloat16) for M in BATCHES}
        q512, _, _ = primitives.int8_vectorwise_quant(x[512], 0.0)
        dense = A.to(torch.bfloat16)
        # name: (primitive, call, bytes that must move, floating-point operations)
        rows: dict[str, tuple[str, Callable[[], Any], float, float]] = {
            "copy": ("", lambda: values.copy_(A), 8 * n, 0),
            "dense matmul, bf16, M=512": ("", lambda: x[512] @ dense.t(), 0, 2 * 512 * n),
            "nf4, f32": (
                "quantize_4bit",
                lambda: primitives.quantize_4bit(A, 64, "nf4", torch.uint8, out=(packed, absmax)),
                4.5625 * n,
                0,
            ),
            "nf4, to f32": (
                "dequantize_4bit",
                lambda: primitives.dequantize_4bit(weight, torch.float32, out=values),
                4.5625 * n,
                0,
            ),
            "dynamic map, f32": (
                "quantize_blockwise",
                lambda: primitives.quantize_blockwise(A, code, 256, out=(bytes_out, scales)),
                5 * n,
                0,
            ),
            "dynamic map, to f32": (
                "dequantize_blockwise",
                lambda: primitives.dequantize_blockwise(codes, scales, code, 256, torch.float32, out=values),
                5 * n,
                0,
            ),
            **{
                f"nf4, bf16, M={M}": (
                    "gemm_4bit",
                    partial(primitives.gemm_4bit, x[M], weight, None),
                    0.5625 * n,
                    2 * M * n,
                )
                for M in x
            },
            "rows, f32": ("int8_vectorwise_quant", lambda: primitives.int8_vectorwise_quant(A, 0.0), 5 * n, 0),
            "M=512": ("int8_linear_matmul", lambda: primitives.int8_linear_matmul(q512, q), n, 2 * 512 * n),
            "adam, f32": ("optimizer_update_8bit_blockwise", _optimizer_call(A, code), 16 * n, 0),
        }
        times = interleaved_seconds({name: call for name, (_, call, _, _) in rows.items()}, device, ROUNDS)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    copy = 8 * n / seconds["copy"]
    matmul = 2 * 512 * n / seconds["dense matmul, bf16, M=512"]
    return [
        {
            "primitive": primitive,
            "case": name,
            "time": f"{seconds[name] * 1e3:.2f} ms",
            "GB/s": f"{moved / seconds[name] / 1e9:.1f}" if moved else "",
            "of copy": f"{moved / seconds[name] / copy:.0%}" if moved else "",
            "GFLOP/s": f"{operations / seconds[name] / 1e9:.0f}" if operations else "",
            "of dense matmul": f"{operations / seconds[name] / matmul:.0%}" if operations else "",
        }
        for name, (primitive, _, moved, operations) in rows.items()
    ]
