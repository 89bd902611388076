"""The Triton kernels compile for every GPU that Triton knows, and their f32 arithmetic is the one written down."""

from __future__ import annotations

import math
import re
import subprocess
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton: pip install bnb_core[triton]")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bnb_core.backends.triton import gemm_4bit, grouped_gemm_4bit, int8_matmul, int8_quantize  # noqa: E402

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

TARGETS = {
    **{f"sm_{version}": GPUTarget("cuda", version, 32) for version in (75, 80, 90, 100, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx90a", "gfx942", "gfx950")},
    **{name: GPUTarget("hip", name, 32) for name in ("gfx1100", "gfx1201")},
}
OLDEST_AND_NEWEST = ("sm_75", "sm_120", "gfx90a", "gfx1201")
"""Of each maker and size of wave: for kernels without products, which have the same instructions on those between."""

STEP = "fp32 " * 12
"""size and the coefficients of an optimizer."""

STATE_8BIT = "*bf16 *bf16 *u8 *u8 *fp32 *fp32 *fp32 *fp32"
ONE_STATE_8BIT = "*bf16 *bf16 *u8 None *fp32 None *fp32 None"
STATE_32BIT = "*fp32 *fp32 *fp32 *fp32 None None None None"


class Specialization(NamedTuple):
    """A kernel with the types of its arguments, None for those left out, and its constants."""

    file: str
    kernel: str
    types: str
    constants: dict[str, Any]
    multiplies_and_adds: bool = False


def _optimizer(states: str, measures: bool, numbers: str = "None", **constants: Any) -> Specialization:
    tail = f"*fp32 None {numbers}" if measures else f"None *fp32 {numbers}"
    constants = {"FIRST_STEP": False, "SKIP_ZEROS": False, "BLOCKS": 8, **constants}
    return Specialization("optimizer", "optimizer_kernel", f"{states} {tail} i64 {STEP}", constants)


def _gemm_4bit(types: str, rows: int, dtype: torch.dtype, **constants: Any) -> Specialization:
    K = 4096 if constants["K_IS_EVEN"] else 4095
    constants |= {"QUANT_TYPE": "nf4", "BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, **gemm_4bit.tile(rows, K, dtype)}
    return Specialization("gemm_4bit", "gemm_4bit_kernel", f"{types} i32 i32 i32", constants, multiplies_and_adds=True)


def _grouped_gemm_4bit(kernel: str, types: str, **constants: Any) -> Specialization:
    constants |= {"QUANT_TYPE": "nf4", "BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, "GROUPS": 64, "K_IS_EVEN": True}
    return Specialization("grouped_gemm_4bit", kernel, f"{types} i32 i32 i32 i32", constants, multiplies_and_adds=True)


def _int8_matmul(types: str, int8_dot: bool, rows: int = 512) -> Specialization:
    constants = {"INT8_DOT": int8_dot, **int8_matmul.tile(rows, int8_dot, "*u8" in types)}
    return Specialization(
        "int8_matmul", "int8_matmul_kernel", f"{types} i32 i32 i32", constants, multiplies_and_adds=True
    )


def _dequantize_4bit(types: str) -> Specialization:
    constants = {"QUANT_TYPE": "nf4", "BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256, "TILE": 2048}
    return Specialization("quantize", "dequantize_4bit_kernel", types, constants)


STEP_NUMBERS = {
    **{"RULE": "ademamix", "BETA1": 0.9, "BETA2": 0.999, "BETA3_AT_LAST": 0.9999, "ALPHA_AT_LAST": 5.0},
    **{"EPS_ITSELF": 1e-8, "WEIGHT_DECAY": 0.1, "T_ALPHA": 10.0, "T_BETA3": 10.0},
    **{"LOG_BETA1": math.log(0.9), "LOG_BETA3": math.log(0.9999)},
}
LINES = {"LINES": int8_quantize.ROWS, "LENGTH": int8_quantize.ENTRIES // int8_quantize.ROWS}
SPECIALIZATIONS = {
    "quantize_blockwise": Specialization(
        "quantize", "quantize_blockwise_kernel", "*bf16 *fp32 *u8 *fp32 i64", {"BLOCKSIZE": 256, "BLOCKS": 8}
    ),
    "dequantize_blockwise": Specialization(
        "quantize", "dequantize_blockwise_kernel", "*u8 *fp32 *fp32 *bf16 i64", {"BLOCKSIZE": 256, "TILE": 2048}
    ),
    "quantize nf4": Specialization(
        "quantize", "quantize_4bit_kernel", "*bf16 *u8 *fp32 i64", {"QUANT_TYPE": "nf4", "BLOCKSIZE": 64, "BLOCKS": 32}
    ),
    "quantize fp4": Specialization(
        "quantize", "quantize_4bit_kernel", "*fp16 *u8 *fp32 i64", {"QUANT_TYPE": "fp4", "BLOCKSIZE": 4096, "BLOCKS": 1}
    ),
    "dequantize_4bit": _dequantize_4bit("*u8 *fp32 None None None *bf16 i64"),
    "dequantize_4bit, double-quantized scales": _dequantize_4bit("*u8 *u8 *fp32 *fp32 *fp32 *bf16 i64"),
    "gemv_4bit": _gemm_4bit(
        "*bf16 *u8 *u8 *fp32 *fp32 *fp32 *bf16 *bf16", 1, torch.bfloat16, K_IS_EVEN=True, SCALE_PER_ROW=True
    ),
    "gemm_4bit bf16": _gemm_4bit(
        "*bf16 *u8 *fp32 None None None *bf16 *bf16", 64, torch.bfloat16, K_IS_EVEN=True, SCALE_PER_ROW=True
    ),
    "gemm_4bit f16": _gemm_4bit(
        "*fp16 *u8 *fp32 None None None *fp16 *fp16", 64, torch.float16, K_IS_EVEN=True, SCALE_PER_ROW=True
    ),
    "gemm_4bit f16, rows of several scales": _gemm_4bit(
        "*fp16 *u8 *u8 *fp32 *fp32 *fp32 *fp16 *fp16", 64, torch.float16, K_IS_EVEN=False, SCALE_PER_ROW=False
    ),
    "gemm_4bit f32": _gemm_4bit(
        "*fp32 *u8 *fp32 None None None None *fp32", 64, torch.float32, K_IS_EVEN=False, SCALE_PER_ROW=False
    ),
    **{
        f"grouped_gemm_4bit {name}": _grouped_gemm_4bit(
            "grouped_gemm_4bit_kernel",
            f"{x} *u8 *u8 *fp32 *fp32 *fp32 *i32 {x} {x}",
            SCALE_PER_ROW=True,
            **gemm_4bit.tile(rows, 4096, dtype),
        )
        for name, x, rows, dtype in (
            ("bf16, a row each", "*bf16", 1, torch.bfloat16),
            ("bf16", "*bf16", 64, torch.bfloat16),
            ("f32", "*fp32", 64, torch.float32),
        )
    },
    **{
        f"grouped_gemm_4bit_backward {x}": _grouped_gemm_4bit(
            "grouped_gemm_4bit_backward_kernel",
            f"{x} *u8 *fp32 None None None *i32 {x}",
            **grouped_gemm_4bit.BACKWARD_TILE,
        )
        for x in ("*bf16", "*fp16", "*fp32")
    },
    "int8_absmax": Specialization("int8_quantize", "int8_absmax_kernel", "*bf16 *fp32 *u8 i32 i32 i32 i32 fp32", LINES),
    "int8_quantize": Specialization(
        "int8_quantize",
        "int8_quantize_kernel",
        "*bf16 *fp32 *u8 *i8 i32 i32 i32 i32",
        {"MASK_OF_LINES": False, **LINES},
    ),
    "int8_vectorwise_dequant": Specialization(
        "int8_quantize", "int8_vectorwise_dequant_kernel", "*i8 *fp32 *fp32 i64 i32", {"TILE": 2048}
    ),
    "int8_vectorwise_dequant bf16": Specialization(
        "int8_quantize", "int8_vectorwise_dequant_kernel", "*i8 *fp32 *bf16 i64 i32", {"TILE": 2048}
    ),
    "int8_linear_matmul": _int8_matmul("*i8 *i8 None None None None None *i32", int8_dot=True),
    "int8_scaled_mm, few rows": _int8_matmul("*i8 *i8 *fp32 *fp32 *bf16 None None *bf16", int8_dot=True, rows=1),
    "int8_mixed_scaled_mm": _int8_matmul("*i8 *i8 *fp32 *fp32 *bf16 *bf16 *u8 *bf16", int8_dot=True),
    "int8_mixed_scaled_mm f32": _int8_matmul("*i8 *i8 *fp32 *fp32 None *fp32 *u8 *fp32", int8_dot=True),
    "int8_scaled_mm by f16": _int8_matmul("*i8 *i8 *fp32 *fp32 *fp16 None None *fp16", int8_dot=False),
    "int8_mixed_scaled_mm by f16": _int8_matmul("*i8 *i8 *fp32 *fp32 *fp16 *fp16 *u8 *fp16", int8_dot=False),
    "int8_mm_dequant": Specialization(
        "int8_matmul", "int8_mm_dequant_kernel", "*i32 *fp32 *fp32 *bf16 *bf16 i32 i32", {"TILE_M": 16, "TILE_N": 128}
    ),
    "adam 8-bit": _optimizer(STATE_8BIT, False, RULE="adam", SKIP_ZEROS=True),
    "ademamix 8-bit": _optimizer(STATE_8BIT, False, RULE="ademamix"),
    "rmsprop 8-bit": _optimizer(ONE_STATE_8BIT, False, RULE="rmsprop"),
    **{f"{rule} 32-bit": _optimizer(STATE_32BIT, False, RULE=rule) for rule in ("momentum", "lion", "adagrad")},
    "norms of adam": _optimizer(STATE_8BIT, True, RULE="adam"),
    "ademamix by numbers in memory": _optimizer(STATE_8BIT, False, "*fp32", RULE="ademamix"),
    "momentum by numbers in memory": _optimizer(STATE_32BIT, False, "*fp32", RULE="momentum"),
    "step numbers": Specialization("step_numbers", "step_numbers_kernel", "*fp64 *fp64 *fp32", STEP_NUMBERS),
    "touch": Specialization("launch", "touch_kernel", "*fp32", {}),
    "trust ratio": Specialization("optimizer", "trust_ratio_kernel", "*fp32 *fp32 *fp32 i32 fp32", {"TILE": 1024}),
}

NEEDS_AMPERE = ("int8_linear_matmul", "int8_scaled_mm, few rows", "int8_mixed_scaled_mm", "int8_mixed_scaled_mm f32")
"""int8_matmul.has_int8_dot chooses another form for older GPUs of NVIDIA."""

CASES = [
    (name, target)
    for name in SPECIALIZATIONS
    for target in (TARGETS if SPECIALIZATIONS[name].multiplies_and_adds else OLDEST_AND_NEWEST)
    if (name, target) not in {(name, "sm_75") for name in NEEDS_AMPERE}
]


def kernels_in(file: str) -> dict[str, Any]:
    """The functions of a file that are launched."""
    module = import_module(f"bnb_core.backends.triton.{file}")
    return {name: value for name, value in vars(module).items() if name.endswith("_kernel")}


@pytest.fixture(autouse=True)
def nothing_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@cache
def compiled_once(name: str, target: str) -> dict[str, Any]:
    return compiled(SPECIALIZATIONS[name], TARGETS[target])


def compiled(case: Specialization, target: GPUTarget) -> dict[str, Any]:
    """What the compiler makes of a kernel, by stage."""
    kernel = kernels_in(case.file)[case.kernel]
    names = [name for name in kernel.arg_names if name not in case.constants]
    types = dict(zip(names, case.types.split(), strict=True))
    constants = {**case.constants, **{name: None for name, type_ in types.items() if type_ == "None"}}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    indexed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=indexed)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False}).asm


def resource_usage(cubin: bytes, folder: Path) -> str:
    """Registers and memory of each kernel, as the tool that comes with Triton reports them."""
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def fuses_nothing(assembly: str) -> bool:
    """Whether AMD's fused multiply-adds are those that an exact division and an exact square root consist of.

    A division of f32 is one v_div_fixup_f32 and five of them, a root one v_sqrt_f32 and two; a division of 64-bit
    integers begins with another reciprocal in f32 and has two on some GPUs.
    """

    def count(instruction: str) -> int:
        return len(re.findall(rf"\bv_(?:dual_)?{instruction}_f32", assembly))

    fused = count("(?:fma|fmac|fmaak|fmamk|mac|mad)") + 2 * len(re.findall(r"\bv_pk_fma_f32", assembly))
    divisions = count("div_fixup")
    exact = 5 * divisions + 2 * count("sqrt")
    return fused in (exact, exact + 2 * (count("rcp") - divisions))


@pytest.mark.parametrize(("name", "target"), CASES)
def test_the_kernel_compiles_keeps_every_rounding_and_spills_nothing(name, target, tmp_path):
    case = SPECIALIZATIONS[name]
    stages = compiled_once(name, target)
    if "ptx" in stages:
        f32 = re.findall(r"^\s+(?:@%p\d+ )?(\w+\.[\w.]*f32)", stages["ptx"], re.MULTILINE)
        inexact = {op for op in f32 if re.search(r"ftz|approx|full", op)}
        fused = {op for op in f32 if op.startswith("fma")}
        assert inexact == set()
        assert fused == set() or case.multiplies_and_adds
        assert re.findall(r"STACK:(\d+).*LOCAL:(\d+)", resource_usage(stages["cubin"], tmp_path)) == [("0", "0")]
    else:
        assert ".amdhsa_float_denorm_mode_32 3" in stages["amdgcn"]
        fused = re.findall(r"\bcontract\b|llvm\.fmuladd|llvm\.fma\b", stages["llir"])
        assert (fused == [] and fuses_nothing(stages["amdgcn"])) or case.multiplies_and_adds
        assert re.findall(r"ScratchSize: (\d+)", stages["amdgcn"]) == ["0"]


def uses_in_32_bits(intermediate: str) -> set[str]:
    """What is done to the number of a program, and to what becomes of it, before it is extended to 64 bits."""
    narrow, uses = set(), set()
    for result, operation, operands in re.findall(r"^\s*(%\w+) = \"?(\w+\.\w+)\"?(.*)", intermediate, re.MULTILINE):
        if operation == "tt.get_program_id":
            narrow.add(result)
        elif operation != "arith.extsi" and narrow & set(re.findall(r"%\w+", operands)):
            narrow.add(result)
            uses.add(operation)
    return uses


@pytest.mark.parametrize("name", SPECIALIZATIONS)
def test_where_a_program_works_is_computed_in_64_bits(name):
    intermediate = compiled_once(name, "sm_120")["ttir"]
    assert uses_in_32_bits(intermediate) <= {"arith.divsi", "arith.remsi"}


def test_a_product_in_32_bits_is_noticed():
    lines = ("%p = tt.get_program_id x : i32", "%t = arith.divsi %p, %n : i32", "%0 = arith.muli %t, %c2_i32 : i32")
    assert uses_in_32_bits("\n".join(f"    {line} loc(#loc1)" for line in lines)) == {"arith.divsi", "arith.muli"}


@pytest.mark.parametrize("target", ["gfx90a", "gfx1100"])
def test_fused_multiply_adds_are_noticed(monkeypatch, target):
    compile_ = triton.compile
    monkeypatch.setattr(
        triton, "compile", lambda *a, options, **k: compile_(*a, options={"enable_fp_fusion": True}, **k)
    )
    for name in ("momentum 32-bit", "adam 8-bit"):
        assert not fuses_nothing(compiled(SPECIALIZATIONS[name], TARGETS[target])["amdgcn"])


def test_every_kernel_is_compiled():
    folder = Path(import_module("bnb_core.backends.triton").__file__).parent
    kernels = {name for file in folder.glob("[a-z]*.py") for name in kernels_in(file.stem)}
    assert {case.kernel for case in SPECIALIZATIONS.values()} == kernels
