"""Section 7 for the whole API: each argument in turn is of every wrong kind, and the error names it.

A call with the argument replaced may work. Otherwise it raises TypeError or ValueError whose message begins with the
name of an argument: the replaced one's, or that of one that no longer fits it.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

import bnb_core
from bnb_core import autograd, functional, primitives, utils
from bnb_core.compat import functional_names
from bnb_core.conformance.case import positional
from bnb_core.conformance.suite.errors import valid_arguments
from bnb_core.optim.hyperparameters import check_hyperparameters, check_only
from bnb_core.primitive import Primitive
from bnb_core.records import is_record

NAN = float("nan")
NAME = re.compile(r"([a-zA-Z_]\w*)[\w.\[\]']*: ")
"""What a message begins with: an argument, or a part of it such as ``state.SCB``."""


@cache
def _states() -> dict[str, Any]:
    """Quant states that were put together by hand, beside a good one of another weight."""
    _, good = functional.quantize_nf4(torch.ones(4, 64))
    fields = {name: getattr(good, name) for name in ("absmax", "shape", "code", "blocksize", "quant_type", "dtype")}
    broken = {
        "shape": ("text", 5, (4, "x"), (4, -64), (2**70, 64), (4.5, 64), [4, None]),
        "absmax": (None, 5, [1.0]),
        "code": ("text", 5),
        "blocksize": ("64", 64.5, 0, 2**63),
        "quant_type": (["nf4"], 4),
        "dtype": ("float32", 5, torch.int8),
        "offset": (5, "text"),
        "state2": (5, "text", functional.QuantState(None)),  # type: ignore[arg-type]
    }
    states = {
        f"a quant state, {name} {value!r}": functional.QuantState(**{**fields, name: value})
        for name, values in broken.items()
        for value in values
    }
    return {"a quant state": good, "an empty quant state": functional.QuantState(None), **states}  # type: ignore[arg-type]


@cache
def _wrong() -> dict[str, Any]:
    """One of each kind of value that some argument does not take."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested and compressed tensors are in beta
        parts = [torch.ones(2, 64), torch.ones(3, 64)]
        tensors = {
            "a sparse tensor": torch.eye(64).to_sparse(),
            "a compressed tensor": torch.eye(64).to_sparse_csr(),
            "a sparse tensor of codes": torch.eye(64, dtype=torch.uint8).to_sparse(),
            "a nested tensor": torch.nested.nested_tensor(parts),
            "a jagged tensor": torch.nested.nested_tensor(parts, layout=torch.jagged),
        }
    numbers = (7, -1, 0, 2**31, 2**62, 2**63, 10**400, 0.5, 1e39, 1e308, NAN, float("inf"), True, 1j)
    return {
        **{f"{str(number)[:8]}": number for number in numbers},
        "None": None,
        "a str": "text",
        "bytes": b"text",
        "a list": [1.0],
        "a tuple": (),
        "a dict": {"key": 1},
        "a type": int,
        "a dtype": torch.float64,
        "a device": torch.device("meta"),
        "an unknown device": "cuda:99",
        "an object": object(),
        "an empty tensor": torch.empty(0),
        "a scalar tensor": torch.tensor(2.0),
        "a bool tensor": torch.ones(4, 64, dtype=torch.bool),
        "a complex tensor": torch.ones(4, 64, dtype=torch.complex64),
        "a tensor on meta": torch.empty(4, 64, device="meta"),
        **tensors,
        **_states(),
        "a matmul state": bnb_core.MatmulLtState(),
        "a module": nn.Linear(4, 4),
    }


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


