"""The functions of the API: their signatures, their outputs, what they refuse."""

from __future__ import annotations

import inspect

import pytest
import torch

import bnb_core
from bnb_core import functional as F
from bnb_core.conformance.compare import same_bits
from bnb_core.functional import QuantState

# What callers code against: argument names, order and defaults.
SIGNATURES = {
    bnb_core.matmul: "A, B, out=None, state=None, threshold=0.0, bias=None",
    bnb_core.matmul_4bit: "A, B, quant_state, out=None, bias=None",
    F.quantize_4bit: "A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_type='fp4', "
    "quant_storage=torch.uint8",
    F.dequantize_4bit: "A, quant_state=None, absmax=None, out=None, blocksize=None, quant_type='fp4'",
    F.quantize_nf4: "A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8",
    F.quantize_fp4: "A, absmax=None, out=None, blocksize=None, compress_statistics=False, quant_storage=torch.uint8",
    F.dequantize_nf4: "A, quant_state=None, absmax=None, out=None, blocksize=None",
    F.dequantize_fp4: "A, quant_state=None, absmax=None, out=None, blocksize=None",
    F.quantize_blockwise: "A, code=None, absmax=None, out=None, blocksize=4096, nested=False",
    F.dequantize_blockwise: "A, quant_state=None, absmax=None, code=None, out=None, blocksize=4096, nested=False",
    F.gemv_4bit: "A, B, out=None, transposed_A=False, transposed_B=False, state=None",
    F.int8_vectorwise_quant: "A, threshold=0.0",
    F.int8_vectorwise_dequant: "A, stats",
    F.int8_double_quant: "A, col_stats=None, row_stats=None, out_col=None, out_row=None, threshold=0.0",
    F.int8_linear_matmul: "A, B, out=None, dtype=torch.int32",
    F.int8_mm_dequant: "A, row_stats, col_stats, out=None, bias=None",
    F.igemm: "A, B, out=None, transposed_A=False, transposed_B=False",
    F.batched_igemm: "A, B, out=None, transposed_A=False, transposed_B=False",
    F.optimizer_update_32bit: "optimizer_name, g, p, state1, beta1, eps, step, lr, state2=None, beta2=0.0, beta3=0.0, "
    "alpha=0.0, weight_decay=0.0, gnorm_scale=1.0, unorm_vec=None, max_unorm=0.0, skip_zeros=False",
    F.optimizer_update_8bit_blockwise: "optimizer_name, g, p, state1, state2, beta1, beta2, beta3, alpha, eps, step, "
    "lr, qmap1, qmap2, absmax1, absmax2, weight_decay=0.0, gnorm_scale=1.0, skip_zeros=False",
    F.create_linear_map: "signed=True, total_bits=8, add_zero=True",
    F.create_normal_map: "offset=0.9677083, use_extra_value=True",
    F.create_fp8_map: "signed=True, exponent_bits=5, precision_bits=2, total_bits=8",
    F.create_dynamic_map: "signed=True, max_exponent_bits=7, total_bits=8",
    F.get_4bit_type: "typename, device=None, blocksize=64",
    F.prefetch_tensor: "A, to_cpu=False",
    QuantState: "absmax, shape=None, code=None, blocksize=None, quant_type=None, dtype=None, offset=None, state2=None",
    bnb_core.nn.Linear4bit: "input_features, output_features, bias=True, compute_dtype=None, compress_statistics=True, "
    "quant_type='fp4', quant_storage=torch.uint8, device=None",
    bnb_core.nn.Linear8bitLt: "input_features, output_features, bias=True, has_fp16_weights=True, threshold=0.0, "
    "index=None, device=None",
    bnb_core.utils.replace_linear: "model, linear_replacement, skip_modules=('lm_head',), copy_weights=False, "
    "post_processing_function=None",
}


def _as_text(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in positional)


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signature_is_the_ecosystems(function):
    assert _as_text(function) == SIGNATURES[function]


@pytest.mark.parametrize("typename", ["nf4", "fp4", "int4", "af4"])
def test_4bit_codebooks_are_fresh_each_time(typename):
    first = F.get_4bit_type(typename)
    first.zero_()
    assert F.get_4bit_type(typename).any()


