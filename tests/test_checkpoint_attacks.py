"""A malformed checkpoint is a ValueError that names the key, and leaves the module as it was."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from torch import nn

from bnb_core.functional import pack_dict_to_tensor, unpack_tensor_to_dict
from bnb_core.nn import Embedding8bit, EmbeddingNF4, Linear8bitLt, LinearNF4, load_state_dict
from bnb_core.nn.parametrize import replace_parameter_4bit

STATE_KEY = "weight.quant_state.bitsandbytes__nf4"
DELETED = object()


def _values(**changes):
    """A change of the packed quant state's JSON."""

    def change(state):
        values = {**unpack_tensor_to_dict(state[STATE_KEY]), **changes}
        return pack_dict_to_tensor({key: value for key, value in values.items() if value is not DELETED})

    return STATE_KEY, change


def _tensor(key, change):
    return key, lambda state: change(state[key])


def _bytes(content):
    return STATE_KEY, lambda state: torch.tensor(list(content), dtype=torch.uint8)


# name: (key that is changed, its new value from the state dict, what the error must name)
ATTACKS_4BIT = {
    "no packed weight": ("weight", lambda state: DELETED, "weight"),
    "weight too short": (*_tensor("weight", lambda w: w[:-1]), "weight"),
    "weight of another dtype": (*_tensor("weight", lambda w: w.to(torch.int32)), "weight"),
    "no absmax": ("weight.absmax", lambda state: DELETED, "absmax"),
    "absmax too short": (*_tensor("weight.absmax", lambda a: a[:-1]), "weight.absmax"),
    "absmax of another dtype": (*_tensor("weight.absmax", lambda a: a.float()), "weight.absmax"),
    "no codebook": ("weight.quant_map", lambda state: DELETED, "quant_map"),
    "codebook of 256": ("weight.quant_map", lambda state: torch.zeros(256), "weight.quant_map"),
    "no nested absmax": ("weight.nested_absmax", lambda state: DELETED, "nested_absmax"),
    "nested absmax too short": (*_tensor("weight.nested_absmax", lambda a: a[:0]), "weight.nested_absmax"),
    "no nested codebook": ("weight.nested_quant_map", lambda state: DELETED, "nested_quant_map"),
    "no quant state": (STATE_KEY, lambda state: DELETED, "quant_type"),
    "unknown part": ("weight.surprise", lambda state: torch.zeros(1), "weight.surprise"),
    "not JSON": (*_bytes(b"{'a': __import__('os')}"), STATE_KEY),
    "not UTF-8": (*_bytes(b"\xff\xfe{}"), STATE_KEY),
    "a JSON list": (*_bytes(b"[1, 2]"), STATE_KEY),
    "deeply nested JSON": (*_bytes(b"[" * 100_000), STATE_KEY),
    "empty": (*_bytes(b""), STATE_KEY),
    "unknown type": (*_values(quant_type="nf3"), STATE_KEY),
    "another type than its key": (*_values(quant_type="fp4"), STATE_KEY),
    "type missing": (*_values(quant_type=DELETED), STATE_KEY),
    "block size of 0": (*_values(blocksize=0), "blocksize"),
    "block size of a million": (*_values(blocksize=10**6), "blocksize"),
    "block size as text": (*_values(blocksize="64"), "blocksize"),
    "unknown dtype": (*_values(dtype="float8"), "dtype"),
    "dtype as a list": (*_values(dtype=["float32"]), "dtype"),
    "shape missing": (*_values(shape=DELETED), "shape"),
    "negative size": (*_values(shape=[-32, 64]), "shape"),
    "huge size": (*_values(shape=[2**62, 2**62]), "weight"),
    "size as a float": (*_values(shape=[32.0, 64]), "shape"),
    "another shape of that size": (*_values(shape=[64, 32]), "weight"),
    "offset as text": (*_values(nested_offset="0.1"), "nested_offset"),
    "offset missing": (*_values(nested_offset=DELETED), "nested_offset"),
    "nested block size of 3": (*_values(nested_blocksize=3), "nested_blocksize"),
    "nested dtype of integers": (*_values(nested_dtype="int8"), "nested_dtype"),
    "a value beside the tensors": (*_values(absmax=[1.0]), "absmax"),
    "unknown value": (*_values(code="import os"), "code"),
    "weight that is no tensor": ("weight", lambda state: [1, 2], "weight"),
    "absmax that is no tensor": ("weight.absmax", lambda state: [1.0], "weight.absmax"),
    "offset beyond f32": (*_values(nested_offset=10**400), "nested_offset"),
    "size beyond 64 bits": (*_values(shape=[2**64, 0]), "shape"),
    "size as a truth value": (*_values(shape=[True, 2048]), "shape"),
    "a million sizes": (*_values(shape=[1] * 10**6), "weight"),
    "a number of 5000 digits": (*_bytes(b'{"blocksize": ' + b"9" * 5000 + b"}"), STATE_KEY),
    "2^30 scales in four bytes": (*_tensor("weight.absmax", lambda a: a[:1].expand(1 << 30)), "weight.absmax"),
    "2^40 codes in one byte": (*_tensor("weight", lambda w: w[:1].expand(1 << 40, 1)), "weight"),
    "2^40 bytes of JSON in one": (STATE_KEY, lambda state: torch.ones(1, dtype=torch.uint8).expand(1 << 40), STATE_KEY),
    "many bytes of JSON": (*_values(shape=[2**62] * 60_000), STATE_KEY),
    "sizes that multiply to more than a tensor has": (*_values(shape=[2**40, 2**40, 0]), "shape"),
    "scales on meta": (*_tensor("weight.absmax", lambda a: a.to("meta")), "weight.absmax"),
    "a quant state on meta": (*_tensor(STATE_KEY, lambda s: s.to("meta")), STATE_KEY),
    "a weight on meta": (*_tensor("weight", lambda w: w.to("meta")), "weight"),
    "sparse scales": (*_tensor("weight.nested_absmax", lambda a: a.to_sparse()), "weight.nested_absmax"),
    "a nested weight": (*_tensor("weight", lambda w: torch.nested.nested_tensor([w, w])), "weight"),
    "a codebook in a row": (*_tensor("weight.nested_quant_map", lambda m: m[None]), "weight.nested_quant_map"),
    "a second state": ("weight.quant_state.bitsandbytes__fp4", lambda state: state[STATE_KEY], "second"),
}

