"""Quantized layers and parameters behave like the torch ones they stand for, through everything torch does to them."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnb_core
from bnb_core import functional as F
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
    Params4bit,
)

LAYERS = {
    "nf4": partial(LinearNF4, 64, 48),
    "fp4, plain scales": partial(LinearFP4, 64, 48, compress_statistics=False),
    **{
        f"nf4 in {str(storage).removeprefix('torch.')}": partial(LinearNF4, 64, 48, quant_storage=storage)
        for storage in (torch.float16, torch.bfloat16, torch.float32)
    },
    "int8": partial(Linear8bitLt, 64, 48, has_fp16_weights=False),
    "int8, outliers": partial(Linear8bitLt, 64, 48, has_fp16_weights=False, threshold=2.0),
}
EMBEDDINGS = {
    "nf4": partial(EmbeddingNF4, 30, 64),
    "fp4, rows share blocks": partial(EmbeddingFP4, 30, 20),
    "int8": partial(Embedding8bit, 30, 24),
}
MODULES = {**{f"linear {k}": v for k, v in LAYERS.items()}, **{f"embedding {k}": v for k, v in EMBEDDINGS.items()}}

layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
modules = pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)


def _input(module, *batch):
    if isinstance(module, nn.Embedding):
        return torch.randint(0, module.num_embeddings, batch or (5,))
    return torch.randn(*(batch or (5,)), module.in_features)


def _bits(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def _assert_same_state(got, expected):
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        same_bits(key, got[key], value)


def _dense(module):
    """An nn.Linear with the dequantized weight."""
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    if isinstance(module, Linear8bitLt):
        weight = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    else:
        weight = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    dense.weight.data = weight
    if module.bias is not None:
        dense.bias.data = module.bias.data.clone()
    return dense


@layers
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_forward_and_gradients_follow_the_dequantized_layer(backend, build, bias, batch):
    module = build(bias=bias).to("cpu")
    dense = _dense(module)
    x = torch.randn(*batch, 64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, expected = module(x), dense(twin)
    assert y.dtype == x.dtype and y.shape == expected.shape
    tolerance = 0.05 if isinstance(module, Linear8bitLt) else 1e-4
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    if bias:
        torch.testing.assert_close(module.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)
    assert module.weight.grad is None


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_goes_in_and_comes_out(backend, build, dtype):
    module = build().to("cpu")
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.dtype == dtype and x.grad.dtype == dtype
    torch.testing.assert_close(y.float(), _dense(module)(x.float()), rtol=0.05, atol=0.06)


def test_training_int8_layer_gives_its_weight_a_gradient(backend):
    module = Linear8bitLt(64, 48)
    x = torch.randn(9, 64, requires_grad=True)
    g = torch.randn(9, 48)
    module(x).backward(g)
    torch.testing.assert_close(module.weight.grad, g.t() @ x.detach())
    torch.testing.assert_close(x.grad, g @ module.weight.detach(), rtol=0.05, atol=0.05)


@layers
def test_autocast_computes_low_and_returns_the_inputs_dtype(build):
    module = build().to("cpu")
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert getattr(module, "compute_dtype", None) is None
    torch.testing.assert_close(y, module(x), rtol=0.05, atol=0.05)


@layers
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(build, reentrant):
    module = build().to("cpu")
    x = torch.randn(4, 64, requires_grad=True)
    plain = torch.autograd.grad(module(x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False).square().sum(), x)[0]
    if reentrant:
        y = x.detach().clone().requires_grad_()
        checkpoint(module, y, use_reentrant=True).square().sum().backward()
        again = y.grad
    same_bits("gradient", again, plain)


@modules
def test_compiled_module_has_no_graph_break_and_the_same_results(backend, build):
    torch._dynamo.reset()
    module = build().to("cpu")
    x = _input(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    if x.is_floating_point():
        twin = x.clone().requires_grad_()
        x.requires_grad_()
        module(x).square().sum().backward()
        compiled(twin).square().sum().backward()
        same_bits("gradient", twin.grad, x.grad)
    same_bits("result", compiled(x).detach(), module(x).detach())


def test_compiled_training_int8_layer_has_no_graph_break():
    torch._dynamo.reset()
    module = Linear8bitLt(64, 48)
    x = torch.randn(3, 64)
    same_bits("result", torch.compile(module, fullgraph=True, backend="aot_eager")(x).detach(), module(x).detach())


@modules
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("fresh", ["unquantized", "quantized", "meta"])
def test_state_dict_restores_a_fresh_module_exactly(build, assign, fresh):
    original = nn.ModuleDict({"inner": nn.Sequential(build())}).to("cpu")
    with torch.device("meta" if fresh == "meta" else "cpu"):
        copied = nn.ModuleDict({"inner": nn.Sequential(build())})
    if fresh == "quantized":
        copied.to("cpu")
    state = _bits(original)
    copied.load_state_dict(state, strict=True, assign=assign or fresh == "meta")
    _assert_same_state(copied.state_dict(), state)
    x = _input(original["inner"][0])
    same_bits("result", copied["inner"][0](x).detach(), original["inner"][0](x).detach())
    original["inner"][0].weight.data.zero_()
    assert not torch.equal(copied.state_dict()["inner.0.weight"].float(), original["inner"][0].weight.data.float())


@modules
def test_full_precision_weights_load_into_a_quantized_module(build):
    module, source = build().to("cpu"), build()
    module.load_state_dict(source.state_dict())
    _assert_same_state(module.state_dict(), source.to("cpu").state_dict())


@modules
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: _through_a_file(module),
    ],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same_and_keep_their_types(build, duplicate):
    module = build().to("cpu")
    copied = duplicate(module)
    assert type(copied.weight) is type(module.weight)
    x = _input(module)
    same_bits("result", copied(x).detach(), module(x).detach())
    parameter = duplicate(module.weight)
    assert type(parameter) is type(module.weight)
    same_bits("data", parameter.data, module.weight.data)


def _through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_deepcopy_shares_no_memory():
    module = LinearNF4(64, 48).to("cpu")
    copied = copy.deepcopy(module)
    copied.weight.data.zero_()
    copied.weight.quant_state.absmax.zero_()
    assert module.weight.data.any() and module.weight.quant_state.absmax.any()
    assert copied.weight.module is copied


@modules
def test_neither_forward_nor_moves_change_what_is_saved(build):
    module = build(bias=False).to("cpu") if "bias" in build.func.__init__.__code__.co_varnames else build().to("cpu")
    before = _bits(module)
    with torch.no_grad():
        module.eval()(_input(module))
    for move in (lambda m: m.to("cpu"), nn.Module.half, nn.Module.float, nn.Module.bfloat16, nn.Module.double):
        move(module)
        _assert_same_state(module.state_dict(), before)
    module.train()
    module.to(torch.float32)(_input(module).requires_grad_(not isinstance(module, nn.Embedding)))
    _assert_same_state(module.state_dict(), before)


def test_a_layer_quantizes_once_and_anew_when_asked():
    module = LinearNF4(64, 48).to("cpu")
    packed = module.weight.data.clone()
    same_bits("weight", module.to("cpu").weight.data, packed)
    module.weight.data = torch.randn(48, 64)
    module.weight.bnb_quantized = False
    module.to("cpu")
    assert module.weight.bnb_quantized and not torch.equal(module.weight.data, packed)
    assert module.quant_state is module.weight.quant_state


@layers
def test_an_unquantized_layer_says_what_to_do(build):
    with pytest.raises(RuntimeError, match="move the layer to a device"):
        build()(torch.randn(2, 64))


def test_meta_moves_do_not_quantize():
    with torch.device("meta"):
        module = LinearNF4(64, 48)
    assert module.to("meta").weight.quant_state is None
    weight = Params4bit(torch.randn(48, 64), requires_grad=False, **module.weight.__dict__).to("cpu")
    module.weight, module.bias = weight, nn.Parameter(torch.zeros(48))
    assert weight.bnb_quantized and module(torch.randn(2, 64)).shape == (2, 48)


def test_parameters_are_rebuilt_from_their_dict():
    """As adapters do, who skip private keys and add keys of their own."""
    for module in (LinearNF4(64, 48).to("cpu"), Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")):
        old = module.weight
        old.hung_by_others = 1
        kwargs = {key: value for key, value in old.__dict__.items() if not key.startswith("_")}
        new = type(old)(old.data, requires_grad=False, **kwargs)
        x = torch.randn(3, 64)
        expected = module(x)
        module.weight = new
        same_bits("result", module(x).detach(), expected.detach())


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


def test_offloading_hooks_may_drop_the_states_scales():
    module = Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")
    x = torch.randn(3, 64)
    expected = module(x)
    module.state.SCB = None
    same_bits("result", module(x).detach(), expected.detach())
    module.state.reset_grads()
    module.weight = Int8Params(torch.randn(48, 64), requires_grad=False, has_fp16_weights=False).to("cpu")
    assert not torch.equal(module(x), expected)


@pytest.mark.parametrize("build", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_embeddings_give_rows_of_the_dequantized_weight(backend, build, dtype):
    module = build(dtype=dtype).to("cpu")
    indices = torch.tensor([[0, 29, 7], [7, 7, 1]])
    if isinstance(module, Embedding4bit):
        weight = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    else:
        weight = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB).to(dtype)
    same_bits("rows", module(indices).detach(), weight[indices])
    assert module(torch.zeros(0, dtype=torch.int64)).shape == (0, module.embedding_dim)
    for bad in (-1, 30):
        with pytest.raises((IndexError, RuntimeError)):
            module(torch.tensor([bad]))


def test_one_row_weight_is_not_taken_for_a_transposed_one(backend):
    for K in (1, 2, 64):
        module = Linear4bit(K, 1, quant_type="nf4").to("cpu")
        x = torch.randn(3, K)
        dense = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert dense.shape == (1, K)
        torch.testing.assert_close(module(x), x @ dense.t() + module.bias)


def test_quantize_model_replaces_linears_and_keeps_shared_ones_shared():
    shared = nn.Linear(64, 64)
    model = nn.ModuleDict(
        {"a": shared, "b": shared, "lm_head": nn.Linear(64, 32), "c": nn.Sequential(nn.Linear(64, 8))}
    )
    head = model["lm_head"].weight
    assert bnb_core.quantize_model(model) is model
    assert model["a"] is model["b"] and isinstance(model["a"], Linear4bit) and isinstance(model["c"][0], Linear4bit)
    assert model["lm_head"].weight is head
    assert model["a"](torch.randn(2, 64)).shape == (2, 64)