def test_int4_runs_from_7_down_to_minus_7():
    steps = [7, 6, 5, 4, 3, 2, 1, 0, -0, -1, -2, -3, -4, -5, -6, -7]
    torch.testing.assert_close(F.get_4bit_type("int4"), torch.tensor(steps) / 7)


def test_af4_takes_no_other_block_size():
    with pytest.raises(ValueError, match="blocksize"):
        F.get_4bit_type("af4", blocksize=128)


@pytest.mark.parametrize(
    "arguments, positive",
    [
        ((True, 3, 3), [0.325, 0.775, 0.055]),  # no bits are left for the lowest decade
        ((True, 2, 3), [0.325, 0.775, 0.055]),
        ((True, 1, 3), [0.325, 0.775, 0.55]),  # the code that one exponent leaves over cuts its decade again
    ],
    ids=str,
)
def test_dynamic_maps_spend_their_bits_on_exponents_first(arguments, positive):
    expected = sorted([*positive, *(-value for value in positive), 0.0, 1.0])
    torch.testing.assert_close(F.create_dynamic_map(*arguments).unique(), torch.tensor(expected))


@pytest.mark.parametrize("create", [F.create_dynamic_map, F.create_linear_map, F.create_fp8_map])
@pytest.mark.parametrize("bits", [0, 9, 2**31])
def test_maps_of_more_than_eight_bits_are_refused(create, bits):
    with pytest.raises(ValueError, match="total_bits"):
        create(total_bits=bits)


