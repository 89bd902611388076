"""A malformed checkpoint is a ValueError that names the key, and leaves the module as it was."""

from __future__ import annotations

import json

import pytest
import torch

from bnb_core.functional import pack_dict_to_tensor, unpack_tensor_to_dict
from bnb_core.nn import Embedding8bit, EmbeddingNF4, Linear8bitLt, LinearNF4

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
}

ATTACKS_8BIT = {
    "no scales": ("SCB", lambda state: DELETED, "SCB"),
    "scales too short": (*_tensor("SCB", lambda s: s[:-1]), "SCB"),
    "scales of another dtype": (*_tensor("SCB", lambda s: s.half()), "SCB"),
    "a tiled format": ("weight_format", lambda state: torch.tensor(1, dtype=torch.uint8), "weight_format"),
    "two formats": ("weight_format", lambda state: torch.zeros(2, dtype=torch.uint8), "weight_format"),
    "weight of another shape": (*_tensor("weight", lambda w: w[:-1]), "weight"),
}


def _assert_refused(build, attack):
    key, change, named = attack
    module = build().to("cpu")
    good = module.state_dict()
    bad = {**good, key: change(good)}
    bad = {key: value for key, value in bad.items() if value is not DELETED}
    before = {key: value.clone() for key, value in good.items()}
    with pytest.raises(ValueError, match=named):
        module.load_state_dict(bad)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


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


def test_json_text_survives_packing():
    content = {"text": "ü", "list": [1, 2.5, None], "nested": {"a": True}}
    assert unpack_tensor_to_dict(pack_dict_to_tensor(content)) == json.loads(json.dumps(content))
