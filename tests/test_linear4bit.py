"""Linear4bit and its parameter: float64's results within the bound of docs/SPEC.md section 3, and the quant state."""

from __future__ import annotations

import copy
import re
import threading

import numpy as np
import pytest
import torch
from torch import nn

from bnb_core import functional as F
from bnb_core import matmul_4bit
from bnb_core.conformance import oracle
from bnb_core.conformance.compare import ROUNDOFF, matmul_bound, same_bits, within
from bnb_core.nn import EmbeddingNF4, Linear4bit, LinearFP4, LinearNF4, Params4bit
from bnb_core.nn.linear4bit import fix_4bit_weight_quant_state_from_module

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# in and out features: even, rows that share blocks, an odd number of elements, less than a block, wide, one output
SHAPES = [(64, 48), (96, 40), (33, 7), (5, 3), (1024, 6), (64, 1)]


def _f64(tensor):
    return tensor.detach().double().numpy()


def _weight(module):
    """The exact values that the codes stand for, in f32."""
    out = torch.empty(module.out_features, module.in_features)
    return _f64(F.dequantize_4bit(module.weight.data, module.weight.quant_state, out=out))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", SHAPES, ids=str)
def test_result_and_gradients_are_within_the_bound(backend, features, dtype, nested):
    K, N = features
    module = LinearNF4(K, N, compress_statistics=nested).to("cpu")
    module.bias.data = torch.randn(N).to(dtype)
    x = torch.randn(6, K).to(dtype).requires_grad_()
    g = torch.randn(6, N).to(dtype)
    module(x).backward(g)
    w, a, dy, bias = _weight(module), _f64(x), _f64(g), _f64(module.bias)
    expected = a @ w.T + bias
    bound = matmul_bound(dtype, K, np.abs(a) @ np.abs(w).T + np.abs(bias), expected)
    with torch.no_grad():
        y = module(x)
    assert y.dtype == dtype
    within("y", _f64(y), expected, bound)
    # torch's own matmul rounds the weight to the dtype once, and the result once.
    magnitude = np.abs(dy) @ np.abs(w)
    bound = (2 * ROUNDOFF[dtype] + 2.0**-22 * np.sqrt(N)) * magnitude + 1e-7
    within("x.grad", _f64(x.grad), dy @ w, bound)
    bound = (N + 6) * ROUNDOFF[dtype] * np.abs(dy).sum(0) + 1e-7
    within("bias.grad", _f64(module.bias.grad), dy.sum(0), bound)


