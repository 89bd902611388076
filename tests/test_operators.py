"""The operators of bitsandbytes, in a process where bnb_core has the name: their schemas, results, errors, gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_python import run_python

# Those of bitsandbytes 0.50.2, as torch prints them.
SCHEMAS = {
    "dequantize_4bit": "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype)"
    " -> Tensor",
    "dequantize_4bit.out": "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype,"
    " Tensor($0! -> ) out) -> ()",
    "dequantize_blockwise": "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
    "dequantize_blockwise.out": "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype,"
    " Tensor($0! -> ) out) -> ()",
    "gemm_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None,"
    " Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    "gemv_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    "gemv_4bit.out": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize,"
    " Tensor($0! -> ) out) -> ()",
    "int8_double_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out": "(Tensor A, Tensor B, Tensor($0! -> ) out) -> ()",
    "int8_mixed_scaled_mm": "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None,"
    " Tensor? bias=None) -> (Tensor, Tensor?)",
    "int8_mm_dequant": "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None)"
    " -> Tensor",
    "int8_scaled_mm": "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None,"
    " ScalarType? dtype=None) -> Tensor",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)",
    "optimizer_update_32bit": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1,"
    " Tensor(a3!)? state2, Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2,"
    " float beta3, float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale,"
    " bool skip_zeros=False) -> ()",
    "optimizer_update_8bit_blockwise": "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1,"
    " Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr,"
    " Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay,"
    " float gnorm_scale, bool skip_zeros=False) -> ()",
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
}

N, K = 8, 96
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

Sample = tuple[str, tuple[Any, ...], Callable[..., Any]]


def _operators() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitsandbytes::")]


def _operator(name: str) -> Any:
    base, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.bitsandbytes, base), overload or "default")


def _samples() -> dict[str, Sample]:
    """Calls by what is particular about them: the operator, its arguments, and the same by the API of bnb_core.

    Where an operator changes arguments and gives nothing, so does the function.
    """
    from bnb_core import functional as F
    from bnb_core import primitives
    from bnb_core.records import Int8Rows, Int8Weight

    torch.manual_seed(0)
    A, W, bias = torch.randn(5, K), torch.randn(N, K), torch.randn(N)
    A[1, 3], A[4, 50] = 30.0, -40.0
    code = F.create_dynamic_map()
    codes, state = F.quantize_blockwise(A, blocksize=64)
    packed, nf4 = F.quantize_4bit(W, quant_type="nf4")
    packed_fp4, fp4 = F.quantize_4bit(W, quant_type="fp4", blocksize=32)
    packed_ones, ones = F.quantize_4bit(torch.ones(N, K), quant_type="fp4", blocksize=32)
    packed_nested, nested = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    nested.offset = nested.offset.half()
    f32_offset = F.QuantState.from_dict({**nested.as_dict(), "nested_offset": nested.offset.item()}, A.device)
    nested_scales = (nested.absmax, nested.state2.code, nested.offset)
    CA, SCA, columns = F.int8_vectorwise_quant(A, 6.0)
    CB, SCB, _ = F.int8_vectorwise_quant(W)
    i32 = F.int8_linear_matmul(CA, CB)
    mask = torch.zeros(K, dtype=torch.bool)
    mask[[3, 50]] = True

    def with_indices(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda A, threshold=0.0: function(A, threshold=threshold)

    def rounded_once(C: torch.Tensor, row: torch.Tensor, col: torch.Tensor, dtype: Any, bias: Any) -> torch.Tensor:
        return F.int8_mm_dequant(C, row, col, bias=bias).to(dtype)

    return {
        "quantize_blockwise": (
            "quantize_blockwise",
            (A, code, 64),
            lambda *a: (codes, state.absmax),
        ),
        "quantize_blockwise, any block size": (
            "quantize_blockwise",
            (A, code, 100),
            lambda A, code, size: _parts(F.quantize_blockwise(A, code, blocksize=size)),
        ),
        "dequantize_blockwise": (
            "dequantize_blockwise",
            (codes, state.absmax, code, 64, BF16),
            lambda *a: F.dequantize_blockwise(codes, state).bfloat16(),
        ),
        "dequantize_blockwise.out": (
            "dequantize_blockwise.out",
            (codes, state.absmax, code, 64, F32, torch.empty_like(A)),
            lambda *a: F.dequantize_blockwise(codes, state, out=a[-1]),
        ),
        "quantize_4bit": ("quantize_4bit", (W, 64, "nf4", torch.uint8), lambda *a: (packed, nf4.absmax)),
        "quantize_4bit, other storage": (
            "quantize_4bit",
            (torch.ones(N, K), 32, "fp4", BF16),  # no byte pair of it is a NaN, which equals nothing
            lambda *a: (packed_ones.view(-1).view(BF16).view(-1, 1), ones.absmax),
        ),
        "dequantize_4bit": (
            "dequantize_4bit",
            (packed, nf4.absmax, 64, "nf4", [N, K], F16),
            lambda *a: F.dequantize_4bit(packed, nf4).half(),
        ),
        "dequantize_4bit.out": (
            "dequantize_4bit.out",
            (packed, nf4.absmax, 64, "nf4", [N, K], F32, torch.empty(N, K)),
            lambda *a: F.dequantize_4bit(packed, nf4, out=a[-1]),
        ),
        "gemm_4bit": (
            "gemm_4bit",
            (A, packed, [N, K], nf4.absmax, 64, "nf4", bias),
            lambda *a: F.gemm_4bit(A, packed, nf4, bias),
        ),
        "gemm_4bit, double quantization": (
            "gemm_4bit",
            (A.half(), packed_nested, [N, K], nested.state2.absmax, 64, "nf4", None, *nested_scales),
            lambda *a: F.gemm_4bit(A.half(), packed_nested, f32_offset),
        ),
        "gemv_4bit": (
            "gemv_4bit",
            (A[:1], packed, [N, K], nf4.absmax, nf4.code, 64),
            lambda *a: F.gemv_4bit(A[:1], packed, state=nf4),
        ),
        "gemv_4bit, fp4": (
            "gemv_4bit",
            (A[1], packed_fp4, [N, K], fp4.absmax, fp4.code, 32),
            lambda *a: F.gemv_4bit(A[1], packed_fp4, state=fp4),
        ),
        "gemv_4bit.out": (
            "gemv_4bit.out",
            (A[:1], packed, [N, K], nf4.absmax, nf4.code, 64, torch.empty(1, N)),
            lambda *a: F.gemv_4bit(A[:1], packed, a[-1], state=nf4),
        ),
        "int8_vectorwise_quant": ("int8_vectorwise_quant", (A,), with_indices(F.int8_vectorwise_quant)),
        "int8_vectorwise_quant, outliers": (
            "int8_vectorwise_quant",
            (A.bfloat16(), 6.0),
            with_indices(F.int8_vectorwise_quant),
        ),
        "int8_double_quant": ("int8_double_quant", (A,), with_indices(F.int8_double_quant)),
        "int8_double_quant, outliers": ("int8_double_quant", (A, 6.0), with_indices(F.int8_double_quant)),
        "int8_vectorwise_dequant": ("int8_vectorwise_dequant", (CB, SCB), F.int8_vectorwise_dequant),
        "int8_linear_matmul": (
            "int8_linear_matmul",
            (CA, CB),
            lambda A, B: (A.long() @ B.long().t()).int(),
        ),
        "int8_linear_matmul.out": (
            "int8_linear_matmul.out",
            (CA, CB, torch.empty(5, N, dtype=torch.int32)),
            lambda A, B, out: out.copy_(A.long() @ B.long().t()),
        ),
        "int8_mm_dequant": ("int8_mm_dequant", (i32, SCA, SCB), F.int8_mm_dequant),
        "int8_mm_dequant, bias of another dtype": ("int8_mm_dequant", (i32, SCA, SCB, F16, bias), rounded_once),
        "int8_scaled_mm": (
            "int8_scaled_mm",
            (CA, CB, SCA, SCB),
            lambda *a: F.int8_mm_dequant(i32, SCA, SCB),
        ),
        "int8_scaled_mm, bias of another dtype": (
            "int8_scaled_mm",
            (CA, CB, SCA, SCB, bias, BF16),
            lambda *a: rounded_once(i32, SCA, SCB, BF16, bias),
        ),
        "int8_mixed_scaled_mm": (
            "int8_mixed_scaled_mm",
            (A, CA, CB, SCA, SCB),
            lambda *a: (F.int8_mm_dequant(i32, SCA, SCB, bias=torch.zeros(N)), None),
        ),
        "int8_mixed_scaled_mm, outliers": (
            "int8_mixed_scaled_mm",
            (A, CA, CB, SCA, SCB, columns, bias),
            lambda *a: (
                primitives.int8_mixed_scaled_mm(A, Int8Rows(CA, SCA), Int8Weight(CB, SCB), mask, bias),
                A[:, [3, 50]],
            ),
        ),
        **_optimizer_samples(),
    }


def _optimizer_samples() -> dict[str, Sample]:
    from bnb_core import functional as F

    p, g, m, v = torch.randn(40), torch.randn(40), torch.randn(40), torch.rand(40)
    moments, unorm = torch.randn(2, 40), torch.zeros(1)
    codes = F.create_dynamic_map(), F.create_dynamic_map(signed=False)
    q1, q2 = torch.full((40,), 130, dtype=torch.uint8), torch.full((40,), 100, dtype=torch.uint8)
    betas, others = (0.9, 0.99), (1e-8, 0.01, 3, 1e-2, 0.5)  # eps, weight_decay, step, lr, gnorm_scale

    def by_api(name: str, max_unorm: float, beta3: float = 0.0, alpha: float = 0.0) -> Callable[..., None]:
        def update(optimizer: str, g: Any, p: Any, state1: Any, state2: Any, unorm_vec: Any, *rest: Any) -> None:
            F.optimizer_update_32bit(
                optimizer, g, p, state1, 0.9, 1e-8, 3, 1e-2, state2, 0.99, beta3, alpha, 0.01, 0.5, unorm_vec, max_unorm
            )

        return update

    return {
        "optimizer_update_32bit": (
            "optimizer_update_32bit",
            ("adam", g, p, m, v, None, 0.0, 0.0, *betas, 0.0, 0.0, *others),
            by_api("adam", 0.0),
        ),
        "optimizer_update_32bit, ademamix": (
            "optimizer_update_32bit",
            ("ademamix", g, p, moments, v, None, 0.0, 0.0, *betas, 0.999, 2.0, *others),
            by_api("ademamix", 0.0, 0.999, 2.0),
        ),
        "optimizer_update_32bit, bounded by p's norm": (
            "optimizer_update_32bit",
            ("lamb", g, p, m, v, unorm, 0.1, p.norm().item(), *betas, 0.0, 0.0, *others),
            by_api("lamb", 0.1),
        ),
        "optimizer_update_8bit_blockwise": (
            "optimizer_update_8bit_blockwise",
            ("adam", g, p, q1, q2, *betas, 0.0, 0.0, 1e-8, 3, 1e-2, *codes, torch.ones(1), torch.ones(1), 0.01, 0.5),
            F.optimizer_update_8bit_blockwise,
        ),
    }


def _parts(result: Any) -> tuple[Any, Any]:
    codes, state = result
    return codes, state.absmax


# Sample to the place of an argument, what stands there instead, and the name that the error begins with.
ERRORS = {
    "quantize_blockwise": (2, 0, "blocksize"),
    "dequantize_blockwise": (1, torch.ones(3), "absmax"),
    "dequantize_blockwise.out": (5, torch.ones(5, K, dtype=F16), "out"),
    "quantize_4bit": (2, "nf5", "quant_type"),
    "dequantize_4bit": (4, [N, K + 2], "A"),
    "gemm_4bit": (2, [N], "shapeB"),
    "gemm_4bit, double quantization": (8, torch.ones(16), "absmax_code"),
    "gemv_4bit": (4, torch.linspace(-1, 1, 16), "code"),
    "gemv_4bit.out": (6, torch.ones(2, N), "out"),
    "int8_vectorwise_quant": (0, torch.ones(3, 4, dtype=torch.int32), "A"),
    "int8_double_quant, outliers": (1, -1.0, "threshold"),
    "int8_vectorwise_dequant": (1, torch.ones(3), "stats"),
    "int8_linear_matmul": (1, torch.ones(N, K), "B"),
    "int8_mm_dequant": (1, torch.ones(5, dtype=F16), "row_stats"),
    "int8_scaled_mm, bias of another dtype": (5, torch.float64, "dtype"),
    "int8_mixed_scaled_mm": (3, torch.ones(4), "SCA"),
    "int8_mixed_scaled_mm, outliers": (5, torch.tensor([K]), "outlier_cols"),
    "optimizer_update_32bit": (0, "adamx", "optimizer_name"),
    "optimizer_update_8bit_blockwise": (12, torch.ones(16), "qmap1"),
}


def _same(results: Any, expected: Any) -> bool:
    results, expected = (value if isinstance(value, tuple) else (value,) for value in (results, expected))
    return len(results) == len(expected) and all(
        a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in zip(results, expected, strict=True)
    )


def _cloned(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def _fact(sample: Sample) -> dict[str, Any]:
    name, arguments, api = sample
    operator, given, twin = _operator(name), _cloned(arguments), _cloned(arguments)
    with torch.no_grad():
        results, expected = operator(*given), api(*twin)
    tensors = [pair for pair in zip(given, twin, strict=True) if isinstance(pair[0], torch.Tensor)]
    same = all(torch.equal(a, b) for a, b in tensors)
    if operator._schema.returns:
        same = same and _same(results, expected)
    outcome = torch.library.opcheck(operator, _cloned(arguments), raise_exception=False)
    return {"operator": name, "same": same, "opcheck": {test: str(result) for test, result in outcome.items()}}


def _error(sample: Sample, place: int, wrong: Any) -> str:
    name, arguments, _ = sample
    given = [*_cloned(arguments)]
    given[place] = wrong
    try:
        _operator(name)(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _gradients(samples: dict[str, Sample]) -> dict[str, bool]:
    """Those of gemm_4bit's input and bias are those by hand; other operators give results that need none."""
    found = {}
    for case in ("gemm_4bit", "gemm_4bit, double quantization"):
        _, (A, B, shape, absmax, blocksize, quant_type, bias, *nested), _ = samples[case]
        A, bias = A.clone().requires_grad_(), torch.zeros(N, dtype=A.dtype).requires_grad_()
        torch.ops.bitsandbytes.gemm_4bit(A, B, shape, absmax, blocksize, quant_type, bias, *nested).sum().backward()
        eye = torch.eye(K, dtype=A.dtype)
        W = torch.ops.bitsandbytes.gemm_4bit(eye, B, shape, absmax, blocksize, quant_type, None, *nested).t()
        close = torch.allclose(A.grad, W.sum(0).expand_as(A), rtol=1e-2, atol=1e-2)
        found[case] = close and torch.equal(bias.grad, torch.full_like(bias, 5.0))
    _, (A, B, shape, absmax, code, blocksize), _ = samples["gemv_4bit"]
    y = torch.ops.bitsandbytes.gemv_4bit(A.clone().requires_grad_(), B, shape, absmax, code, blocksize)
    return {**found, "gemv_4bit": not y.requires_grad}


