"""Optimizer1State and Optimizer2State, for callers that derive from them."""

import inspect

import pytest
import torch
from optimizers import (
    COMMON,
    FAMILY,
    TWO_STATES,
    assert_same_state,
    build,
    every_class,
    every_family,
    parameter,
    take_steps,
)

from bnb_core import optim
from bnb_core.optim.optimizer import Optimizer1State, Optimizer2State

SHARED = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, "optim_bits": 32, "args": None, "min_8bit_size": 4096}
BOUNDED = {"max_unorm": 0.0, "skip_zeros": False, "is_paged": False}
BASES = {
    Optimizer1State: {**SHARED, **BOUNDED, "betas": (0.9, 0.0)},
    Optimizer2State: {**SHARED, **BOUNDED, "betas": (0.9, 0.999), "alpha": 0.0, "t_alpha": None, "t_beta3": None},
}
BASE_SIGNATURE = ("optimizer_name", "params", "lr", "betas", "eps", "weight_decay", *COMMON, *BOUNDED)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_signature_of_the_bases(base):
    parameters = inspect.signature(base).parameters
    assert tuple(parameters)[: len(BASE_SIGNATURE)] == BASE_SIGNATURE
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == {**BASES[base], "capturable": False}


@every_class
def test_classes_derive_from_the_base_that_has_their_states(name):
    assert issubclass(getattr(optim, name), Optimizer2State if FAMILY[name] in TWO_STATES else Optimizer1State)


@every_family
@pytest.mark.parametrize("bits", [8, 32])
def test_bases_run_the_rule_that_they_are_given(family, bits):
    settings = {"t_alpha": 5, "t_beta3": 5} if family == "AdEMAMix" else {}
    expected = build(family, [parameter(300)], optim_bits=bits, min_8bit_size=16, **settings)
    base = Optimizer2State if family in TWO_STATES else Optimizer1State
    arguments = {**expected.defaults, "max_unorm": expected.args.max_unorm, "optim_bits": bits, "min_8bit_size": 16}
    optimizer = base(expected.optimizer_name, [parameter(300)], **arguments)
    for each in (optimizer, expected):
        take_steps(each)
    for p, twin in zip(optimizer.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        assert torch.equal(p, twin)
        assert_same_state(optimizer.state[p], expected.state[twin])


def test_a_limit_that_is_meant_is_kept():
    optimizer = Optimizer2State("adam", [parameter(3)], max_unorm=100.0, skip_zeros=True)
    assert optimizer.args.max_unorm == 100.0 and optimizer.args.skip_zeros


@pytest.mark.parametrize("base, rule", [(Optimizer1State, "adam"), (Optimizer2State, "lion"), (Optimizer2State, "sgd")])
def test_a_rule_with_other_states_is_an_error(base, rule):
    with pytest.raises(ValueError, match=r"^optimizer_name: "):
        base(rule, [parameter(3)])
