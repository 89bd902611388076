"""What bitsandbytes 0.50.2 wrote loads, means the same to the bit, and is written again byte for byte."""

from __future__ import annotations

import json

import numpy as np
import torch
from conftest import load_golden, state_dict_of

from bnb_core import functional as F
from bnb_core.conformance.compare import matmul_bound, same_bits, within
from bnb_core.nn import Linear4bit, Linear8bitLt


def _linear4bit(metadata):
    return Linear4bit(
        int(metadata["in_features"]),
        int(metadata["out_features"]),
        compress_statistics=json.loads(metadata["nested"]),
        quant_type=metadata["quant_type"],
        quant_storage=getattr(torch, metadata["quant_storage"]),
    )


def _assert_same_bytes(got, expected):
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        same_bits(key, got[key], tensor)


def test_4bit_checkpoint_dequantizes_to_the_same_bits(backend, golden_linear4bit):
    tensors, metadata = golden_linear4bit
    module = _linear4bit(metadata)
    module.load_state_dict(state_dict_of(tensors), strict=True)
    got = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    same_bits("weight", got, tensors["dequantized_weight"])


def test_4bit_checkpoint_computes_within_the_bound(backend, golden_linear4bit):
    tensors, metadata = golden_linear4bit
    module = _linear4bit(metadata)
    module.load_state_dict(state_dict_of(tensors))
    x, w, bias = (tensors[key].double().numpy() for key in ("x", "dequantized_weight", "sd.bias"))
    expected = x @ w.T + bias
    bound = matmul_bound(torch.float32, x.shape[1], np.abs(x) @ np.abs(w).T + np.abs(bias), expected)
    within("y", module(tensors["x"]).detach().numpy(), expected, bound)


def test_4bit_checkpoint_is_saved_again_byte_for_byte(golden_linear4bit):
    tensors, metadata = golden_linear4bit
    module = _linear4bit(metadata)
    module.load_state_dict(state_dict_of(tensors))
    module(tensors["x"])
    _assert_same_bytes(module.to("cpu").state_dict(), state_dict_of(tensors))


def test_4bit_quantization_means_the_same_as_the_older_one(backend, golden_linear4bit):
    """The older library gives fp4's zero either sign; both decode to 0."""
    tensors, metadata = golden_linear4bit
    packed, state = F.quantize_4bit(tensors["original_weight"], quant_type=metadata["quant_type"])
    older = F.dequantize_4bit(
        tensors["sd.weight"], absmax=state.absmax, out=torch.empty(96, 256), quant_type=metadata["quant_type"]
    )
    same_bits("values", F.dequantize_4bit(packed, state), older)


def test_4bit_quantization_gives_the_golden_codes_and_scales(backend, golden_linear4bit):
    """To the bit, but for the sign of fp4's zero and scale codes on either side of a midpoint."""
    tensors, metadata = golden_linear4bit
    quant_type, nested = metadata["quant_type"], json.loads(metadata["nested"])
    storage = getattr(torch, metadata["quant_storage"])
    packed, state = F.quantize_4bit(
        tensors["original_weight"], quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    if quant_type == "nf4":
        same_bits("codes", packed.view(torch.uint8), tensors["sd.weight"].view(torch.uint8))
    if not nested:
        same_bits("absmax", state.absmax, tensors["sd.weight.absmax"])
        return
    same_bits("nested_absmax", state.state2.absmax, tensors["sd.weight.nested_absmax"])
    older = F.unpack_tensor_to_dict(tensors[f"sd.weight.quant_state.bitsandbytes__{quant_type}"])
    assert state.offset.item() == older["nested_offset"]
    apart = (state.absmax.int() - tensors["sd.weight.absmax"].int()).abs()
    assert apart.max() <= 1 and apart.sum() <= 1


def test_8bit_checkpoint_dequantizes_to_the_same_bits_and_is_saved_again(backend):
    tensors, metadata = load_golden("linear8bitlt")
    module = Linear8bitLt(
        int(metadata["in_features"]),
        int(metadata["out_features"]),
        has_fp16_weights=False,
        threshold=float(metadata["threshold"]),
    )
    module.load_state_dict(state_dict_of(tensors), strict=True)
    got = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    torch.testing.assert_close(got, tensors["dequantized_weight"], rtol=2e-7, atol=0)
    y = module(tensors["x"])
    assert (y - tensors["y_dense"]).abs().max() < 0.02 * tensors["y_dense"].abs().max()
    _assert_same_bytes(module.state_dict(), state_dict_of(tensors))


def test_8bit_weight_quantizes_to_the_same_codes_from_f16(backend):
    """The older library squeezes a weight through f16 first; here that is the caller's choice."""
    tensors, _ = load_golden("linear8bitlt")
    codes, scales, _ = F.int8_vectorwise_quant(tensors["original_weight"].half())
    same_bits("codes", codes, tensors["sd.weight"])
    same_bits("SCB", scales, tensors["sd.SCB"])


def test_codebooks_are_the_same_bits():
    tensors, _ = load_golden("codebooks_and_blockwise")
    ours = {
        "nf4": F.get_4bit_type("nf4"),
        "fp4": F.get_4bit_type("fp4"),
        "af4": F.get_4bit_type("af4"),
        "dynamic_map": F.create_dynamic_map(),
        "dynamic_map_unsigned": F.create_dynamic_map(signed=False),
        "linear_map": F.create_linear_map(),
        "fp8_map": F.create_fp8_map(),
        "normal_map": F.create_normal_map(),
    }
    for name, code in ours.items():
        assert torch.equal(code, tensors[name]), name


def test_blockwise_codes_dequantize_to_the_same_bits(backend):
    tensors, _ = load_golden("codebooks_and_blockwise")
    blocksize = 256
    got = F.dequantize_blockwise(tensors["q"], absmax=tensors["absmax"], blocksize=blocksize)
    same_bits("dequantized", got, tensors["dequantized"])
    q, state = F.quantize_blockwise(tensors["a"], blocksize=blocksize)
    same_bits("absmax", state.absmax, tensors["absmax"])
    assert (q != tensors["q"]).float().mean() < 0.015
