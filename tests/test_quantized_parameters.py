"""Whatever torch does to parameters in general, codes stay codes and the layer computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from bnb_core.checks import QUANT_STORAGES
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Embedding8bit, EmbeddingNF4, Int8Params, Linear4bit, Linear8bitLt, LinearNF4

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "4-bit": lambda: LinearNF4(64, 48),
    "8-bit": lambda: Linear8bitLt(64, 48, has_fp16_weights=False),
    "4-bit embedding": lambda: EmbeddingNF4(48, 64),
    "8-bit embedding": lambda: Embedding8bit(48, 64),
}
layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)
FLAGS = ("swap", "overwrite")


def _input(module: nn.Module) -> torch.Tensor:
    return torch.arange(48) if isinstance(module, nn.Embedding) else torch.randn(5, 64)


@pytest.fixture(params=FLAGS)
def flag(request) -> Iterator[str]:
    """One of torch's ways to convert the parameters of a module, which are off by default."""
    switch = getattr(torch.__future__, f"set_{request.param}_module_params_on_conversion")
    switch(True)
    yield request.param
    switch(False)


@layers
def test_modules_move_and_convert_in_every_way_that_torch_has(build, flag):
    module = build()
    kind = type(module.weight)
    module = module.to("cpu")
    weight, x = module.weight, _input(module)
    expected, codes = module(x), weight.data.clone()
    module = module.to("cpu").to(torch.bfloat16).to(torch.float32)
    assert type(module.weight) is kind and (module.weight is weight) == (flag == "swap")
    same_bits("codes", module.weight.data, codes)
    torch.testing.assert_close(module(x), expected, rtol=0.02, atol=0.02)
    assert type(module.to("meta").weight) is kind


def test_a_weight_that_trains_keeps_its_gradient(flag):
    module = Linear8bitLt(64, 48).to("cpu")
    module(torch.randn(5, 64)).sum().backward()
    gradient = module.weight.grad.clone()
    module = module.to(torch.float64)
    assert type(module.weight) is Int8Params and module.weight.requires_grad
    assert module.weight.dtype == module.weight.grad.dtype == torch.float64
    same_bits("gradient", module.weight.grad.float(), gradient)


@layers
@pytest.mark.parametrize("convert", ["type", "float", "double", "half", "bfloat16"])
def test_no_conversion_turns_codes_into_values(build, convert):
    module = build().to("cpu")
    x, codes = _input(module), module.weight.data.clone()
    expected = module(x)
    module = module.type(torch.float32) if convert == "type" else getattr(module, convert)()
    same_bits("codes", module.weight.data, codes)
    torch.testing.assert_close(module.float()(x).float(), expected, rtol=0.02, atol=0.02)
    same_bits("codes", getattr(module.weight, convert)(*([torch.float32] if convert == "type" else [])).data, codes)


@layers
def test_a_copy_leaves_the_weight_as_it_is(build):
    values, quantized = build(), build().to("cpu")
    made = values.weight.to("cpu", copy=True)
    assert not made.is_floating_point() and values.weight.is_floating_point()
    copied = quantized.weight.to("cpu", copy=True)
    same_bits("codes", copied.data, quantized.weight.data)
    assert type(copied) is type(quantized.weight) and copied.data_ptr() != quantized.weight.data_ptr()


@layers
def test_what_is_quantized_in_inference_mode_trains_later(build):
    with torch.inference_mode():
        built = build().to("cpu")
    moved = build()
    with torch.inference_mode():
        moved = moved.to("cpu")
    for module in (built, moved):
        assert not module.weight.is_inference()
        if isinstance(module, nn.Linear):
            x = torch.randn(5, 64, requires_grad=True)
            module(x).sum().backward()
            assert x.grad.isfinite().all()
        else:
            assert not (module(_input(module)) * nn.Parameter(torch.ones(64))).is_inference()


