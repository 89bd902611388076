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

from bnb_core import functional as F
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Linear8bitLt,
    LinearFP4,
    LinearNF4,
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
@pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 3), (2, 1, 3), (2, 0)], ids=str)
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


@layers
def test_an_unquantized_layer_says_what_to_do(build):
    with pytest.raises(RuntimeError, match="move the layer to a device"):
        build()(torch.randn(2, 64))


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


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("out_features", [0, 5])
@pytest.mark.parametrize("build", [LinearNF4, Linear8bitLt, partial(Linear8bitLt, has_fp16_weights=False)])
def test_gradients_have_the_shapes_of_what_they_are_of(build, out_features, batch):
    layer = build(8, out_features).to("cpu")
    A = torch.randn(*batch, 8, requires_grad=True)
    layer(A).sum().backward()
    trained = [A, layer.bias, *([layer.weight] if layer.weight.requires_grad else [])]
    assert [tensor.grad.shape for tensor in trained] == [tensor.shape for tensor in trained]


class _Fetching(dict):
    """Parameters that are elsewhere until they are asked for, one by one, as DeepSpeed's ZeRO-3 has them."""

    def __getitem__(self, name):
        return super().__getitem__(name)()


@layers
def test_a_layer_asks_for_its_parameters_one_by_one(build):
    module = build().to("cpu")
    x = torch.randn(3, 64)
    expected = module(x)
    parameters = dict(module._parameters)
    module._parameters = _Fetching({name: lambda value=value: value for name, value in parameters.items()})
    same_bits("the output", module(x), expected)


@layers
def test_a_layer_takes_attributes_in_the_places_of_its_parameters(build):
    """As FSDP1 and DataParallel put them there."""
    module = build().to("cpu")
    x = torch.randn(3, 64)
    expected = module(x)
    for name in ("weight", "bias"):
        module.__dict__[name] = module._parameters.pop(name)
    same_bits("the output", module(x), expected)
