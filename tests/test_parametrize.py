"""A parameter of any shape, quantized in place, reads as its dequantized values, and is saved and loaded whole."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

from bnb_core import functional as F
from bnb_core.conformance.compare import same_bits
from bnb_core.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized

SHAPES = [(3, 8, 64), (5, 33), (7,), (2, 1, 2, 64)]
KINDS = {"nf4": {}, "fp4": {"quant_type": "fp4", "blocksize": 128}, "double": {"compress_statistics": True}}
STATE_KEY = "w.quant_state.bitsandbytes__nf4"


class Experts(nn.Module):
    """Fused expert weights, read twice in one forward."""

    def __init__(self, shape=(3, 8, 64)):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        assert self.w is self.w, "dequantized once in a forward"
        return torch.einsum("bk,enk->ebn", x, self.w) + self.b


def _quantized(**kind):
    module = Experts()
    replace_parameter_4bit(module, "w", **kind)
    return module


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_parameter_reads_as_its_dequantized_values(backend, shape, kind):
    module = Experts(shape)
    packed, state = F.quantize_4bit(module.w.data, **{"quant_type": "nf4", **kind})
    replace_parameter_4bit(module, "w", **kind)
    same_bits("w", module.w, F.dequantize_4bit(packed, state))
    assert not module.w.requires_grad and module.b.requires_grad


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_forward_and_gradient_are_those_of_the_dequantized_weight(kind):
    module, x = _quantized(**kind), torch.randn(5, 64, requires_grad=True)
    weight = module.w.clone()
    y = module(x)
    y.square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    expected = torch.einsum("bk,enk->ebn", twin, weight)
    expected.square().sum().backward()
    same_bits("y", y.detach(), expected.detach())
    same_bits("gradient", x.grad, twin.grad)
    assert module.b.grad is not None


def test_no_dequantized_copy_outlives_the_forward_not_even_one_that_raises():
    module = _quantized()
    module(torch.randn(2, 64))
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 63))
    assert not torch_parametrize._cache and torch_parametrize._cache_enabled == 0


def test_a_hook_that_raises_before_ours_leaves_the_cache_in_order():
    module, x = _quantized(), torch.randn(2, 64)

    def refuse(*_):
        raise RuntimeError("refused")

    handle = module.register_forward_pre_hook(refuse, prepend=True)
    with pytest.raises(RuntimeError, match="refused"):
        module(x)
    handle.remove()
    assert torch_parametrize._cache_enabled == 0
    module(x)
    assert not torch_parametrize._cache and torch_parametrize._cache_enabled == 0


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_state_dict_restores_a_fresh_module_exactly(kind, assign):
    original = nn.ModuleDict({"experts": _quantized(**kind)})
    state = {key: value.clone() for key, value in original.state_dict().items()}
    assert "experts.w" in state and not any("parametrizations" in key for key in state)
    fresh = nn.ModuleDict({"experts": _quantized(**kind)})
    fresh.load_state_dict(state, strict=True, assign=assign)
    same_bits("w", fresh["experts"].w, original["experts"].w)
    assert fresh.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


def test_values_load_into_a_quantized_parameter():
    module, source = _quantized(compress_statistics=True), Experts()
    module.load_state_dict(source.state_dict())
    replace_parameter_4bit(source, "w", compress_statistics=True)
    same_bits("w", module.w, source.w)


@pytest.mark.parametrize("change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to("cpu")])
def test_conversions_and_moves_leave_codes_and_scales_alone(change):
    module = _quantized(compress_statistics=True)
    before = {key: value.clone() for key, value in module.state_dict().items() if key.startswith("w")}
    after = change(module).state_dict()
    for key, value in before.items():
        same_bits(key, after[key], value)


def test_deepcopy_is_independent():
    module = _quantized()
    copied, before = copy.deepcopy(module), module.w.clone()
    copied.parametrizations.w[0].quant_state.absmax.zero_()
    assert not copied.w.any()
    same_bits("w", module.w, before)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_prequantized_codes_are_taken_as_they_are(storage):
    weight = torch.randn(4, 16, 64)
    packed, state = F.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    module = nn.Module()
    module.w = nn.Parameter(packed, requires_grad=False)
    replace_parameter_4bit_prequantized(module, "w", state.as_dict(packed=True), "cpu")
    same_bits("w", module.w, F.dequantize_4bit(packed, state))


# what is done to a good state dict, and what the error must name
ATTACKS = {
    "codes too short": (lambda s: s.update(w=s["w"][:-1]), "w: "),
    "codes of another dtype": (lambda s: s.update(w=s["w"].to(torch.int32)), "w: "),
    "codes without a state": (lambda s: [s.pop(k) for k in list(s) if k.startswith("w.")], "w: "),
    "a state without codes": (lambda s: s.pop("w"), "w: missing"),
    "absmax too short": (lambda s: s.update({"w.absmax": s["w.absmax"][:-1]}), "w.absmax"),
    "no absmax": (lambda s: s.pop("w.absmax"), "absmax"),
    "not JSON": (lambda s: s.update({STATE_KEY: torch.zeros(3, dtype=torch.uint8)}), STATE_KEY),
    "another shape": (lambda s: s.update(_entries(torch.randn(8, 3, 64))), "w: expected shape"),
    "values of another shape": (lambda s: (s.clear(), s.update(w=torch.randn(8, 3, 64))), "w: expected shape"),
    "integers": (lambda s: (s.clear(), s.update(w=torch.ones(3, 8, 64, dtype=torch.int64))), "w: "),
}


def _entries(weight):
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    return {"w": packed, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_malformed_checkpoint_is_refused_by_key_and_changes_nothing(attack):
    spoil, named = attack
    module = _quantized()
    bad, before = dict(_quantized().state_dict()), module.w.clone()
    spoil(bad)
    with pytest.raises(ValueError, match=named):
        module.load_state_dict(bad)
    same_bits("w", module.w, before)


def _prequantized(packed, state):
    module = nn.Module()
    module.w = nn.Parameter(packed, requires_grad=False)
    replace_parameter_4bit_prequantized(module, "w", state.as_dict(), "cpu")


REFUSED = {
    "no such parameter": (
        AttributeError,
        "Module does not have parameter 'nothing'",
        lambda: replace_parameter_4bit(Experts(), "nothing"),
    ),
    "no parameter": (TypeError, "Parameter 'training' is not", lambda: replace_parameter_4bit(Experts(), "training")),
    "quantized already": (TypeError, "w", lambda: replace_parameter_4bit(_quantized(), "w")),
    "block size": (ValueError, "blocksize", lambda: replace_parameter_4bit(Experts(), "w", blocksize=48)),
    "quant type": (ValueError, "quant_type", lambda: replace_parameter_4bit(Experts(), "w", quant_type="int4")),
    "not floating": (TypeError, "w", lambda: replace_parameter_4bit(_integers(), "w")),
    "too few codes": (
        ValueError,
        "w",
        lambda: (lambda packed, state: _prequantized(packed[:-3], state))(*F.quantize_nf4(torch.randn(4, 64))),
    ),
}


def _integers():
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    return module


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_quantized_is_refused(case):
    error, named, call = case
    with pytest.raises(error, match=named):
        call()


def test_two_parameters_of_one_module():
    module = nn.Module()
    module.a, module.b = (nn.Parameter(torch.randn(4, 64)) for _ in range(2))
    for name in ("a", "b"):
        replace_parameter_4bit(module, name)
    state = module.state_dict()
    assert set(state) == {f"{n}{part}" for n in "ab" for part in ("", ".absmax", ".quant_map", STATE_KEY[1:])}
    restored = copy.deepcopy(module)
    restored.load_state_dict(state)
    same_bits("b", restored.b, module.b)


@pytest.mark.parametrize("build", [_quantized, partial(_quantized, compress_statistics=True)], ids=["plain", "double"])
def test_compiled_module_gives_the_same(build):
    torch._dynamo.reset()
    module, x = build(), torch.randn(5, 64)
    compiled = torch.compile(lambda x: torch.einsum("bk,enk->ebn", x, module.w), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=0, atol=0)