def _param_norm() -> dict[str, float]:
    """How far p goes, from 1 with a gradient of 1 each, for norms of p that are not its own."""
    moved = {}
    for param_norm in (0.0, 1.0, 10.0, 1e4):
        p, g, m, v = torch.ones(100), torch.ones(100), torch.zeros(100), torch.zeros(100)
        torch.ops.bitsandbytes.optimizer_update_32bit(
            "adam", g, p, m, v, torch.zeros(1), 0.1, param_norm, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.0, 1, 1e-2, 1.0
        )
        moved[str(param_norm)] = (1 - p).mean().item()
    return moved


def _compiled(samples: dict[str, Sample]) -> bool:
    """A layer of operators in one graph gives what it gives outside."""
    _, (A, B, shape, absmax, blocksize, quant_type, bias), _ = samples["gemm_4bit"]
    _, (CB, SCB), _ = samples["int8_vectorwise_dequant"]
    operators = torch.ops.bitsandbytes

    def layer(A: torch.Tensor) -> torch.Tensor:
        y = operators.gemm_4bit(A, B, shape, absmax, blocksize, quant_type, bias)
        CA, SCA, _ = operators.int8_vectorwise_quant(A)
        packed, scales = operators.quantize_4bit(A, 64, "fp4", torch.uint8)
        back = operators.dequantize_4bit(packed, scales, 64, "fp4", list(A.shape), A.dtype)
        return y + operators.int8_scaled_mm(CA, CB, SCA, SCB, None, A.dtype) + back.sum()

    return torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(A), layer(A))


