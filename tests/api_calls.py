"""A good call of every function of the API, with all arguments by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import bnb_core
from bnb_core import autograd, functional, utils
from bnb_core.compat import functional_names
from bnb_core.conformance.suite.errors import valid_arguments


def _weight() -> dict[str, Any]:
    packed, state = functional.quantize_nf4(torch.ones(32, 64))
    return {"B": packed, "quant_state": state}


def _double_quantized() -> dict[str, Any]:
    packed, state = functional.quantize_nf4(torch.ones(32, 64), compress_statistics=True)
    return {"A": packed, "quant_state": state, "absmax": None, "out": None, "blocksize": None}


def _blockwise() -> dict[str, Any]:
    codes, state = functional.quantize_blockwise(torch.ones(4, 64), blocksize=64)
    return {"A": codes, "quant_state": state, "absmax": None, "code": None, "out": None, "blocksize": 64}


def _int8(rows: int = 4) -> torch.Tensor:
    return torch.ones(rows, 64, dtype=torch.int8)


def step(name: str) -> dict[str, Any]:
    """Without AdEMAMix' schedules, which the functions do not have."""
    arguments = valid_arguments(name).items()
    return {key: value for key, value in arguments if value is not None and key not in ("t_alpha", "t_beta3")}


def _matmul_state() -> bnb_core.MatmulLtState:
    state = bnb_core.MatmulLtState()
    state.has_fp16_weights, state.CB, state.SCB = False, _int8(6), torch.ones(6)
    return state


A = partial(torch.ones, 4, 64)
IGEMM = {"out": None, "transposed_A": False, "transposed_B": True}

