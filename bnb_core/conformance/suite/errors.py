"""Section 7: bad arguments raise an error that names the argument, before any kernel is called."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from bnb_core import primitives
from bnb_core.codebooks import FOUR_BIT_CODES, create_dynamic_map
from bnb_core.conformance.case import Case, Context, Failure, positional
from bnb_core.formats import FORMATS
from bnb_core.primitive import Primitive
from bnb_core.records import OptimizerStep, map_tensors

STEP = OptimizerStep("adam", 1, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)._asdict()


def valid_arguments(primitive: str) -> dict[str, Any]:
    """Arguments that the primitive accepts by name, the fields of records among them, in any order."""
    M, N, K = 4, 6, 64
    A, code = torch.ones(M, K), create_dynamic_map()
    packed, scales = torch.zeros(N * K // 2, 1, dtype=torch.uint8), torch.ones(N * K // 64)
    i8, i8_weight, i32 = (torch.zeros(*size) for size in ((M, K), (N, K), (M, N)))
    i8, i8_weight, i32 = i8.to(torch.int8), i8_weight.to(torch.int8), i32.to(torch.int32)
    row_stats, col_stats, bias, mask = torch.ones(M), torch.ones(N), torch.zeros(N), torch.zeros(K, dtype=torch.bool)
    codes = torch.zeros(M, K, dtype=torch.uint8)
    int8_scales = {"row_stats": row_stats, "col_stats": col_stats}
    update = {"g": A, "p": A.clone(), **STEP}
    nested = {"nested_absmax": torch.ones(1), "nested_code": code, "offset": torch.zeros(()), "nested_blocksize": 256}
    match primitive:
        case "quantize_blockwise":
            return {"A": A, "code": code, "blocksize": 64}
        case "dequantize_blockwise":
            return {"A": codes, "absmax": torch.ones(M), "code": code, "blocksize": 64, "dtype": torch.float32}
        case "quantize_4bit":
            return {"A": A, "blocksize": 64, "quant_type": "nf4", "quant_storage": torch.uint8}
        case "dequantize_4bit":
            tail = {"quant_type": "nf4", "shape": (N, K), "dtype": torch.float32, **nested}
            return {"A": packed, "absmax": scales.to(torch.uint8), "blocksize": 64, **tail}
        case "gemm_4bit":
            weight = {"absmax": scales.to(torch.uint8), "blocksize": 64, "quant_type": "nf4"}
            return {"A": A, "B": packed, "shape": (N, K), **weight, "bias": bias, **nested}
        case "gemm_4bit_backward":
            forward = valid_arguments("gemm_4bit")
            del forward["A"], forward["bias"]
            return {"dY": torch.ones(M, N), **forward}
        case "grouped_gemm_4bit" | "grouped_gemm_4bit_backward":
            E, stack = 3, {"shape": (3, N, K), "B": packed.repeat(3, 1), "absmax": scales.to(torch.uint8).repeat(3)}
            plain = valid_arguments(primitive.removeprefix("grouped_"))
            added = {"bias": bias.repeat(E, 1)} if "bias" in plain else {}
            return {**plain, **stack, **added, "offsets": torch.tensor([0, 1, 1, M], dtype=torch.int32)}
        case "int8_vectorwise_quant" | "int8_double_quant":
            return {"A": A, "threshold": 6.0}
        case "int8_vectorwise_dequant":
            return {"A": i8, "stats": row_stats}
        case "int8_linear_matmul":
            return {"A": i8, "B": i8_weight}
        case "int8_mm_dequant":
            return {"A": i32, **int8_scales, "bias": bias, "dtype": torch.float32}
        case "int8_scaled_mm":
            return {"A": i8, "B": i8_weight, **int8_scales, "bias": bias, "dtype": torch.float32}
        case "int8_mixed_scaled_mm":
            return {"A": A, "CA": i8, "CB": i8_weight, **int8_scales, "outlier_mask": mask, "bias": bias}
        case "int8_linear_backward":
            return {"dY": torch.ones(M, N), "B": i8_weight, "col_stats": col_stats}
        case "optimizer_update_32bit":
            return {**update, "state1": A.clone(), "state2": A.clone(), "unorm_vec": torch.zeros(1)}
        case "optimizer_update_8bit_blockwise":
            states = {"state1": codes, "state2": codes.clone(), "qmap1": code, "qmap2": code.clone()}
            return {**update, **states, "absmax1": torch.ones(1), "absmax2": torch.ones(1), "unorm_vec": None}
    raise ValueError(f"{primitive}: the suite has no valid arguments for it")


class Bad(NamedTuple):
    """A change of arguments that must be refused with an error that names ``argument``."""

    argument: str
    change: dict[str, Any]
    error: type[Exception] = ValueError


BLOCKSIZES = [Bad("blocksize", {"blocksize": size}) for size in (0, -64, 63, 8192, 16, None)]
NO_FORMATS = (*(name for name in FOUR_BIT_CODES if name not in FORMATS), "NF4", "", None)
QUANT_TYPES = [Bad("quant_type", {"quant_type": name}) for name in NO_FORMATS]
DTYPES = [Bad("dtype", {"dtype": dtype}, TypeError) for dtype in (torch.float64, torch.int32, None, "float32")]
NESTED = [
    Bad("nested_code", {"nested_absmax": None, "absmax": torch.ones(6), "offset": None}, TypeError),
    Bad("offset", {"nested_absmax": None, "absmax": torch.ones(6), "nested_code": None}, TypeError),
    Bad("absmax", {"nested_absmax": None, "absmax": torch.ones(7), "offset": None, "nested_code": None}),
    Bad("nested_blocksize", {"nested_blocksize": None}),
    Bad("absmax", {"nested_absmax": None}, TypeError),
    Bad("nested_code", {"nested_code": None}, TypeError),
    Bad("offset", {"offset": None}, TypeError),
    Bad("nested_blocksize", {"nested_blocksize": 100}),
]
MAX_UNORM = [Bad("max_unorm", {"max_unorm": -1.0}), Bad("unorm_vec", {"max_unorm": 1.0, "unorm_vec": None}, TypeError)]
HUGE, NAN = 10**400, float("nan")
NUMBERS = ("beta1", "beta2", "beta3", "alpha", "eps", "lr", "weight_decay", "gnorm_scale", "max_unorm")
"""Of an optimizer's step: those that f32 has to hold."""
STEPS = [
    *(Bad(name, {name: value}) for name in NUMBERS for value in (HUGE, 1e39, NAN)),
    *(Bad(name, {name: value}, TypeError) for name in NUMBERS for value in (None, "0.1", [0.1])),
    *(Bad(name, {name: torch.tensor(0.5)}, TypeError) for name in NUMBERS if name != "lr"),
    Bad("lr", {"lr": torch.ones(2)}),
    Bad("step", {"step": HUGE}),
    Bad("step", {"step": 2**63}),
    Bad("step", {"step": 1.0}, TypeError),
    Bad("step", {"step": None}, TypeError),
    Bad("skip_zeros", {"skip_zeros": "no"}, TypeError),
    Bad("unorm_vec", {"unorm_vec": torch.zeros(2)}),
    Bad("unorm_vec", {"unorm_vec": "none"}, TypeError),
    Bad("optimizer_name", {"optimizer_name": "adamw"}),
    Bad("step", {"step": 0}),
    *(Bad(name, {name: value}) for name in ("t_alpha", "t_beta3") for value in (-1.0, 1e39, NAN)),
    *(Bad(name, {name: value}, TypeError) for name in ("t_alpha", "t_beta3") for value in (None, "5", torch.ones(1))),
    *(Bad(name, {name: torch.ones(2, dtype=torch.float64)}) for name in ("step_tensor", "lr_tensor")),
    *(Bad(name, {name: value}, TypeError) for name in ("step_tensor", "lr_tensor") for value in (torch.ones(1), 1.0)),
    Bad("state2", {"optimizer_name": "lion"}),
    Bad("state1", {"optimizer_name": "ademamix"}),
    Bad("state2", {"state2": None}, TypeError),
    Bad("max_unorm", {"optimizer_name": "adagrad", "state2": None, "max_unorm": 1.0}),
    *MAX_UNORM,
]