def _facts() -> dict[str, Any]:
    import bnb_core

    before = _operators()
    bnb_core.install_as_bitsandbytes()
    import bitsandbytes._ops

    samples = _samples()
    names = [name.removeprefix("bitsandbytes::") for name in _operators()]
    return {
        "before": before,
        "module": bitsandbytes._ops.register_kernel is torch.library.register_kernel,
        "schemas": {name: str(_operator(name)._schema).partition("(")[2] for name in names},
        "samples": {case: _fact(sample) for case, sample in samples.items()},
        "errors": {case: _error(samples[case], *wrong[:2]) for case, wrong in ERRORS.items()},
        "gradients": _gradients(samples),
        "param_norm": _param_norm(),
        "compiled": _compiled(samples),
    }


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """What one process finds in which bnb_core has the name."""
    code = f"import runpy; runpy.run_path({__file__!r}, run_name='__main__')"
    result = run_python(code, Path(__file__).parent)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_bnb_core_alone_defines_no_operator(facts):
    assert facts["before"] == []


def test_the_operators_and_their_schemas_are_those_of_bitsandbytes(facts):
    assert {name: f"({schema}" for name, schema in facts["schemas"].items()} == SCHEMAS
    assert facts["module"]


def test_an_operator_gives_the_bits_of_the_api(facts):
    assert [case for case, fact in facts["samples"].items() if not fact["same"]] == []
    assert {fact["operator"] for fact in facts["samples"].values()} == set(SCHEMAS)


