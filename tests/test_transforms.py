"""torch.func over quantized layers: gradients, batches and tangents are those of the layer's own weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from bnb_core import functional as F
from bnb_core.autograd import grouped_linear_4bit
from bnb_core.nn import Linear8bitLt, LinearNF4

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "4-bit": lambda: LinearNF4(64, 48),
    "4-bit without bias": lambda: LinearNF4(64, 48, bias=False),
    "8-bit": lambda: Linear8bitLt(64, 48, has_fp16_weights=False),
    "8-bit with outliers": lambda: Linear8bitLt(64, 48, has_fp16_weights=False, threshold=2.0),
    "8-bit that trains": lambda: Linear8bitLt(64, 48),
}
layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
close = torch.testing.assert_close


def _layer(build: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    """A layer and the values of its weight."""
    module = build().to("cpu")
    if isinstance(module, LinearNF4):
        return module, F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    if module.state.has_fp16_weights:
        return module, F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(module.weight.data)[:2])
    return module, F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)


@layers
def test_gradients_and_tangents_are_products_with_the_weight(build):
    module, weight = _layer(build)
    x, dx, dy = torch.randn(5, 64), torch.randn(5, 64), torch.randn(5, 48)
    y = module(x).detach()
    close(grad(lambda x: (module(x) * dy).sum())(x), dy @ weight)
    value, pullback = vjp(module, x)
    close(value, y)
    close(pullback(dy)[0], dy @ weight)
    value, tangent = jvp(module, (x,), (dx,))
    close(value, y)
    close(tangent, dx @ weight.t())
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(module(forward_ad.make_dual(x, dx))).tangent, dx @ weight.t())
    close(jacrev(module)(x[0]), weight)


@layers
def test_a_batch_computes_what_its_parts_do(build):
    module, weight = _layer(build)
    x, dy = torch.randn(5, 3, 64), torch.randn(3, 48)
    close(vmap(module, in_dims=1, out_dims=1)(x), torch.stack([module(part) for part in x.unbind(1)], 1))
    gradients = vmap(grad(lambda x: (module(x) * dy).sum()))(x)
    close(gradients, (dy @ weight).expand(5, 3, 64))


@pytest.mark.parametrize("build", [LAYERS["4-bit"], LAYERS["8-bit"]], ids=["4-bit", "8-bit"])
def test_biases_have_gradients_batches_and_tangents(build):
    module, _ = _layer(build)
    x, biases = torch.randn(5, 64), torch.randn(7, 48)
    without = module(x).detach() - module.bias.detach()

    def product(bias: Tensor, x: Tensor = x) -> Tensor:
        return functional_call(module, {"bias": bias}, (x,))

    close(vmap(product)(biases), without + biases[:, None])
    close(vmap(product)(biases, x.expand(7, 5, 64)), without + biases[:, None])
    close(grad(lambda bias: product(bias).sum())(biases[0]), torch.full((48,), 5.0))
    close(jvp(product, (biases[0],), (biases[1],))[1], biases[1].expand(5, 48))


@layers
def test_what_a_transform_has_left_behind_is_an_input_like_another(build):
    module, _ = _layer(build)
    x, left = torch.randn(3, 64), []

    def keep(x: Tensor) -> Tensor:
        left.append(x)
        return x.square().sum()

    grad(keep)(x)
    assert left[0].requires_grad
    assert torch.equal(module(left[0]), module(x))


def test_weights_have_no_batches():
    module, _ = _layer(LAYERS["4-bit"])
    x, weights = torch.randn(5, 64), torch.stack([module.weight.data] * 2)
    with pytest.raises(NotImplementedError, match="vmap over quantized weights"):
        vmap(lambda weight: functional_call(module, {"weight": weight}, (x,)))(weights)


@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_groups(transposed):
    """Of three experts, one of which has no row; a batch shares its offsets."""
    N, K = 32, 64
    packed, state = F.quantize_4bit(torch.randn(3, *((K, N) if transposed else (N, K))), quant_type="nf4")
    weights = F.dequantize_4bit(packed, state)
    weights = weights if transposed else weights.transpose(1, 2)
    offsets, groups = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([0, 0, 2, 2, 2])
    x, dx, bias, dbias, dy = (torch.randn(s) for s in ((5, K), (5, K), (3, N), (3, N), (5, N)))

    def product(x, bias):
        return grouped_linear_4bit(x, packed, state, offsets, bias, transposed)

    def expected(x, bias):
        return torch.einsum("tk,tkn->tn", x, weights[groups]) + bias[groups]

    for ours, theirs in zip(vjp(product, x, bias)[1](dy), vjp(expected, x, bias)[1](dy), strict=True):
        close(ours, theirs)
    for tangents in ((dx, dbias), (dx, torch.zeros_like(dbias))):
        for ours, theirs in zip(jvp(product, (x, bias), tangents), jvp(expected, (x, bias), tangents), strict=True):
            close(ours, theirs)
    close(
        grad(lambda x: product(x, bias).sin().sum())(x),
        grad(lambda x: expected(x, bias).sin().sum())(x),
        atol=1e-4,
        rtol=1e-4,
    )
    batch = torch.randn(4, 5, K)
    close(vmap(product, (0, None))(batch, bias), torch.stack([product(part, bias) for part in batch]))
    close(
        vmap(grad(lambda x: (product(x, bias) * dy).sum()))(batch),
        torch.stack([grad(lambda x: (expected(x, bias) * dy).sum())(part) for part in batch]),
    )
    with pytest.raises(NotImplementedError, match="offsets"):
        vmap(lambda offsets: grouped_linear_4bit(x, packed, state, offsets, None, transposed))(offsets[None])
