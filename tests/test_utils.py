"""Helpers around models: replacing layers, finding outliers, packing dicts."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bnb_core import utils
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Linear4bit, Linear8bitLt, LinearNF4, OutlierAwareLinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32, bias=False)
        self.lm_head = nn.Linear(32, 8)

    def forward(self, x):
        return self.lm_head(self.second(self.first(x)))


@pytest.mark.parametrize(
    "layer", [LinearNF4, Linear4bit, partial(Linear8bitLt, has_fp16_weights=False)], ids=["nf4", "fp4", "int8"]
)
def test_replaced_layers_take_the_weights_and_leave_what_is_skipped(layer):
    model = nn.Sequential(Block(), nn.ReLU())
    weight, bias, head = model[0].first.weight.clone(), model[0].first.bias.clone(), model[0].lm_head
    x = torch.randn(3, 64)
    before = model(x)
    assert utils.replace_linear(model, layer, copy_weights=True) is model
    assert model[0].lm_head is head and model[0].second.bias is None
    same_bits("weight", model[0].first.weight.data, weight)
    same_bits("bias", model[0].first.bias.data, bias)
    after = model.to("cpu")(x)
    assert (after - before).norm() < 0.3 * before.norm()


def test_replaced_layers_keep_their_own_weights_by_default():
    model = Block()
    weight = model.first.weight.clone()
    utils.replace_linear(model, nn.Linear, skip_modules=("second",))
    assert not torch.equal(model.first.weight, weight)
    assert type(model.second) is nn.Linear


def test_post_processing_runs_on_the_replaced_layer():
    calls = []
    model = Block()
    for layer in (model.first, model.second):
        layer.done = partial(calls.append, layer)
    expected = [model.first, model.second]
    utils.replace_linear(model, LinearNF4, post_processing_function="done")
    assert calls == expected


def _weight_with_outliers(*columns, rows=256, width=128):
    weight = torch.randn(rows, width)
    weight[:, list(columns)] *= 50
    return weight


def test_outlier_dimensions_are_the_ones_planted():
    weight = _weight_with_outliers(5, 90)
    assert utils.find_outlier_dims(weight).tolist() == [5, 90]
    assert utils.find_outlier_dims(weight.t(), reduction_dim=1).tolist() == [5, 90]
    assert sorted(utils.find_outlier_dims(weight, topk=2).tolist()) == [5, 90]
    assert utils.find_outlier_dims(weight, rdm=True).shape == (2,)
    assert utils.find_outlier_dims(torch.randn(256, 128)).numel() == 0


@pytest.fixture
def tracer():
    tracer = utils.OutlierTracer.get_instance()
    yield tracer
    tracer.remove()


def test_tracer_finds_the_outliers_that_the_layer_before_makes(tracer):
    model = nn.Sequential(nn.Linear(32, 128), nn.Linear(128, 16))
    model[0].weight.data = _weight_with_outliers(7, rows=32, width=128).t().contiguous()
    with pytest.raises(RuntimeError, match="initialize"):
        tracer.get_outliers(model[1].weight)
    tracer.initialize(model)
    model(torch.randn(2, 32))
    assert tracer.get_outliers(model[1].weight).tolist() == [7]
    assert tracer.get_outliers(model[0].weight) is None
    assert utils.OutlierTracer.get_instance() is tracer


def test_outlier_aware_layer_quantizes_once_around_its_outliers(tracer):
    seen = []

    class Rounded(OutlierAwareLinear):
        def quantize_weight(self, w, outlier_idx):
            seen.append(outlier_idx.tolist())
            return w.round()

        def forward_with_outliers(self, x, outlier_idx):
            return nn.functional.linear(x, self.weight, self.bias)

    model = nn.Sequential(nn.Linear(32, 128), Rounded(128, 16))
    model[0].weight.data = _weight_with_outliers(7, rows=32, width=128).t().contiguous()
    tracer.initialize(model)
    for _ in range(2):
        model(torch.randn(2, 32))
    assert seen == [[7]] and torch.equal(model[1].weight, model[1].weight.round())


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.tensor([255], dtype=torch.uint8), torch.tensor([49]).byte()])
def test_unpacking_what_is_no_json_object_is_an_error(bad):
    with pytest.raises(ValueError, match="tensor_data: "):
        utils.unpack_tensor_to_dict(bad)


def test_a_cpu_is_always_in_step():
    assert utils.sync_gpu(t=torch.ones(1)) is None


def test_dicts_are_packed_by_the_ecosystems_keywords():
    packed = utils.pack_dict_to_tensor(source_dict={"a": 1})
    assert utils.unpack_tensor_to_dict(tensor_data=packed) == {"a": 1}