SHAPES = [
    Bad("shape", {"shape": (-6, -64)}),
    Bad("shape", {"shape": (6, 2**63)}),
    Bad("shape", {"shape": (6, 64.0)}, TypeError),
    Bad("shape", {"shape": 384}, TypeError),
    Bad("shape", {"shape": None}, TypeError),
]
STACKS = [
    *BLOCKSIZES,
    *QUANT_TYPES,
    *SHAPES,
    *(Bad("shape", {"shape": shape}) for shape in ((18, 64), (0, 6, 64), (1, 3, 6, 64))),
    Bad("B", {"shape": (4, 6, 64)}),
    Bad("blocksize", {"blocksize": 256, "absmax": torch.zeros(5, dtype=torch.uint8)}),
    Bad("offsets", {"offsets": torch.zeros(3, dtype=torch.int32)}),
    Bad("offsets", {"offsets": torch.zeros(1, 4, dtype=torch.int32)}),
    Bad("nested_code", {"nested_code": None}, TypeError),
]
THRESHOLDS = [
    *(Bad("threshold", {"threshold": value}) for value in (-1.0, NAN, HUGE, 1e39)),
    *(Bad("threshold", {"threshold": value}, TypeError) for value in (None, "6", torch.tensor(6.0))),
]
ONE_STATE = {"optimizer_name": "lion", "state2": None, "qmap2": None, "absmax2": None}
SECOND_STATES = [
    Bad("qmap2", {**ONE_STATE, "qmap2": create_dynamic_map()}),
    Bad("qmap2", {**ONE_STATE, "qmap2": "none"}),
    Bad("absmax2", {**ONE_STATE, "absmax2": torch.ones(1)}),
    Bad("absmax2", {**ONE_STATE, "absmax2": torch.ones(3, dtype=torch.int64)}),
]