INITIALIZERS = {
    "normal_": nn.init.normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "zeros_": nn.init.zeros_,
    "constant_": lambda weight: nn.init.constant_(weight, 1.0),
    "Tensor.uniform_": lambda weight: weight.uniform_(),
    "Tensor.zero_": lambda weight: weight.zero_(),
    "by keyword": lambda weight: nn.init.normal_(tensor=weight),
}
HOLDERS = {
    **LAYERS,
    **{
        f"codes in {dtype}": lambda dtype=dtype: Linear4bit(64, 48, quant_storage=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    },
}


@pytest.mark.parametrize("build", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("initialize", INITIALIZERS.values(), ids=INITIALIZERS)
def test_initializers_do_not_write_over_codes(build, initialize):
    values = build()
    initialize(values.weight)
    module = values.to("cpu")
    codes = module.weight.data.clone()
    with pytest.raises(ValueError, match="tensor: expected values to initialize, got the codes of a"):
        initialize(module.weight)
    same_bits("codes", module.weight.data, codes)


@layers
def test_attributes_that_callers_hang_on_a_weight_are_copied(build):
    weight = build().to("cpu").weight
    weight.sharding = {"rows": [1, 2]}
    copied = copy.deepcopy(weight)
    assert copied.sharding == weight.sharding and copied.sharding is not weight.sharding
    if isinstance(copied, Int8Params):
        assert copied.CB.data_ptr() == copied.data_ptr() != weight.data_ptr()


@layers
def test_a_layer_with_a_plain_weight_says_what_it_has(build):
    module = build().to("cpu")
    module.weight = nn.Parameter(torch.randn(48, 64))
    with pytest.raises(RuntimeError, match=r"plain Parameter of torch.float32, shape \(48, 64\).*tied"):
        module(_input(module))


AVERAGES = {
    "of all steps": {},
    "exponential": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    "exponential, one by one": {"avg_fn": swa_utils.get_ema_avg_fn(0.9)},
    "of all steps, one by one": {"avg_fn": swa_utils.get_swa_avg_fn()},
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize(
    "build", [*LAYERS.values(), lambda: LinearNF4(64, 48, quant_storage=torch.bfloat16)], ids=[*LAYERS, "bf16 storage"]
)
def test_codes_are_not_averaged(build, average):
    model = nn.Sequential(build()).to("cpu")
    averaged = swa_utils.AveragedModel(model, **average)
    averaged.update_parameters(model)
    with pytest.raises(ValueError, match="cannot be averaged"):
        averaged.update_parameters(model)
    same_bits("codes", averaged.module[0].weight.data, model[0].weight.data)


@layers
def test_a_state_dict_and_what_is_copied_from_it_hold_plain_tensors(build):
    state_dict = build().to("cpu").state_dict()
    for value in (*state_dict.values(), *copy.deepcopy(state_dict).values()):
        assert not isinstance(value, nn.Parameter) and not type(value).__name__.startswith("Detached")
    detached = build().to("cpu").weight.detach()
    assert type(copy.deepcopy(detached)) is type(detached.clone()) is torch.Tensor


@pytest.mark.parametrize("storage", QUANT_STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (7, 5), (5, 9)], ids=str)
def test_a_storage_takes_a_weight_of_any_size(shape, storage):
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(4, shape[1])
    layers = []
    for dtype in (torch.uint8, storage):
        layer = LinearNF4(shape[1], shape[0], bias=False, quant_storage=dtype)
        layer.weight.data.copy_(weight)
        layers.append(layer.to("cpu"))
    plain, stored = layers
    numbers = (plain.weight.data.numel() + storage.itemsize - 1) // storage.itemsize
    assert stored.weight.shape == (numbers, 1) and stored.weight.dtype == storage
    same_bits("result", stored(x), plain(x))
    loaded = LinearNF4(shape[1], shape[0], bias=False, quant_storage=storage)
    loaded.load_state_dict(stored.state_dict())
    same_bits("result of the loaded layer", loaded(x), plain(x))
