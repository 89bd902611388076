"""Linear8bitLt against LLM.int8() written out in float64, and the outliers that keep it accurate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bnb_core
from bnb_core import functional as F
from bnb_core.conformance.compare import ROUNDOFF, same_bits, within
from bnb_core.nn import Int8Params, Linear8bitLt

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _layer(K=64, N=48, threshold=0.0, bias=True):
    return Linear8bitLt(K, N, bias=bias, has_fp16_weights=False, threshold=threshold).to("cpu")


def _f64(tensor):
    return tensor.detach().double().numpy()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [(64, 48), (33, 7), (1, 1), (257, 3)], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_result_is_the_int8_product_plus_the_outliers(backend, features, threshold, dtype):
    K, N = features
    module = _layer(K, N, threshold)
    x = torch.randn(2, 3, K).to(dtype)
    q, rows, columns = F.int8_vectorwise_quant(x, threshold)
    CB, SCB = _f64(module.weight.data), _f64(module.weight.SCB)
    expected = _f64(q) @ CB.T * _f64(rows).reshape(2, 3, 1) * SCB / 127**2
    if columns is not None:
        expected += _f64(x)[..., columns] @ (CB * SCB[:, None] / 127)[:, columns].T
    # The layer rounds its bias to the input's dtype before it is added.
    expected += _f64(module.bias.to(dtype))
    magnitude = np.abs(_f64(x)) @ (np.abs(CB) * SCB[:, None] / 127).T + np.abs(expected) + 1
    y = module(x)
    assert y.dtype == dtype
    within("y", _f64(y), expected, (2.0**-20 + 2 * ROUNDOFF[dtype]) * magnitude)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_go_through_the_dequantized_weight(backend, dtype):
    module = _layer(threshold=2.0)
    x = torch.randn(2, 3, 64).to(dtype).requires_grad_()
    y = module(x)
    g = torch.randn(y.shape).to(dtype)
    y.backward(g)
    weight = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    magnitude = np.abs(_f64(g)) @ np.abs(_f64(weight))
    bound = (2 * ROUNDOFF[dtype] + 2.0**-19) * magnitude + 1e-7
    within("x.grad", _f64(x.grad), _f64(g) @ _f64(weight), bound)
    bound = 48 * ROUNDOFF[dtype] * np.abs(_f64(g)).reshape(-1, 48).sum(0) + 1e-6
    within("bias.grad", _f64(module.bias.grad), _f64(g).reshape(-1, 48).sum(0), bound)


def test_threshold_keeps_outliers_from_drowning_the_rest(backend):
    x = torch.randn(8, 64)
    x[:, 5] *= 200
    plain, mixed = _layer(), _layer(threshold=6.0)
    mixed.load_state_dict(plain.state_dict())
    weight = F.int8_vectorwise_dequant(plain.weight.data, plain.weight.SCB)
    exact = nn.functional.linear(x, weight, plain.bias)
    assert (mixed(x) - exact).norm() < 0.05 * (plain(x) - exact).norm()


def test_values_beyond_f16_stay_finite(backend):
    x = torch.full((2, 64), 1e5, dtype=torch.bfloat16)
    for threshold in (0.0, 6.0):
        assert _layer(threshold=threshold)(x).isfinite().all()


def test_weight_that_trains_follows_its_optimizer():
    module, x = Linear8bitLt(64, 48), torch.randn(9, 64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    target = torch.randn(9, 48)
    losses = []
    for _ in range(20):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and type(module.weight) is Int8Params
    assert set(module.state_dict()) == {"weight", "bias"}


def test_moves_of_the_parameter_alone_keep_codes_and_scales_together():
    module = _layer()
    weight = module.weight
    for moved in (weight.to("cpu"), weight.cpu(), weight.to("cpu", torch.float16), weight.to(torch.bfloat16)):
        assert type(moved) is Int8Params and moved.dtype == torch.int8
        assert moved.CB.data_ptr() == moved.data_ptr()
        same_bits("SCB", moved.SCB, weight.SCB)


def test_values_may_be_assigned_before_the_layer_is_quantized():
    source = nn.Linear(64, 48)
    codes, scales, _ = F.int8_vectorwise_quant(source.weight.data)
    for device in ("cpu", "meta"):
        with torch.device(device):
            module = Linear8bitLt(64, 48, has_fp16_weights=False)
        module.load_state_dict(source.state_dict(), assign=True)
        assert type(module.weight) is Int8Params
        module.to("cpu")
        same_bits("codes", module.weight.data, codes)
        same_bits("SCB", module.weight.SCB, scales)


def test_merging_an_adapter_replaces_the_weight():
    """As PEFT does it: dequantize with the state's scales, add, quantize anew, forget the state."""
    module, x, delta = _layer(), torch.randn(3, 64), torch.randn(48, 64)
    module(x)
    merged = F.int8_vectorwise_dequant(module.weight.data, module.state.SCB) + delta
    module.weight = Int8Params(merged, requires_grad=False, has_fp16_weights=False).to("cpu")
    module.state.reset_grads()
    expected = nn.functional.linear(x, merged, module.bias)
    assert (module(x) - expected).norm() < 0.02 * expected.norm()


