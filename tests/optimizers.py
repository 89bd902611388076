"""Every optimizer class by name, and steps of it that can be repeated."""

import pytest
import torch
from torch import nn

from bnb_core import optim

COMMON = ("optim_bits", "args", "min_8bit_size")
ADAM = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad", *COMMON, "is_paged")
SIGNATURES = {
    "Adam": ADAM,
    "AdamW": ADAM,
    "Lion": ("params", "lr", "betas", "weight_decay", *COMMON, "is_paged"),
    "SGD": ("params", "lr", "momentum", "dampening", "weight_decay", "nesterov", *COMMON),
    "RMSprop": ("params", "lr", "alpha", "eps", "weight_decay", "momentum", "centered", *COMMON),
    "Adagrad": ("params", "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps", *COMMON),
    "LAMB": (
        *("params", "lr", "bias_correction", "betas", "eps", "weight_decay", "amsgrad", "adam_w_mode"),
        *(*COMMON, "max_unorm"),
    ),
    "LARS": ("params", "lr", "momentum", "dampening", "weight_decay", "nesterov", *COMMON, "max_unorm"),
    "AdEMAMix": (
        *("params", "lr", "betas", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay"),
        *("optim_bits", "min_8bit_size", "is_paged"),
    ),
}
# Where the bits are in the name of a class, they are no argument.
FIXED_BITS = ("Lion", "SGD", "RMSprop", "LAMB", "LARS", "AdEMAMix")
TWO_STATES = ("Adam", "AdamW", "LAMB", "AdEMAMix")
PAGED = ("Adam", "AdamW", "Lion", "AdEMAMix")
FAMILY = {
    f"{prefix}{family}{bits}": family
    for family in SIGNATURES
    for prefix in ("", "Paged")
    for bits in ("", "8bit", "32bit")
    if not prefix or family in PAGED
}
ARGUMENTS = {"SGD": {"momentum": 0.9}, "LARS": {"momentum": 0.9}}
every_class = pytest.mark.parametrize("name", FAMILY)
every_family = pytest.mark.parametrize("family", SIGNATURES)


def parameter(*shape, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def build(name, params, **arguments):
    return getattr(optim, name)(params, **{"lr": 0.01, **ARGUMENTS.get(FAMILY[name], {}), **arguments})


def take_steps(optimizer, first=0, last=3):
    """Steps whose gradients depend on the step's number only."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(actual[key], value) if isinstance(value, torch.Tensor) else actual[key] == value
        assert same, key