ATTACKS_8BIT = {
    "no scales": ("SCB", lambda state: DELETED, "SCB"),
    "scales too short": (*_tensor("SCB", lambda s: s[:-1]), "SCB"),
    "scales of another dtype": (*_tensor("SCB", lambda s: s.half()), "SCB"),
    "a tiled format": ("weight_format", lambda state: torch.tensor(1, dtype=torch.uint8), "weight_format"),
    "two formats": ("weight_format", lambda state: torch.zeros(2, dtype=torch.uint8), "weight_format"),
    "weight of another shape": (*_tensor("weight", lambda w: w[:-1]), "weight"),
    "no weight": ("weight", lambda state: DELETED, "weight"),
    "weight that is no tensor": ("weight", lambda state: [1, 2], "weight"),
    "weight of another integer": (*_tensor("weight", lambda w: w.view(torch.uint8)), "weight"),
    "scales that are no tensor": ("SCB", lambda state: [1.0], "SCB"),
    "a format of another dtype": ("weight_format", lambda state: torch.tensor(0.3), "weight_format"),
    "scales in a row": (*_tensor("SCB", lambda s: s[None]), "SCB"),
    "scales in four bytes": (*_tensor("SCB", lambda s: s[:1].expand(1 << 30)), "SCB"),
    "sparse scales": (*_tensor("SCB", lambda s: s.to_sparse()), "SCB"),
    "scales on meta": (*_tensor("SCB", lambda s: s.to("meta")), "SCB"),
    "a weight in one byte": (*_tensor("weight", lambda w: w[:1, :1].expand(1 << 20, 1 << 20)), "weight"),
    "2^40 formats": (*_tensor("weight_format", lambda f: f.expand(1 << 40)), "weight_format"),
    "a format that is no number": ("weight_format", lambda state: torch.tensor(float("nan")), "weight_format"),
}


def _snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def _assert_is(module, before):
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def _assert_refused(build, attack):
    key, change, named = attack
    module = build().to("cpu")
    good = module.state_dict()
    bad = {**good, key: change(good)}
    bad = {key: value for key, value in bad.items() if value is not DELETED}
    before = _snapshot(module)
    with pytest.raises(ValueError, match=named) as error:
        module.load_state_dict(bad)
    assert len(str(error.value)) < 1000
    _assert_is(module, before)


@pytest.mark.parametrize("attack", ATTACKS_4BIT.values(), ids=ATTACKS_4BIT)
@pytest.mark.parametrize("build", [lambda: LinearNF4(64, 32), lambda: _nested_embedding()], ids=["linear", "embedding"])
def test_malformed_4bit_checkpoint_is_refused_by_key(build, attack):
    _assert_refused(build, attack)


def _nested_embedding():
    module = EmbeddingNF4(32, 64)
    module.weight.compress_statistics = True
    return module


@pytest.mark.parametrize("attack", ATTACKS_8BIT.values(), ids=ATTACKS_8BIT)
@pytest.mark.parametrize(
    "build",
    [lambda: Linear8bitLt(64, 32, has_fp16_weights=False), lambda: Embedding8bit(32, 64)],
    ids=["linear", "embedding"],
)
def test_malformed_8bit_checkpoint_is_refused_by_key(build, attack):
    _assert_refused(build, attack)


BIASES = {
    "short": lambda bias: bias[:-1],
    "of integers": lambda bias: bias.long(),
    "no tensor": lambda bias: bias.tolist(),
    "on meta": lambda bias: bias.to("meta"),
    "sparse": lambda bias: bias.to_sparse(),
    "nested": lambda bias: torch.nested.nested_tensor([bias]),
    "expanded": lambda bias: bias[:1].expand(1 << 40),
}
QUANTIZED_LINEARS = [LinearNF4, partial(Linear8bitLt, has_fp16_weights=False)]