# What is particular to a primitive; wrong types, dtypes, sizes and devices of every tensor are added below.
PARTICULAR: dict[str, list[Bad]] = {
    "quantize_blockwise": BLOCKSIZES,
    "dequantize_blockwise": [*BLOCKSIZES, *DTYPES],
    "quantize_4bit": [
        *BLOCKSIZES,
        *QUANT_TYPES,
        Bad("quant_storage", {"quant_storage": torch.int8}, TypeError),
    ],
    "dequantize_4bit": [
        *BLOCKSIZES,
        *QUANT_TYPES,
        *DTYPES,
        *NESTED,
        *SHAPES,
        Bad("A", {"shape": (6, 65)}),
        Bad("A", {"shape": (5, 64)}),
    ],
    "gemm_4bit": [
        *BLOCKSIZES,
        *QUANT_TYPES,
        *SHAPES,
        Bad("shape", {"shape": (6, 64, 1)}),
        Bad("B", {"shape": (7, 64)}),
        Bad("A", {"shape": (64, 6)}),
        Bad("A", {"A": torch.ones(())}),
        *NESTED,
        Bad("bias", {"bias": torch.zeros(6, dtype=torch.float16)}, TypeError),
    ],
    "gemm_4bit_backward": [
        *BLOCKSIZES,
        *QUANT_TYPES,
        *SHAPES,
        Bad("shape", {"shape": (6, 64, 1)}),
        Bad("B", {"shape": (7, 64)}),
        Bad("dY", {"shape": (64, 6)}),
        Bad("dY", {"dY": torch.ones(())}),
        Bad("absmax", {"nested_absmax": None}, TypeError),
        Bad("nested_code", {"nested_code": None}, TypeError),
        Bad("offset", {"offset": None}, TypeError),
        Bad("nested_blocksize", {"nested_blocksize": 100}),
    ],
    "grouped_gemm_4bit": [
        *STACKS,
        Bad("A", {"A": torch.ones(64)}),
        Bad("A", {"A": torch.ones(2, 2, 64)}),
        Bad("bias", {"bias": torch.zeros(3, 6, dtype=torch.float16)}, TypeError),
        Bad("bias", {"bias": torch.zeros(6)}),
    ],
    "grouped_gemm_4bit_backward": [*STACKS, Bad("dY", {"dY": torch.ones(2, 2, 6)})],
    "int8_vectorwise_quant": [*THRESHOLDS, Bad("A", {"A": torch.ones(())})],
    "int8_double_quant": [*THRESHOLDS, Bad("A", {"A": torch.ones(())})],
    "int8_linear_matmul": [
        Bad("B", {"B": torch.zeros(6, 63, dtype=torch.int8)}),
        Bad("B", {"B": torch.zeros(6, 8, 8, dtype=torch.int8)}),
        Bad("A", {"A": torch.zeros((1, 65537), dtype=torch.int8), "B": torch.zeros((1, 65537), dtype=torch.int8)}),
    ],
    "int8_mm_dequant": DTYPES,
    "int8_scaled_mm": [*DTYPES, Bad("B", {"B": torch.zeros(6, 63, dtype=torch.int8)})],
    "int8_mixed_scaled_mm": [Bad("CA", {"A": torch.ones(4, 63)})],
    "int8_linear_backward": [
        Bad("B", {"B": torch.zeros(6, 8, 8, dtype=torch.int8)}),
        Bad("B", {"B": torch.zeros((), dtype=torch.int8)}),
        Bad("dY", {"B": torch.zeros(64, 6, dtype=torch.int8), "col_stats": torch.ones(64)}),
        Bad("dY", {"dY": torch.ones(())}),
    ],
    "optimizer_update_32bit": STEPS,
    "optimizer_update_8bit_blockwise": [*STEPS, *SECOND_STATES],
}