def test_matmul_takes_a_weight_in_any_of_its_forms():
    x, weight = torch.randn(3, 64), torch.randn(48, 64)
    trained = bnb_core.matmul(x, weight)
    state = bnb_core.MatmulLtState()
    state.has_fp16_weights = False
    same_bits("quantized at the first call", bnb_core.matmul(x, weight, state=state), trained)
    again = bnb_core.MatmulLtState()
    again.has_fp16_weights, again.SCB = False, state.SCB
    same_bits("codes and scales", bnb_core.matmul(x, state.CB, state=again), trained)
    out = torch.empty(3, 48)
    assert bnb_core.matmul(x, weight, out=out) is out
    same_bits("out", out, trained)


def test_training_int8_layer_gives_its_weight_a_gradient(backend):
    module = Linear8bitLt(64, 48)
    x = torch.randn(9, 64, requires_grad=True)
    g = torch.randn(9, 48)
    module(x).backward(g)
    torch.testing.assert_close(module.weight.grad, g.t() @ x.detach())
    torch.testing.assert_close(x.grad, g @ module.weight.detach(), rtol=0.05, atol=0.05)


def test_compiled_training_int8_layer_has_no_graph_break():
    torch._dynamo.reset()
    module = Linear8bitLt(64, 48)
    x = torch.randn(3, 64)
    same_bits("result", torch.compile(module, fullgraph=True, backend="aot_eager")(x).detach(), module(x).detach())


def test_offloading_hooks_may_drop_the_states_scales():
    module = Linear8bitLt(64, 48, has_fp16_weights=False).to("cpu")
    x = torch.randn(3, 64)
    expected = module(x)
    module.state.SCB = None
    same_bits("result", module(x).detach(), expected.detach())


MISFITS = {
    "scales of values": (Int8Params, torch.float32),
    "scales of values for a plain weight": (nn.Parameter, torch.float32),
    "codes for a plain weight": (nn.Parameter, torch.int8),
}


@pytest.mark.parametrize("kind, dtype", MISFITS.values(), ids=MISFITS)
def test_scales_belong_to_codes_and_codes_to_a_layer_that_holds_them(kind, dtype):
    """A tied weight is a plain one: reading codes into it would untie it, or pass them for values."""
    module = _layer(bias=False)
    if kind is not Int8Params:
        module.weight = kind(torch.randn(48, 64))
    before = module.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"^SCB: ") as raised:
        module.load_state_dict({"weight": torch.ones(48, 64).to(dtype), "SCB": torch.ones(48)}, strict=False)
    assert isinstance(raised.value, ValueError)
    same_bits("weight", module.weight.data, before)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_that_i32_does_not_hold_are_exact(backend, threshold, dtype):
    """All codes are 127 and 140,000 columns long: the sum of their products is 2.26e9."""
    K = 140_000
    module = Linear8bitLt(K, 2, has_fp16_weights=False, threshold=threshold)
    with torch.no_grad():
        module.weight.fill_(2.0)
        module.bias.copy_(torch.tensor([1.0, -1.0]))
    module = module.to("cpu")
    x = torch.ones(3, K, dtype=dtype)
    if threshold:
        x[1, [5, K - 1]] = 64.0
    expected = 2 * _f64(x).sum(axis=1, keepdims=True) + np.array([1.0, -1.0])
    within("y", _f64(module(x)), expected, (2.0**-20 + ROUNDOFF[dtype]) * expected)