@pytest.mark.parametrize("spoil", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("layer", QUANTIZED_LINEARS, ids=["4bit", "8bit"])
def test_wrong_bias_keeps_the_weight_from_changing(layer, spoil):
    module, other = layer(64, 32).to("cpu"), layer(64, 32).to("cpu").state_dict()
    before = _snapshot(module)
    with pytest.raises(ValueError, match="bias"):
        module.load_state_dict({**other, "bias": spoil(other["bias"])})
    _assert_is(module, before)


@pytest.mark.parametrize("layer", QUANTIZED_LINEARS, ids=["4bit", "8bit"])
@pytest.mark.parametrize("change", ["a missing bias", "a stray key", "a stray key of a part"])
def test_a_strict_load_that_fails_changes_nothing_in_the_module(layer, change):
    module, other = layer(64, 32).to("cpu"), layer(64, 32).to("cpu").state_dict()
    before = _snapshot(module)
    if change == "a missing bias":
        del other["bias"]
    else:
        other["stray" if change == "a stray key" else "stray.part"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="bias" if change == "a missing bias" else "stray"):
        module.load_state_dict(other)
    _assert_is(module, before)
    result = module.load_state_dict(other, strict=False)
    loaded = module.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in other.items() if key in loaded)
    assert (result.missing_keys, result.unexpected_keys) == (
        (["bias"], []) if change == "a missing bias" else ([], [next(key for key in other if "stray" in key)])
    )


def test_entries_are_loaded_without_their_gradients():
    module, other = LinearNF4(64, 32).to("cpu"), LinearNF4(64, 32).to("cpu").state_dict()
    other["weight.nested_absmax"] = other["weight.nested_absmax"].requires_grad_()
    module.load_state_dict(other)
    assert not module.weight.quant_state.state2.absmax.requires_grad
    copy.deepcopy(module)


def _model(seed):
    torch.manual_seed(seed)
    tied = LinearNF4(64, 64)
    parts = [nn.Linear(64, 64), tied, Linear8bitLt(64, 64, has_fp16_weights=False), nn.BatchNorm1d(64), tied]
    model = nn.Sequential(*parts).to("cpu")
    model.parametrized = nn.Linear(64, 8)
    replace_parameter_4bit(model.parametrized, "weight")
    return model


FAULTS = {
    "the last layer's scales": ("2.SCB", lambda value: value[:-1]),
    "a plain layer's shape": ("0.weight", lambda value: value[:-1]),
    "a buffer's shape": ("3.running_mean", lambda value: value[:-1]),
    "a parametrized weight": ("parametrized.weight.absmax", lambda value: value[:-1]),
    "a missing key": ("3.running_var", lambda value: DELETED),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_whole_model_is_loaded_or_nothing_of_it(fault):
    key, change = fault
    model, good = _model(0), _model(1).state_dict()
    before = _snapshot(model)
    spoilt = {**good, key: change(good[key])}
    with pytest.raises(RuntimeError, match=key.rpartition(".")[0].replace(".", r"\.")):
        load_state_dict(model, {k: v for k, v in spoilt.items() if v is not DELETED})
    _assert_is(model, before)
    identity = model[1].weight
    result = load_state_dict(model, good)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    _assert_is(model, good)
    assert model[1] is model[4] and model[1].weight is not identity and model[1].weight.module is model[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["unquantized", "quantized"])
@pytest.mark.parametrize("layer", QUANTIZED_LINEARS, ids=["4bit", "8bit"])
def test_what_are_no_values_is_not_taken_for_them(layer, quantized, dtype):
    """torch would copy, and so convert, whatever has the right shape."""
    module = layer(64, 32)
    if quantized:
        module.to("cpu")
    before = module.weight.data.clone()
    with pytest.raises(ValueError, match="weight"):
        module.load_state_dict({"weight": torch.ones(32, 64).to(dtype), "bias": torch.zeros(32)})
    assert torch.equal(module.weight.data, before)


def test_json_text_survives_packing():
    content = {"text": "ü", "list": [1, 2.5, None], "nested": {"a": True}}
    assert unpack_tensor_to_dict(pack_dict_to_tensor(content)) == json.loads(json.dumps(content))


@pytest.mark.parametrize("layer", QUANTIZED_LINEARS, ids=["4bit", "8bit"])
def test_a_load_that_is_not_strict_takes_one_entry_at_a_time(layer):
    """As Transformers loads: the bias alone, into a module on meta or not."""
    for device in ("cpu", "meta"):
        module = layer(64, 32).to(device)
        bias = torch.randn(32)
        model = nn.Sequential(module)
        result = model.load_state_dict({"0.bias": bias}, strict=False, assign=True)
        assert torch.equal(module.bias.data, bias) and result.unexpected_keys == []