def test_quant_state_answers_to_the_end_of_its_packed_key():
    state = F.quantize_4bit(torch.randn(4, 64), quant_type="nf4")[1]
    assert torch.equal(state.bitsandbytes__nf4, state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"])
    for name in ("bitsandbytes__fp4", "bitsandbytes__None", "nested_absmax"):
        assert not hasattr(state, name)
    assert not hasattr(F.quantize_blockwise(torch.randn(64))[1], "bitsandbytes__None")


def test_quant_state_has_the_old_list_form():
    _, state = F.quantize_4bit(torch.randn(64, 64), compress_statistics=True)
    assert state[0] is state.absmax and state[1] == (64, 64) and state[2] == torch.float32 and state[3] == 64
    assert state[4][0] is state.offset and state[4][1] is state.state2 and state[5] == "fp4"
    assert F.quantize_4bit(torch.randn(64))[1][4] is None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_quant_state_survives_its_dict(packed, nested):
    _, state = F.quantize_4bit(torch.randn(64, 64), compress_statistics=nested, quant_type="nf4")
    entries = {f"model.layer.weight.{key}": value for key, value in state.as_dict(packed=packed).items()}
    assert QuantState.from_dict(entries, "cpu") == state


def test_quant_states_of_different_tensors_are_not_equal():
    a, b = (F.quantize_4bit(torch.randn(64, 64))[1] for _ in range(2))
    assert a == a and a != b and a != "something else"


def test_double_quantization_can_be_undone_in_place():
    packed, state = F.quantize_4bit(torch.randn(64, 64), compress_statistics=True, quant_type="nf4")
    expected = F.dequantize_4bit(packed, state)
    state.absmax = F.dequantize_absmax(state)
    state.nested, state.state2, state.offset = False, None, None
    same_bits("values", F.dequantize_4bit(packed, state), expected)
    x = torch.randn(1, 64)
    torch.testing.assert_close(F.gemv_4bit(x, packed, state=state), x @ expected.t())


def test_nested_blockwise_quantization_comes_back(backend):
    A = torch.randn(100, 100)
    codes, state = F.quantize_blockwise(A, blocksize=64, nested=True)
    assert state.nested
    torch.testing.assert_close(F.dequantize_blockwise(codes, state), A, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("transposed_A", [False, True])
@pytest.mark.parametrize("transposed_B", [False, True])
def test_igemm_is_exact(backend, transposed_A, transposed_B):
    A, B = (torch.randint(-128, 128, size, dtype=torch.int8) for size in ((3, 5, 7), (3, 7, 4)))
    expected = (A.long() @ B.long()).to(torch.int32)
    a, b = (A.mT if transposed_A else A), (B.mT if transposed_B else B)
    flags = {"transposed_A": transposed_A, "transposed_B": transposed_B}
    same_bits("batched", F.batched_igemm(a, b, **flags), expected)
    out = torch.empty(5, 4, dtype=torch.int32)
    assert F.igemm(a[0], b[0], out, **flags) is out
    same_bits("one", out, expected[0])


def test_int8_results_land_in_given_tensors(backend):
    A = torch.randn(6, 40)
    q_row, q_col, row_stats, col_stats, columns = F.int8_double_quant(A, threshold=2.0)
    given = [torch.empty_like(t) for t in (col_stats, row_stats, q_col, q_row)]
    F.int8_double_quant(A, *given, threshold=2.0)
    for tensor, expected in zip(given, (col_stats, row_stats, q_col, q_row), strict=True):
        same_bits("given", tensor, expected)
    same_bits("columns", columns, (A.abs() >= 2).any(0).nonzero().view(-1))
    assert F.int8_vectorwise_quant(A)[2] is None


def test_int8_dequant_takes_the_outputs_dtype(backend):
    C, rows, columns = torch.randint(-9, 9, (3, 4), dtype=torch.int32), torch.ones(3), torch.ones(4)
    assert F.int8_mm_dequant(C, rows, columns).dtype == torch.float16
    bias = torch.zeros(4, dtype=torch.bfloat16)
    assert F.int8_mm_dequant(C, rows, columns, bias=bias).dtype == torch.bfloat16
    out = torch.empty(3, 4)
    assert F.int8_mm_dequant(C, rows, columns, out=out) is out
    torch.testing.assert_close(out, C / 16129)


REFUSED = {
    "one output is an input": lambda: F.dequantize_4bit(*_packed(), out=_packed()[0]),
    "gemv of two rows": lambda: F.gemv_4bit(torch.ones(2, 64), _packed()[0], state=_packed()[1]),
    "gemv without a state": lambda: F.gemv_4bit(torch.ones(1, 64), _packed()[0]),
    "gemv transposed": lambda: F.gemv_4bit(torch.ones(1, 64), _packed()[0], transposed_B=True, state=_packed()[1]),
    "dequantize without scales": lambda: F.dequantize_4bit(_packed()[0]),
    "blockwise without scales": lambda: F.dequantize_blockwise(torch.zeros(3, dtype=torch.uint8)),
    "int8 matmul in floats": lambda: F.int8_linear_matmul(_codes(), _codes(), dtype=torch.float32),
    "batches that differ": lambda: F.batched_igemm(_codes().view(1, 4, 4), _codes().view(2, 2, 4)),
    "batches of another inner size": lambda: F.batched_igemm(_codes()[None][:0], _codes()[None][:0, :3]),
    "out of another batch": lambda: F.batched_igemm(*[_codes()[None]] * 2, torch.zeros(2, 4, 4, dtype=torch.int32)),
    "not a state": lambda: bnb_core.matmul_4bit(torch.ones(1, 64), _packed()[0].t(), None),
    "int8 weight without scales": lambda: _matmul_without_scales(),
    "not paged": lambda: F.prefetch_tensor(torch.ones(3)),
    "on a CPU": lambda: F.is_on_gpu([torch.ones(3)]),
}


def _packed():
    return F.quantize_4bit(torch.ones(32, 64))


def _codes():
    return torch.zeros(4, 4, dtype=torch.int8)


def _matmul_without_scales():
    state = bnb_core.MatmulLtState()
    state.has_fp16_weights = False
    return bnb_core.matmul(torch.ones(1, 4), _codes(), state=state)


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused(call):
    with pytest.raises((TypeError, ValueError), match=r"^[\w.]+: "):
        call()


def test_out_must_not_be_an_input():
    codes = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match="shares its memory with A"):
        F.quantize_blockwise(codes.view(torch.float32), out=codes[:16], blocksize=64)


def _outputs():
    """One call of each function that takes ``out``: what it gives into nothing, and into a given tensor."""
    A, code = torch.randn(8, 64), F.create_dynamic_map()
    packed, state = F.quantize_nf4(A)
    codes, blockwise = F.quantize_blockwise(A, code, blocksize=64)
    q, rows, _ = F.int8_vectorwise_quant(A)
    i32 = F.int8_linear_matmul(q, q)
    return {
        "quantize_4bit": lambda out: F.quantize_4bit(A, out=out)[0],
        "dequantize_4bit": lambda out: F.dequantize_4bit(packed, state, out=out),
        "quantize_blockwise": lambda out: F.quantize_blockwise(A, out=out, blocksize=64)[0],
        "dequantize_blockwise": lambda out: F.dequantize_blockwise(codes, blockwise, out=out),
        "gemv_4bit": lambda out: F.gemv_4bit(A[:1], packed, out=out, state=state),
        "int8_linear_matmul": lambda out: F.int8_linear_matmul(q, q, out=out),
        "int8_mm_dequant": lambda out: F.int8_mm_dequant(i32, rows, rows, out=out),
        "igemm": lambda out: F.igemm(q, q, out=out, transposed_B=True),
        "batched_igemm": lambda out: F.batched_igemm(q[None], q[None], out=out, transposed_B=True),
        "matmul_4bit": lambda out: bnb_core.matmul_4bit(A, packed.t(), state, out=out),
        "matmul": lambda out: bnb_core.matmul(A, A, out=out),
    }


OUTPUTS = list(_outputs())
functions_with_out = pytest.mark.parametrize("name", OUTPUTS)


@functions_with_out
def test_out_is_filled_and_returned_whatever_its_strides(backend, name):
    call = _outputs()[name]
    expected = call(None)
    strided = torch.zeros(*expected.shape, 3, dtype=expected.dtype)[..., 1]
    for out in (torch.zeros_like(expected), strided):
        assert call(out) is out
        same_bits(name, out, expected)


@functions_with_out
@pytest.mark.parametrize("wrong", ["shape", "dtype", "device", "type"])
def test_an_out_that_does_not_fit_is_refused_by_name(name, wrong):
    call = _outputs()[name]
    good = torch.zeros_like(call(None))
    out = {
        "shape": lambda: good[..., None],
        "dtype": lambda: good.to(torch.int64),
        "device": lambda: good.to("meta"),
        "type": lambda: good.tolist(),
    }[wrong]()
    with pytest.raises((TypeError, ValueError), match=r"^(out|dtype): "):
        call(out)


def test_outputs_must_not_overlap_one_another():
    memory = torch.zeros(256, dtype=torch.uint8)
    with pytest.raises(ValueError, match="out"):
        F.quantize_blockwise(torch.randn(256), out=memory, absmax=memory[:16].view(torch.float32), blocksize=64)


def test_out_may_lie_beside_an_input_in_one_storage():
    memory = torch.zeros(512, dtype=torch.uint8)
    codes, out = memory[:64], memory[256:].view(torch.float32)
    codes.copy_(torch.arange(64))
    expected = F.dequantize_blockwise(codes.clone(), absmax=torch.ones(1), blocksize=64)
    same_bits("out", F.dequantize_blockwise(codes, absmax=torch.ones(1), out=out, blocksize=64), expected)


def test_matmul_into_out_needs_no_gradient():
    packed, state = _packed()
    x, out = torch.ones(3, 64, requires_grad=True), torch.empty(3, 32)
    with pytest.raises(ValueError, match="out"):
        bnb_core.matmul_4bit(x, packed.t(), state, out=out)
    with torch.no_grad():
        assert bnb_core.matmul_4bit(x, packed.t(), state, out=out) is out
    torch.testing.assert_close(out, bnb_core.matmul_4bit(x.detach(), packed.t(), state))


def test_top_level_names():
    assert bnb_core.features == {"multi_backend"} and "cpu" in bnb_core.supported_torch_devices
    assert set(bnb_core.utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.values()) == {0, 1, 2, 3}