def test_opcheck_passes(facts):
    for case, fact in facts["samples"].items():
        assert len(fact["opcheck"]) >= 4 and set(fact["opcheck"].values()) == {"SUCCESS"}, case


def test_every_operator_has_an_error(facts):
    refused = {facts["samples"][case]["operator"].partition(".")[0] for case in ERRORS}
    assert refused == {name.partition(".")[0] for name in SCHEMAS}


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_argument_is_a_runtime_error_that_names_it(facts, case):
    assert facts["errors"][case].startswith(f"RuntimeError: {ERRORS[case][2]}: ")


@pytest.mark.parametrize("case", ["gemm_4bit", "gemm_4bit, double quantization", "gemv_4bit"])
def test_gemm_4bit_alone_has_a_gradient(facts, case):
    assert facts["gradients"][case]


def test_an_update_is_bounded_relative_to_the_norm_that_is_given(facts):
    """The update is 1 in each of 100 entries: its norm is 10, its bound max_unorm = 0.1 of the norm given, lr 0.01."""
    moved = facts["param_norm"]
    assert moved["0.0"] == 0.0
    assert moved["1.0"] == pytest.approx(1e-4, rel=1e-3) and moved["10.0"] == pytest.approx(1e-3, rel=1e-4)
    assert moved["10000.0"] == pytest.approx(1e-2, rel=1e-4)


def test_operators_are_compiled_into_one_graph(facts):
    assert facts["compiled"]


if __name__ == "__main__":
    print(json.dumps(_facts()))