LAYOUTS = {
    "transposed": lambda: torch.randn(64, 6).t(),
    "every other column": lambda: torch.randn(6, 128)[:, ::2],
    "one row for all": lambda: torch.randn(1, 64).expand(6, 64),
    "permuted": lambda: torch.randn(64, 2, 3).permute(1, 2, 0),
    "unaligned": lambda: torch.randn(6 * 64 + 1)[1:].view(6, 64),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_of_the_input_does_not_matter(backend, make):
    module, x = LinearFP4(64, 48).to("cpu"), make()
    twins = [t.requires_grad_() for t in (x.detach(), x.contiguous().detach().clone())]
    results = [module(t) for t in twins]
    same_bits("y", results[0].detach(), results[1].detach())
    for y in results:
        y.backward(torch.ones(()).expand_as(y))
    same_bits("gradient", twins[0].grad.contiguous(), twins[1].grad)


@pytest.mark.parametrize("first", DTYPES, ids=str)
def test_first_input_that_f16_does_not_decide_sets_the_compute_dtype(first):
    module = LinearNF4(64, 48).to("cpu")
    module(torch.randn(2, 64).to(first))
    assert module.compute_dtype == (None if first == torch.float16 else first)
    assert module.compute_type_is_set == (first != torch.float16)


def test_compute_dtype_that_is_given_is_not_taken_from_an_input():
    module = LinearNF4(64, 48, compute_dtype=torch.float16)
    assert module.compute_type_is_set
    module.set_compute_type(torch.randn(2, 64))
    assert module.compute_dtype == torch.float16


@pytest.mark.parametrize(
    "compute, dtype, rows, expected",
    [
        (torch.float32, torch.bfloat16, 1, "its compute_dtype torch.float32. The input's own is faster for inference."),
        (None, torch.float16, 2, "values above 65504 overflow.*for inference or training."),
        (torch.float32, torch.float32, 2, None),
        (torch.bfloat16, torch.float16, 2, None),
        (None, torch.bfloat16, 2, None),
    ],
)
def test_a_dtype_that_is_slow_or_overflows_is_logged_once(caplog, compute, dtype, rows, expected):
    module = LinearNF4(64, 8, compute_dtype=compute).to("cpu")
    for _ in range(2):
        module(torch.randn(rows, 64).to(dtype))
    assert len(caplog.messages) == (0 if expected is None else 1)
    assert expected is None or re.search(expected, caplog.messages[0])


def test_an_embedding_whose_rows_share_blocks_says_that_it_is_slow(caplog):
    EmbeddingNF4(8, 128)
    assert not caplog.messages
    EmbeddingNF4(8, 65)
    assert "embedding_dim 65 is no multiple of the block size 64" in caplog.messages[0]


@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_the_inputs_dtype_whatever_is_computed_in(dtype, compute):
    module = LinearNF4(64, 48, compute_dtype=compute).to("cpu")
    x = torch.randn(4, 64).to(dtype)
    y = module(x)
    assert y.dtype == dtype and module.compute_dtype == compute
    expected = F.gemm_4bit(x.to(compute), module.weight.data, module.quant_state, module.bias.to(compute))
    same_bits("y", y, expected.to(dtype))


def test_gradient_can_be_differentiated_again():
    module = LinearNF4(64, 48).to("cpu")
    weight = torch.from_numpy(_weight(module)).float()
    x = torch.randn(3, 64, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    expected = (torch.ones(3, 64) @ weight.t() @ weight) * 2
    torch.testing.assert_close(ddx, expected, rtol=1e-4, atol=1e-3)


def test_codes_are_not_converted_as_if_they_were_values():
    for storage in (torch.uint8, torch.float16, torch.bfloat16, torch.float32):
        weight = LinearNF4(64, 48, quant_storage=storage).to("cpu").weight
        for convert in ("half", "float", "double", "bfloat16", "int", "long"):
            assert getattr(weight, convert)().dtype == storage
        assert weight.type(torch.float64).dtype == storage and weight.to(torch.float64).dtype == storage
        assert weight.type() == torch.empty(0, dtype=storage).type()
        assert torch.ones(2, dtype=torch.int64).type_as(weight).dtype == storage


def test_values_may_be_assigned_before_the_layer_is_quantized():
    source = nn.Linear(64, 48)
    expected = F.quantize_4bit(source.weight.data, quant_type="nf4", compress_statistics=True)[0]
    for device in ("cpu", "meta"):
        with torch.device(device):
            module = LinearNF4(64, 48)
        module.load_state_dict(source.state_dict(), assign=True)
        assert type(module.weight) is Params4bit and not module.weight.bnb_quantized
        same_bits("weight", module.to("cpu").weight.data, expected)
        assert module.quant_state is module.weight.quant_state


def test_not_a_number_and_infinity_survive_a_checkpoint():
    module, fresh = LinearNF4(64, 48), LinearNF4(64, 48)
    with torch.no_grad():
        module.weight[0, 3], module.weight[40, 1] = float("nan"), float("inf")
    state = module.to("cpu").state_dict()
    fresh.load_state_dict(state)
    for key, value in fresh.state_dict().items():
        same_bits(key, value, state[key])


def test_threads_share_one_layer():
    module = LinearNF4(256, 128).to("cpu")
    inputs = [torch.randn(rows, 256) for rows in (1, 2, 7, 40)]
    expected, got = [module(x).detach() for x in inputs], [[] for _ in inputs]

    def work(i):
        for _ in range(20):
            got[i].append(module(inputs[i]).detach())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, wanted in zip(got, expected, strict=True):
        assert len(results) == 20 and all(torch.equal(result, wanted) for result in results)


def test_unnested_by_hand_means_the_same_and_is_saved_so():
    """As vLLM does it: the state's attributes are assigned."""
    module = LinearNF4(64, 48).to("cpu")
    x, other = torch.randn(3, 64), LinearNF4(64, 48)
    expected = module(x).detach()
    state = module.quant_state
    state.absmax, state.nested = F.dequantize_absmax(state), False
    same_bits("y", module(x).detach(), expected)
    assert not any("nested" in key for key in module.state_dict())
    other.load_state_dict(module.state_dict())
    same_bits("y", other(x).detach(), expected)


@pytest.mark.parametrize("build", [lambda: LinearNF4(64, 48), lambda: EmbeddingNF4(48, 64)], ids=["linear", "embed"])
@pytest.mark.parametrize("plain", [False, True], ids=["attributes", "class"])
def test_weight_that_lost_its_quant_state_gets_it_back(build, plain):
    module = build().to("cpu")
    state, packed = module.quant_state, module.weight.data
    before = dict(module.weight.__dict__)
    if plain:
        module.weight = nn.Parameter(packed, requires_grad=False)
    else:
        module.weight.quant_state, module.weight.bnb_quantized = None, False
    fix_4bit_weight_quant_state_from_module(module)
    assert module.weight.quant_state is state and module.weight.data_ptr() == packed.data_ptr()
    assert isinstance(module.weight, Params4bit) and module.weight.__dict__ == before


@pytest.mark.parametrize("weight", [torch.zeros(1, 1536), torch.zeros(12, 1)], ids=["a row", "too short"])
def test_weight_that_a_quant_state_does_not_fit_is_refused(weight):
    module = LinearNF4(64, 48).to("cpu")
    module.weight = nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^weight: "):
        fix_4bit_weight_quant_state_from_module(module)


def test_without_any_quant_state_there_is_a_warning():
    module = LinearNF4(64, 48)
    with pytest.warns(UserWarning, match="not quantized yet"):
        fix_4bit_weight_quant_state_from_module(module)
    assert module.weight.quant_state is None


def test_copies_of_a_layer_have_their_own_module_state_and_memory():
    module = Linear4bit(64, 48).to("cpu")
    copied = copy.deepcopy(module)
    assert copied.weight.module is copied and copied.quant_state is copied.weight.quant_state
    assert copied.quant_state is not module.quant_state and copied.quant_state == module.quant_state
    copied.weight.data.zero_()
    copied.quant_state.absmax.zero_()
    assert module.weight.data.any() and module.quant_state.absmax.any()


def test_one_row_weight_is_not_taken_for_a_transposed_one(backend):
    for K in (1, 2, 64):
        module = Linear4bit(K, 1, quant_type="nf4").to("cpu")
        x = torch.randn(3, K)
        dense = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert dense.shape == (1, K)
        torch.testing.assert_close(module(x), x @ dense.t() + module.bias)


def test_a_layer_quantizes_once_and_anew_when_asked():
    module = LinearNF4(64, 48).to("cpu")
    packed = module.weight.data.clone()
    same_bits("weight", module.to("cpu").weight.data, packed)
    module.weight.data = torch.randn(48, 64)
    module.weight.bnb_quantized = False
    module.to("cpu")
    assert module.weight.bnb_quantized and not torch.equal(module.weight.data, packed)
    assert module.quant_state is module.weight.quant_state


def test_meta_moves_do_not_quantize():
    with torch.device("meta"):
        module = LinearNF4(64, 48)
    assert module.to("meta").weight.quant_state is None
    weight = Params4bit(torch.randn(48, 64), requires_grad=False, **module.weight.__dict__).to("cpu")
    module.weight, module.bias = weight, nn.Parameter(torch.zeros(48))
    assert weight.bnb_quantized and module(torch.randn(2, 64)).shape == (2, 48)


def test_prequantized_parameters_are_built_from_checkpoint_entries():
    module = LinearNF4(64, 48).to("cpu")
    entries = {f"weight.{key}": value for key, value in module.weight.quant_state.as_dict(packed=True).items()}
    weight = Params4bit.from_prequantized(module.weight.data, entries, device="cpu", unknown="ignored")
    assert weight.quant_state == module.weight.quant_state and weight.compress_statistics
    with pytest.raises(ValueError, match="data"):
        Params4bit.from_prequantized(module.weight.data[:-1], entries, device="cpu")


def test_parameter_attributes_read_through_to_the_quant_state():
    weight = LinearNF4(64, 48).to("cpu").weight
    state = weight.quant_state
    assert weight.absmax is state.absmax and weight.quant_map is state.code and weight.code is state.code
    assert weight.state2 is state.state2 and weight.offset is state.offset and weight.nested_offset is state.offset
    assert weight.nested_absmax is state.state2.absmax and weight.nested_blocksize == 256
    assert weight.nested_quant_map is state.state2.code and weight.nested_dtype == torch.float32
    with pytest.raises(AttributeError, match="not quantized"):
        _ = Params4bit(torch.randn(2, 2)).absmax


def test_splits_keep_the_parameter_class_and_its_state():
    weight = LinearNF4(64, 48).to("cpu").weight
    for parts in (torch.chunk(weight, 2), torch.split(weight, 768), weight.chunk(2), weight.split(768)):
        assert len(parts) == 2
        assert all(type(part) is Params4bit and part.quant_state is weight.quant_state for part in parts)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double-quantized"])
def test_the_untransposed_product_and_its_gradient(backend, nested):
    """Deprecated: for A of N columns, where N and K differ, ``A @ W``."""
    torch.manual_seed(0)
    packed, state = F.quantize_nf4(torch.randn(20, 33), compress_statistics=nested)
    scales = state.absmax.numpy()
    if nested:
        parts = (state.state2.absmax, state.state2.code, state.offset)
        scales = oracle.double_quantized_scales(scales, state.state2.blocksize, *(part.numpy() for part in parts))
    weight = oracle.dequantize_4bit(packed.view(-1).numpy(), scales, 20 * 33, 64, "nf4").reshape(20, 33)
    A, dY, bias = torch.randn(5, 20, requires_grad=True), torch.randn(5, 33), torch.randn(33)
    with pytest.warns(DeprecationWarning, match="Re-quantize"):
        result = matmul_4bit(A, packed.t(), state, bias=bias)
    result.backward(dY)
    expected = A.detach().double().numpy() @ weight + bias.double().numpy()
    torch.testing.assert_close(result.detach().double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    gradient = dY.double().numpy() @ weight.T
    torch.testing.assert_close(A.grad.double(), torch.from_numpy(gradient), rtol=1e-5, atol=1e-5)
    dY.requires_grad_()
    with pytest.warns(DeprecationWarning):
        (dA,) = torch.autograd.grad(matmul_4bit(A, packed.t(), state), A, dY, create_graph=True)
    (second,) = torch.autograd.grad(dA, dY, A.detach())
    torch.testing.assert_close(
        second.double(), torch.from_numpy(A.detach().double().numpy() @ weight), rtol=1e-5, atol=1e-5
    )
    with torch.no_grad(), pytest.warns(DeprecationWarning):
        same_bits("without gradients", matmul_4bit(A, packed.t(), state, bias=bias), result.detach())