# A tensor whose size nothing else fixes: one of another size is another valid call.
FREE_SIZE = {
    "quantize_blockwise": ("A",),
    "quantize_4bit": ("A",),
    "int8_vectorwise_quant": ("A",),
    "int8_double_quant": ("A",),
    "int8_vectorwise_dequant": ("A",),
    "int8_linear_backward": ("B",),
}
# Where a wrong size of one tensor is noticed in another.
NOTICED_IN = {
    ("dequantize_blockwise", "A"): "absmax",
    ("int8_linear_matmul", "A"): "B",
    ("int8_mm_dequant", "A"): "col_stats",
    ("int8_scaled_mm", "A"): "B",
    ("int8_mixed_scaled_mm", "A"): "CA",
    ("int8_mixed_scaled_mm", "CA"): "CB",
    ("optimizer_update_32bit", "p"): "g",
    ("optimizer_update_8bit_blockwise", "p"): "g",
}


def _larger(tensor: torch.Tensor) -> torch.Tensor:
    """With a last dimension that is longer by 300, which is more than a block."""
    shape = tensor.shape or (1,)
    return torch.zeros((*shape[:-1], shape[-1] + 300), dtype=tensor.dtype)


def _of_every_tensor(primitive: str) -> Iterator[tuple[str, Bad]]:
    for name, value in valid_arguments(primitive).items():
        if not isinstance(value, torch.Tensor):
            continue
        yield "a list", Bad(name, {name: [1.0, 2.0]}, TypeError)
        yield "sparse", Bad(name, {name: value.to_sparse()}, TypeError)
        yield "complex", Bad(name, {name: value.to(torch.complex64)}, TypeError)
        yield "i64", Bad(name, {name: value.to(torch.int64)}, TypeError)
        if name not in FREE_SIZE.get(primitive, ()):
            yield "too large", Bad(NOTICED_IN.get((primitive, name), name), {name: _larger(value)})


def _call(context: Context, primitive: Primitive, arguments: dict[str, Any]) -> None:
    primitive(*map_tensors(context.move, positional(primitive, arguments)))


def _check(context: Context, primitive: Primitive, bad: Bad) -> None:
    try:
        _call(context, primitive, {**valid_arguments(primitive.name), **bad.change})
    except bad.error as error:
        message = str(error)
        if not message.startswith(f"{bad.argument}:"):
            raise Failure(f"the error should begin with {bad.argument!r}, it says: {message}") from error
        return
    except Exception as error:
        raise Failure(
            f"{bad.argument}: expected a {bad.error.__name__}, got {type(error).__name__}: {error}"
        ) from error
    raise Failure(f"{bad.argument}: accepted {bad.change[next(iter(bad.change))]!r}")


def _accepts_valid(context: Context, primitive: Primitive) -> None:
    """Otherwise the refusals above would prove nothing."""
    _call(context, primitive, valid_arguments(primitive.name))


def _other_device(context: Context, primitive: Primitive, name: str) -> None:
    """A tensor on another device is refused by its name."""
    _check(context, primitive, Bad(name, {name: valid_arguments(primitive.name)[name].to("meta")}))


def cases() -> Iterator[Case]:
    for primitive in (value for value in vars(primitives).values() if isinstance(value, Primitive)):
        name = primitive.name
        valid = partial(_accepts_valid, primitive=primitive)
        yield Case(name, "errors,valid arguments are accepted", valid, {"error": "none"})
        labelled = [
            *_of_every_tensor(name),
            *((repr(list(bad.change.values())[-1]), bad) for bad in PARTICULAR.get(name, [])),
        ]
        for index, (label, bad) in enumerate(labelled):
            run = partial(_check, primitive=primitive, bad=bad)
            traits = {"error": bad.argument}
            case_name = f"errors,{index},{next(iter(bad.change))} {label.splitlines()[0][:40]}"
            yield Case(name, case_name, run, traits, reaches_kernel=False)
        tensors = [key for key, value in valid_arguments(name).items() if isinstance(value, torch.Tensor)]
        for argument in tensors[1:]:
            other_device = partial(_other_device, primitive=primitive, name=argument)
            traits = {"error": argument}
            yield Case(name, f"errors,{argument} on another device", other_device, traits, reaches_kernel=False)


REQUIRED = {value.name: {"error": ("none",)} for value in vars(primitives).values() if isinstance(value, Primitive)}
