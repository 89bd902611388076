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
from api_calls import CALLS, A, step
from torch import nn

import bnb_core
from bnb_core import functional, primitives
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
    of_float, of_tensor = step("optimizer_update_32bit"), {**step("optimizer_update_32bit"), "lr": lr}
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
