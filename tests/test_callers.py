"""Calls as programs make them that need a GPU or a service to run, replayed: vLLM, Unsloth, GaLore, Axolotl."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize as torch_parametrize

import bnb_core
from bnb_core import functional as F
from bnb_core import optim
from bnb_core.compat import nn_modules
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Linear4bit, Linear8bitLt, Params4bit
from bnb_core.nn.parametrize import replace_parameter_4bit
from bnb_core.optim.optimizer import Optimizer2State
from bnb_core.quant_state import QuantState


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_vllm_multiplies_by_int8_weights_and_asks_for_their_other_layout(threshold):
    layer = Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=threshold).to("cpu")
    weight, scales = nn.Parameter(layer.weight.data, requires_grad=False), layer.weight.SCB
    for generation in range(3):
        if generation < 2:
            state = bnb_core.MatmulLtState()
            state.CB, state.SCB = weight[0:48], scales.to("cpu")
            state.threshold, state.has_fp16_weights = threshold, False
            state.is_training, state.use_pool = False, threshold > 0
        x = torch.randn(5, 64, dtype=torch.bfloat16)
        y = bnb_core.matmul(x.unsqueeze(0), weight[0:48], state=state)
        same_bits("y", y[0], layer(x))
        assert state.CB is not None and state.CxB is None


def _unsloth_from_dict(cls, qs_dict, device):
    """A reader of others, in the place of ours: what it takes from the class, and a state2 without a shape."""
    (packed,) = [key for key in qs_dict if "quant_state" in key]
    assert packed.split(".")[-1] in cls.valid_qs_type_keys
    entries = {**qs_dict, **F.unpack_tensor_to_dict(qs_dict[packed])}
    del entries[packed]
    entries = {key.split(".")[-1]: value for key, value in entries.items()}
    assert set(entries) <= set(cls.valid_qs_keys) and entries["quant_type"] in cls.valid_quant_types
    return cls(
        absmax=entries["absmax"],
        shape=torch.Size(entries["shape"]),
        code=entries["quant_map"],
        blocksize=entries["blocksize"],
        quant_type=entries["quant_type"],
        dtype=getattr(torch, entries["dtype"]),
        offset=torch.tensor(entries["nested_offset"]),
        state2=cls(
            absmax=entries["nested_absmax"],
            blocksize=entries["nested_blocksize"],
            code=entries["nested_quant_map"],
            dtype=getattr(torch, entries["nested_dtype"]),
        ),
    )


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_unsloth_reads_quant_states_by_its_own_function(monkeypatch, quant_type):
    packed, state = F.quantize_4bit(torch.randn(64, 512), compress_statistics=True, quant_type=quant_type)
    entries = {f"model.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    monkeypatch.setattr(QuantState, "from_dict", classmethod(_unsloth_from_dict))
    weight = Params4bit.from_prequantized(packed, entries, device="cpu")
    same_bits("values", F.dequantize_4bit(weight.data, weight.quant_state), F.dequantize_4bit(packed, state))


def _unsloth_forward(self, x):
    if self.weight.shape[-1] == 1:
        nn_modules.fix_4bit_weight_quant_state_from_module(self)
    if not self.compute_type_is_set:
        self.set_compute_type(x)
        self.compute_type_is_set = True
    y = x if self.compute_dtype is None else x.to(self.compute_dtype)
    bias = None if self.bias is None else self.bias.to(self.compute_dtype)
    return bnb_core.matmul_4bit(y, self.weight.data.t(), bias=bias, quant_state=self.weight.quant_state).to(x.dtype)


@pytest.mark.parametrize("compute", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lost", [False, True], ids=["kept", "lost"])
def test_unsloth_gives_layers_its_own_forward(monkeypatch, lost, dtype, compute):
    """It takes the parameter's __torch_function__ away, too; a sharding wrapper, its class."""
    layer = Linear4bit(64, 48, compute_dtype=compute, quant_type="nf4").to("cpu")
    x = torch.randn(3, 64).to(dtype)
    expected = layer(x)
    layer.compute_dtype, layer.compute_type_is_set = compute, compute is not None
    if lost:
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    monkeypatch.delattr(Params4bit, "__torch_function__")
    monkeypatch.setattr(Linear4bit, "forward", _unsloth_forward)
    for _ in range(2):
        same_bits("y", layer(x), expected)
    assert layer.compute_dtype == (compute or dtype) and isinstance(layer.weight, Params4bit)


class ProjectedAdamW(Optimizer2State):
    """As GaLore does it: the state, the step and the decay are those of a smaller matrix."""

    def __init__(self, params, *bounds, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, is_paged=False):
        super().__init__("adam", params, lr, betas, eps, weight_decay, 8, None, 16, *bounds, is_paged=is_paged)

    @torch.no_grad()
    def step(self, closure=None):
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for gindex, group in enumerate(self.param_groups):
            for pindex, p in enumerate(group["params"]):
                state = self.state[p]
                if "step" not in state:
                    state["step"] = 0
                    state["projector"] = torch.linalg.qr(p.grad).Q[:, : group["rank"]]
                saved, basis = p.data, state["projector"]
                p.data = torch.zeros_like(basis.t() @ saved)
                p.grad = basis.t() @ p.grad
                if "state1" not in state:
                    self.init_state(group, p, gindex, pindex)
                self.prefetch_state(p)
                self.update_step(group, p, gindex, pindex)
                p.data = saved + basis @ p.data


@pytest.mark.parametrize("percentile_clipping_and_block_wise", [(), (100, True)], ids=["as of 0.50", "older"])
def test_galore_steps_in_a_smaller_space(percentile_clipping_and_block_wise):
    p, small = nn.Parameter(torch.randn(32, 20)), nn.Parameter(torch.zeros(8, 20))
    with nullcontext() if not percentile_clipping_and_block_wise else pytest.warns(UserWarning, match="block_wise"):
        optimizer = ProjectedAdamW([{"params": [p], "rank": 8}], *percentile_clipping_and_block_wise, lr=0.1)
    twin = optim.AdamW8bit([small], lr=0.1, min_8bit_size=16)
    for _ in range(3):
        gradient, before = torch.randn(32, 20), p.detach().clone()
        p.grad = gradient
        optimizer.step()
        basis = optimizer.state[p]["projector"]
        small.data.zero_()
        small.grad = basis.t() @ gradient
        twin.step()
        same_bits("p", p.detach(), before + basis @ small.detach())
    assert small.any() and optimizer.state[p]["step"] == 3 and optimizer.state[p]["state1"].dtype == torch.uint8


def test_axolotl_takes_the_hooks_of_the_cache_away_by_their_names():
    module = nn.Linear(64, 8)
    replace_parameter_4bit(module, "weight")
    names = ("_enable_parametrization_cache", "_disable_parametrization_cache")
    x, seen = torch.randn(2, 64), []
    module.register_forward_pre_hook(lambda *_: seen.append(torch_parametrize._cache_enabled))
    expected = module(x)
    removed = 0
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") in names]:
            del hooks[key]
            removed += 1
    same_bits("y", module(x).detach(), expected.detach())
    assert removed == 2 and seen == [1, 0]