Call = tuple[Callable[..., Any], Callable[[], dict[str, Any]]]
CALLS: dict[str, Call] = {
    "matmul": (
        autograd.matmul,
        lambda: {"A": A(), "B": A(), "out": None, "state": None, "threshold": 0.0, "bias": None},
    ),
    "matmul of int8": (
        autograd.matmul,
        lambda: {"A": A(), "B": _int8(6), "state": _matmul_state(), "threshold": 0.0, "bias": torch.ones(6)},
    ),
    "matmul, trained": (autograd.matmul, lambda: {"A": A(requires_grad=True), "B": A(), "bias": torch.ones(4)}),
    "matmul_4bit": (autograd.matmul_4bit, lambda: {"A": A(), **_weight(), "out": None, "bias": None}),
    "matmul_4bit, trained": (
        autograd.matmul_4bit,
        lambda: {"A": A(requires_grad=True), **_weight(), "bias": torch.ones(32)},
    ),
    "matmul_4bit, transposed": (
        autograd.matmul_4bit,
        lambda: {"A": torch.ones(4, 32), **_weight(), "out": None, "bias": None},
    ),
    "linear_4bit": (autograd.linear_4bit, lambda: {"A": A(), **_weight(), "bias": None, "out": None}),
    "int8_linear": (
        autograd.int8_linear,
        lambda: {"A": A(), "CB": _int8(6), "SCB": torch.ones(6), "bias": None, "threshold": 0.0, "weight": None},
    ),
    "batched_igemm": (functional.batched_igemm, lambda: {"A": _int8()[None], "B": _int8()[None], **IGEMM}),
    "create_dynamic_map": (
        functional.create_dynamic_map,
        lambda: {"signed": True, "max_exponent_bits": 7, "total_bits": 8},
    ),
    "create_fp8_map": (
        functional.create_fp8_map,
        lambda: {"signed": True, "exponent_bits": 5, "precision_bits": 2, "total_bits": 8},
    ),
    "create_linear_map": (functional.create_linear_map, lambda: {"signed": True, "total_bits": 8, "add_zero": True}),
    "create_normal_map": (functional.create_normal_map, lambda: {"offset": 0.9677083, "use_extra_value": True}),
    "dequantize_4bit": (functional.dequantize_4bit, _double_quantized),
    "dequantize_4bit, loose": (
        functional.dequantize_4bit,
        lambda: {
            "A": _weight()["B"],
            "quant_state": None,
            "absmax": torch.ones(32),
            "out": torch.ones(32, 64),
            "blocksize": 64,
            "quant_type": "nf4",
        },
    ),
    "dequantize_absmax": (
        functional.dequantize_absmax,
        lambda: {"quant_state": _double_quantized()["quant_state"]},
    ),
    "quantize_absmax": (functional.quantize_absmax, lambda: {"absmax": torch.ones(8)}),
    "dequantize_blockwise": (functional.dequantize_blockwise, _blockwise),
    "dequantize_blockwise, loose": (
        functional.dequantize_blockwise,
        lambda: {
            "A": _blockwise()["A"],
            "absmax": torch.ones(4),
            "code": functional.create_dynamic_map(),
            "blocksize": 64,
            "nested": False,
        },
    ),
    "dequantize_blockwise, any size": (
        functional.dequantize_blockwise,
        lambda: {"A": _blockwise()["A"], "absmax": torch.ones(4), "code": None, "out": None, "blocksize": 65},
    ),
    "dequantize_fp4": (functional.dequantize_fp4, _double_quantized),
    "dequantize_nf4": (functional.dequantize_nf4, _double_quantized),
    "gemm_4bit": (functional.gemm_4bit, lambda: {"A": A(), **_weight(), "bias": None, "out": None}),
    "gemv_4bit": (
        functional.gemv_4bit,
        lambda: {
            "A": torch.ones(1, 64),
            "B": _weight()["B"],
            "out": None,
            "transposed_A": False,
            "transposed_B": False,
            "state": _weight()["quant_state"],
        },
    ),
    "get_4bit_type": (functional.get_4bit_type, lambda: {"typename": "nf4", "device": None, "blocksize": 64}),
    "get_paged": (functional.get_paged, lambda: {"shape": 64, "dtype": torch.float32, "device": "cpu"}),
    "get_ptr": (functional.get_ptr, lambda: {"A": A()}),
    "igemm": (functional.igemm, lambda: {"A": _int8(), "B": _int8(), **IGEMM}),
    "int8_double_quant": (
        functional.int8_double_quant,
        lambda: {"A": A(), "col_stats": None, "row_stats": None, "out_col": None, "out_row": None, "threshold": 0.0},
    ),
    "int8_linear_matmul": (
        functional.int8_linear_matmul,
        lambda: {"A": _int8(), "B": _int8(), "out": None, "dtype": torch.int32},
    ),
    "int8_mm_dequant": (
        functional.int8_mm_dequant,
        lambda: {
            "A": torch.ones(4, 6, dtype=torch.int32),
            "row_stats": torch.ones(4),
            "col_stats": torch.ones(6),
            "out": None,
            "bias": None,
        },
    ),
    "int8_vectorwise_dequant": (functional.int8_vectorwise_dequant, lambda: {"A": _int8(), "stats": torch.ones(4)}),
    "int8_vectorwise_quant": (functional.int8_vectorwise_quant, lambda: {"A": A(), "threshold": 0.0}),
    "is_on_gpu": (functional.is_on_gpu, lambda: {"tensors": [None]}),
    "optimizer_update_32bit": (functional.optimizer_update_32bit, lambda: step("optimizer_update_32bit")),
    "optimizer_update_32bit of one state": (
        functional.optimizer_update_32bit,
        lambda: {**step("optimizer_update_32bit"), "optimizer_name": "lion", "state2": None, "max_unorm": 1.0},
    ),
    "optimizer_update_8bit_blockwise": (
        functional.optimizer_update_8bit_blockwise,
        lambda: step("optimizer_update_8bit_blockwise"),
    ),
    "optimizer_update_8bit_blockwise of one state": (
        functional.optimizer_update_8bit_blockwise,
        lambda: {
            **step("optimizer_update_8bit_blockwise"),
            "optimizer_name": "lion",
            "state2": None,
            "qmap2": None,
            "absmax2": None,
        },
    ),
    "pack_dict_to_tensor": (functional.pack_dict_to_tensor, lambda: {"source_dict": {}}),
    "prefetch_tensor": (
        functional.prefetch_tensor,
        lambda: {"A": functional.get_paged(4, device="cpu"), "to_cpu": False},
    ),
    "quantize_4bit": (
        functional.quantize_4bit,
        lambda: {
            "A": A(),
            "absmax": None,
            "out": None,
            "blocksize": 64,
            "compress_statistics": True,
            "quant_type": "nf4",
            "quant_storage": torch.uint8,
        },
    ),
    "quantize_blockwise": (
        functional.quantize_blockwise,
        lambda: {"A": A(), "code": None, "absmax": None, "out": None, "blocksize": 64, "nested": True},
    ),
    "quantize_blockwise, any size": (
        functional.quantize_blockwise,
        lambda: {"A": A(), "code": None, "absmax": None, "out": None, "blocksize": 65, "nested": False},
    ),
    "quantize_fp4": (
        functional.quantize_fp4,
        lambda: {"A": A(), "absmax": None, "out": None, "blocksize": 64, "quant_storage": torch.uint8},
    ),
    "quantize_nf4": (
        functional.quantize_nf4,
        lambda: {"A": A(), "absmax": None, "out": None, "blocksize": 64, "quant_storage": torch.uint8},
    ),
    "unpack_tensor_to_dict": (
        functional.unpack_tensor_to_dict,
        lambda: {"tensor_data": functional.pack_dict_to_tensor({})},
    ),
    "find_outlier_dims": (
        utils.find_outlier_dims,
        lambda: {"weight": torch.randn(4, 64), "reduction_dim": 0, "zscore": 4.0, "topk": None, "rdm": True},
    ),
    "replace_linear": (
        utils.replace_linear,
        lambda: {
            "model": nn.Sequential(nn.Linear(4, 4)),
            "linear_replacement": nn.Linear,
            "skip_modules": ("lm_head",),
            "copy_weights": True,
            "post_processing_function": None,
        },
    ),
    "sync_gpu": (utils.sync_gpu, lambda: {"t": A()}),
    "OutlierTracer.initialize": (utils.OutlierTracer().initialize, lambda: {"model": nn.Linear(4, 4)}),
    "OutlierTracer.get_hvalue": (utils.OutlierTracer().get_hvalue, lambda: {"weight": A()}),
    "check_matmul": (
        functional_names.check_matmul,
        lambda: {
            "A": _int8(),
            "B": _int8(),
            "out": None,
            "transposed_A": False,
            "transposed_B": True,
            "expected_type": torch.int8,
        },
    ),
    "elementwise_func": (
        functional_names.elementwise_func,
        lambda: {"func_name": "fill", "A": A(), "B": None, "value": 1.0, "prefetch": True},
    ),
    "elementwise_func, arange": (
        functional_names.elementwise_func,
        lambda: {"func_name": "arange", "A": A(), "B": None, "value": 1.0},
    ),
    "fill": (functional_names.fill, lambda: {"A": A(), "value": 1.0, "device": None, "prefetch": True}),
    "_mul": (functional_names._mul, lambda: {"A": A(), "B": A(), "device": None}),
    "_convert_weight_packed_for_cpu": (
        functional_names._convert_weight_packed_for_cpu,
        lambda: {"qweight": _weight()["B"], "quant_state": _weight()["quant_state"]},
    ),
}