def _step(name: str) -> dict[str, Any]:
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
    "optimizer_update_32bit": (functional.optimizer_update_32bit, lambda: _step("optimizer_update_32bit")),
    "optimizer_update_32bit of one state": (
        functional.optimizer_update_32bit,
        lambda: {**_step("optimizer_update_32bit"), "optimizer_name": "lion", "state2": None, "max_unorm": 1.0},
    ),
    "optimizer_update_8bit_blockwise": (
        functional.optimizer_update_8bit_blockwise,
        lambda: _step("optimizer_update_8bit_blockwise"),
    ),
    "optimizer_update_8bit_blockwise of one state": (
        functional.optimizer_update_8bit_blockwise,
        lambda: {
            **_step("optimizer_update_8bit_blockwise"),
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
BY_THE_CALLEE = {("linear_replacement", "a type"), ("linear_replacement", "a module")}
"""They can be called, and raise what they like."""
PRIMITIVES = [value for value in vars(primitives).values() if isinstance(value, Primitive)]


def _parameters(function: Callable[..., Any]) -> set[str]:
    """The names that an error of the function may begin with: its arguments, and the parts of a quant state."""
    names = {*(function.names if isinstance(function, Primitive) else inspect.signature(function).parameters)}
    if names & {"state", "quant_state"}:
        names |= {*inspect.signature(functional.QuantState).parameters, "quant_state"}
    return names


def _outcome(function: Callable[..., Any], arguments: dict[str, Any], accepted: set[str]) -> str | None:
    """None for a call that works or fails as it should; otherwise what it did."""
    try:
        if isinstance(function, Primitive):
            function(*positional(function, arguments))
        elif "shape" in arguments:
            function(arguments.pop("shape"), **arguments)
        else:
            function(**arguments)
    except (TypeError, ValueError) as error:
        named = NAME.match(str(error))
        if named and named[1] in accepted and type(error) in (TypeError, ValueError, bnb_core.backend.BackendError):
            return None
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _misbehaviours(function: Callable[..., Any], valid: Callable[[], dict[str, Any]]) -> list[str]:
    found = []
    for name in valid():
        for kind, value in _wrong().items():
            if (name, kind) in BY_THE_CALLEE:
                continue
            outcome = _outcome(function, {**valid(), name: value}, _parameters(function))
            if outcome is not None:
                found.append(f"{name} is {kind}: {outcome.splitlines()[0]}")
    return found


def _on_meta(name: str) -> dict[str, Any]:
    arguments = valid_arguments(name)
    return {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}


@pytest.mark.parametrize("call", CALLS)
def test_functions_name_the_argument_that_they_refuse(call):
    function, valid = CALLS[call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one of the calls is deprecated
        assert _outcome(function, valid(), set()) is None
        assert not _misbehaviours(function, valid)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.name)
def test_primitives_name_the_argument_that_they_refuse(primitive, device):
    valid = partial(_on_meta if device == "meta" else valid_arguments, primitive.name)
    assert _outcome(primitive, valid(), set()) is None
    assert not _misbehaviours(primitive, valid)


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.name)
def test_primitives_name_the_record_that_they_refuse(primitive):
    """Also after a good call, and where it holds what a record would."""
    names, valid = inspect.signature(primitive).parameters, positional(primitive, valid_arguments(primitive.name))
    primitive(*valid)
    found = []
    for place, name in enumerate(names):
        if not is_record(valid[place]):
            continue
        for kind, value in {**_wrong(), "a plain tuple": tuple(valid[place])}.items():
            try:
                primitive(*valid[:place], value, *valid[place + 1 :])
                found.append(f"{name} is {kind}: accepted")
            except Exception as error:
                if type(error) is not TypeError or not str(error).startswith(f"{name}: expected a"):
                    found.append(f"{name} is {kind}: {type(error).__name__}: {error}")
    assert not found


ACCEPTED = {
    "lr": (0, 0.1, 3e38, torch.tensor(0.1), torch.tensor([0.1])),
    "betas": ((0.9, 0.999), [0.0, 0.5]),
    "eps": (0, 1e-8, 3e38),
    "min_8bit_size": (0, 4096, float("inf")),
    "optim_bits": (8, 32),
}
REFUSED = {
    "lr": (
        -1,
        1e39,
        10**400,
        NAN,
        None,
        "0.1",
        [0.1],
        torch.ones(2),
        torch.tensor(NAN),
        torch.tensor(1j),
        torch.ones(1, device="meta"),
        torch.ones(1).to_sparse(),
    ),
    "betas": ((0.9, 1.0), (0.9, NAN), (0.9, None), (0.9, torch.tensor(0.5)), torch.tensor([0.9, 0.999]), 0.9, None),
    "eps": (-1, 1e39, 10**400, NAN, None, "0.1", torch.tensor(1e-8)),
    "weight_decay": (-1, 1e308, 10**400, NAN, torch.tensor(0.1)),
    "alpha": (-1, 10**400, torch.tensor(0.1)),
    "t_alpha": (0, NAN, 10**400, "100", torch.tensor(100)),
    "max_unorm": (-1, 10**400, NAN, torch.tensor(0.1)),
    "min_8bit_size": (-1, NAN, None, torch.tensor(4096)),
    "optim_bits": (16, "8", torch.tensor(8), None),
    "skip_zeros": (1, None, torch.tensor(True)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_optimizer_settings_that_are_accepted(name):
    for value in ACCEPTED[name]:
        check_hyperparameters({name: value})


@pytest.mark.parametrize("name", REFUSED)
def test_optimizer_settings_are_refused_by_name(name):
    for value in REFUSED[name]:
        with pytest.raises(ValueError, match=f"^{name}: "):
            check_hyperparameters({name: value})


@pytest.mark.parametrize("setting", [{"lr": 1e308}, {"eps": 10**400}, {"eps": torch.tensor(1e-8)}], ids=str)
def test_an_optimizer_is_not_made_with_a_setting_that_its_steps_cannot_use(setting):
    with pytest.raises(ValueError, match=f"^{next(iter(setting))}: "):
        bnb_core.optim.Adam([nn.Parameter(A())], **setting)


def test_the_only_value_that_is_supported_is_no_tensor():
    with pytest.raises(ValueError, match=r"^amsgrad: "):
        check_only("amsgrad", torch.zeros(2), False)


@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor([0.1])], ids=["scalar", "one"])
def test_a_step_takes_its_learning_rate_from_a_tensor_of_one(backend, lr):
    of_float, of_tensor = _step("optimizer_update_32bit"), {**_step("optimizer_update_32bit"), "lr": lr}
    of_float["lr"] = lr.item()
    for arguments in (of_float, of_tensor):
        functional.optimizer_update_32bit(**arguments)
    assert torch.equal(of_float["p"], of_tensor["p"]) and not torch.equal(of_tensor["p"], A())


def test_blocks_larger_than_the_tensor_hold_all_of_it():
    values = torch.randn(5, 20)
    codes, state = functional.quantize_blockwise(values, blocksize=100)
    for blocksize in (101, 2**31, 10**400):
        larger, state_of_larger = functional.quantize_blockwise(values, blocksize=blocksize)
        assert torch.equal(larger, codes) and torch.equal(state_of_larger.absmax, state.absmax)
        assert torch.equal(
            functional.dequantize_blockwise(larger, state_of_larger), functional.dequantize_blockwise(codes, state)
        )


def test_exponents_beyond_the_bits_change_nothing():
    assert torch.equal(functional.create_dynamic_map(True, 2**62), functional.create_dynamic_map(True, 8))


@pytest.mark.parametrize(
    "shape", [(2**63,), (2**62,), (2**40, 2**40), (-1,), (1.5,), ("4",), (None,), ((4, 4),)], ids=str
)
def test_paged_tensors_of_no_possible_size_are_refused(shape):
    with pytest.raises((TypeError, ValueError), match=r"^shape: "):
        functional.get_paged(*shape, device="cpu")


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nowhere", 1.5], ids=str)
def test_paged_tensors_of_devices_without_paged_memory_are_refused(device):
    with pytest.raises((TypeError, ValueError), match=r"^device: "):
        functional.get_paged(4, device=device)


def test_a_float_map_spans_one_whatever_its_fields():
    assert functional.create_fp8_map(False, 8, 0, 8).max() == 1
    with pytest.raises(ValueError, match=r"^exponent_bits: "):
        functional.create_fp8_map(True, 0, 0, 1)


@pytest.mark.parametrize("offset", [0.5, 1.0, 0.0, -1.0, 2.0, NAN])
def test_normal_maps_of_no_quantile_are_refused(offset):
    with pytest.raises(ValueError, match=r"^offset: "):
        functional.create_normal_map(offset)


@pytest.mark.parametrize("primitive", [primitives.quantize_4bit, primitives.int8_double_quant], ids=lambda p: p.name)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("out", ["text", (None,), ("text", "text")], ids=str)
def test_outputs_of_the_wrong_kind_are_refused_by_name(primitive, device, out):
    arguments = (_on_meta if device == "meta" else valid_arguments)(primitive.name)
    with pytest.raises((TypeError, ValueError), match=r"^out(\[0\])?: "):
        primitive(*positional(primitive, arguments), out=out)


def test_every_function_of_the_api_is_called_here():
    called = {function for function, _ in CALLS.values()}
    functions = {value for name in functional.__all__ if inspect.isfunction(value := getattr(functional, name))}
    assert functions <= called
