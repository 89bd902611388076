"""functional.lib: the C symbols compute what the Python functions do."""

from __future__ import annotations

import ctypes

import pytest
import torch

import bnb_core
from bnb_core import functional
from bnb_core.compat.c_library import DTYPES, SIGNATURES
from bnb_core.functional import get_ptr

SHAPES = [(3, 64), (5, 96), (16, 128), (40, 192), (33, 160)]


@pytest.fixture(params=["cpu", "cuda-sim", "hip-sim", "cuda", "hip"])
def lib(request):
    """The symbols of each compiled backend, on whose device the tensors of the test are."""
    backend = bnb_core.backends()[request.param]
    if not backend.available:
        pytest.skip(f"{backend.name}: {backend.unavailable}")
    with bnb_core.use_backend(backend.name), torch.device(backend.device_types[0]):
        yield functional.lib


@pytest.mark.parametrize("dtype", DTYPES)
def test_blockwise_codes_are_dequantized(lib, dtype):
    A = torch.randn(1000)
    q, state = functional.quantize_blockwise(A, blocksize=256)
    out = torch.empty(A.shape, dtype=DTYPES[dtype])
    symbol = getattr(lib, f"cdequantize_blockwise_{dtype}")
    symbol(get_ptr(state.code), get_ptr(q), get_ptr(state.absmax), get_ptr(out), 256, out.numel(), None)
    expected = functional.dequantize_blockwise(q, absmax=state.absmax, code=state.code, out=out.clone(), blocksize=256)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_4bit_codes_are_dequantized(lib, dtype, quant_type, shape):
    packed, state = functional.quantize_4bit(torch.randn(shape, dtype=DTYPES[dtype]), quant_type=quant_type)
    out = torch.empty(shape, dtype=DTYPES[dtype])
    symbol = getattr(lib, f"cdequantize_blockwise_{dtype}_{quant_type}")
    symbol(
        None, get_ptr(packed), get_ptr(state.absmax), get_ptr(out), ctypes.c_int(64), ctypes.c_int(out.numel()), None
    )
    assert torch.equal(out, functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_row_is_multiplied(lib, dtype, quant_type, shape):
    N, K = shape
    packed, state = functional.quantize_4bit(torch.randn(shape, dtype=DTYPES[dtype]), quant_type=quant_type)
    A = torch.randn(1, K, dtype=DTYPES[dtype])
    out = torch.empty(1, N, dtype=DTYPES[dtype])
    symbol = getattr(lib, f"cgemm_4bit_inference_naive_{dtype}")
    pointers = [get_ptr(tensor) for tensor in (A, packed, state.absmax, state.code, out)]
    symbol(N, 1, K, *pointers, N, (K + 1) // 2, N, ctypes.c_int32(64), ctypes.c_void_p(0))
    assert torch.equal(out, functional.gemv_4bit(A, packed.t(), state=state))


def test_double_quantized_weights_are_dequantized_as_unsloth_does(lib):
    """The scales first, into f32; the offset added; then the weight."""
    weight = torch.randn(64, 512, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    scales = torch.empty(state.absmax.shape)
    pointers = [get_ptr(tensor) for tensor in (state.state2.code, state.absmax, state.state2.absmax, scales)]
    lib.cdequantize_blockwise_fp32(*pointers, state.state2.blocksize, scales.numel(), None)
    scales += state.offset
    out = torch.empty_like(weight)
    lib.cdequantize_blockwise_bf16_nf4(
        None, get_ptr(packed), get_ptr(scales), get_ptr(out), state.blocksize, out.numel(), None
    )
    assert torch.equal(out, functional.dequantize_4bit(packed, state))


def test_the_symbols_are_ctypes_functions_that_check_their_arguments(lib):
    for name in SIGNATURES:
        symbol = getattr(lib, name)
        assert symbol.restype is None and symbol is getattr(lib, name)
        with pytest.raises(ctypes.ArgumentError):
            symbol(*["not a number"] * len(symbol.argtypes))


def test_an_unknown_symbol_is_an_error_that_lists_what_there_is():
    with pytest.raises(AttributeError, match=r"cnothing.*cdequantize_blockwise_fp32"):
        functional.lib.cnothing  # noqa: B018
    assert not hasattr(functional, "library")


def test_without_compiled_kernels_symbols_can_be_looked_up_but_not_called():
    with bnb_core.use_backend("reference"):
        symbol = functional.lib.cdequantize_blockwise_fp32
        with pytest.raises(AttributeError, match="cnothing"):
            functional.lib.cnothing  # noqa: B018
    with pytest.raises(RuntimeError, match=r"^cdequantize_blockwise_fp32: no backend with compiled kernels"):
        symbol(None, None, None, None, 64, 0, None)


def test_no_tensor_has_no_address():
    assert get_ptr(None) is None
    tensor = torch.ones(3)
    assert get_ptr(tensor).value == tensor.data_ptr()
