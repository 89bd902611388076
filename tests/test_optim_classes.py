"""The optimizer classes: their signatures, settings and states, and how they fit into torch."""

import copy
import inspect
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from optimizers import (
    FAMILY,
    FIXED_BITS,
    SIGNATURES,
    TWO_STATES,
    assert_same_state,
    build,
    every_class,
    parameter,
    take_steps,
)
from torch import nn

from bnb_core import optim
from bnb_core.optim import GlobalOptimManager
from bnb_core.records import OptimizerStep
from bnb_core.step_numbers import alpha_and_beta3

DEFAULTS = {
    "Adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0},
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0},
    "SGD": {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False},
    "RMSprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False},
    "Adagrad": {"lr": 1e-2, "lr_decay": 0, "weight_decay": 0, "initial_accumulator_value": 0, "eps": 1e-10},
    "LAMB": {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "adam_w_mode": True, "max_unorm": 1.0},
    "LARS": {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "max_unorm": 0.02},
    "AdEMAMix": {"lr": 1e-3, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "t_alpha": None, "weight_decay": 1e-2},
}


@every_class
def test_signature(name):
    parameters = inspect.signature(getattr(optim, name)).parameters
    bits = 8 if name == "Adagrad8bit" else 32
    expected = {"optim_bits": bits, "min_8bit_size": 4096, **DEFAULTS[FAMILY[name]]}
    names = SIGNATURES[FAMILY[name]]
    if name.endswith("bit") and FAMILY[name] in FIXED_BITS:
        names = tuple(key for key in names if key != "optim_bits")
        del expected["optim_bits"]
    assert tuple(parameters) == (*names, "capturable")
    assert parameters["capturable"].kind is inspect.Parameter.KEYWORD_ONLY and not parameters["capturable"].default
    assert {key: parameters[key].default for key in expected} == expected


GIVEN = {
    **{"lr": 0.5, "betas": (0.5, 0.25), "eps": 1e-3, "weight_decay": 0.25, "momentum": 0.5, "alpha": 0.75},
    **{"t_alpha": 3, "t_beta3": 4, "min_8bit_size": 16, "max_unorm": 0.5, "is_paged": True},
    "args": SimpleNamespace(skip_zeros=True),
}
GIVEN_OTHERWISE = {"AdEMAMix": {"betas": (0.5, 0.25, 0.75)}, "RMSprop": {"momentum": 0}}


@pytest.mark.parametrize("name", [name for name in FAMILY if name.endswith("bit") and FAMILY[name] in FIXED_BITS])
def test_a_class_of_fixed_bits_takes_the_other_arguments_in_their_places(name):
    values = {**GIVEN, **GIVEN_OTHERWISE.get(FAMILY[name], {})}
    _, *parameters = inspect.signature(getattr(optim, name)).parameters.values()
    assert parameters.pop().name == "capturable"
    given = {parameter.name: values.get(parameter.name, parameter.default) for parameter in parameters}
    optimizer = getattr(optim, name)([parameter(4, 4)], *given.values())
    bits = 8 if name.endswith("8bit") else 32
    expected = getattr(optim, FAMILY[name])([parameter(4, 4)], **given, optim_bits=bits)
    assert optimizer.defaults == expected.defaults and vars(optimizer.args) == vars(expected.args)
    assert optimizer.is_paged == expected.is_paged


@every_class
def test_state_has_the_promised_form(name, backend):
    large, small = parameter(64, 64), parameter(10)
    optimizer = build(name, [large, small])
    take_steps(optimizer, last=1)
    states = 2 if FAMILY[name] in TWO_STATES else 1
    kinds = ("state", "qmap", "absmax") if name.endswith("8bit") else ("state",)
    expected = {"step"} | {f"{kind}{i}" for kind in kinds for i in range(1, states + 1)}
    if FAMILY[name] in ("LAMB", "LARS"):
        expected.add("unorm_vec")
    assert optimizer.state[large].keys() == expected
    assert optimizer.state[large]["state1"].dtype == (torch.uint8 if name.endswith("8bit") else torch.float32)
    assert optimizer.state[small]["state1"].dtype == torch.float32
    assert optimizer.is_paged == name.startswith("Paged")


@every_class
def test_interrupted_run_ends_like_an_uninterrupted_one(name, backend):
    params = [parameter(64, 66), parameter(10)]
    optimizer = build(name, params)
    take_steps(optimizer, last=3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed_params = copy.deepcopy(params)
    resumed = build(name, resumed_params)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p, resumed_p in zip(params, resumed_params, strict=True):
        assert_same_state(resumed.state[resumed_p], optimizer.state[p])
    take_steps(optimizer, 3, 6)
    take_steps(resumed, 3, 6)
    for p, resumed_p in zip(params, resumed_params, strict=True):
        assert torch.equal(resumed_p, p)


@every_class
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copy_steps_like_the_original(name, duplicate):
    optimizer = build(name, [parameter(64, 66)], min_8bit_size=2048)
    take_steps(optimizer, last=2)
    twin = duplicate(optimizer)
    (p,), (twin_p,) = optimizer.param_groups[0]["params"], twin.param_groups[0]["params"]
    assert vars(twin.args) == vars(optimizer.args) and twin.is_paged == optimizer.is_paged
    take_steps(optimizer, 2, 4)
    take_steps(twin, 2, 4)
    assert torch.equal(twin_p, p)
    assert_same_state(twin.state[twin_p], optimizer.state[p])


UNSUPPORTED = [
    ("Adam", {"amsgrad": True}),
    ("AdamW8bit", {"amsgrad": True}),
    ("SGD", {"nesterov": True}),
    ("SGD", {"dampening": 0.1}),
    ("LARS", {"nesterov": True}),
    ("LARS", {"dampening": 0.1}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("Adagrad", {"lr_decay": 0.1}),
    ("Adagrad", {"initial_accumulator_value": 0.1}),
    ("LAMB", {"bias_correction": False}),
    ("LAMB", {"amsgrad": True}),
    ("LAMB", {"adam_w_mode": False}),
    ("Adam32bit", {"optim_bits": 8}),
    ("Adagrad8bit", {"optim_bits": 32}),
    ("Adam", {"optim_bits": 4}),
    ("Adam", {"lr": -1.0}),
    ("Adam", {"lr": float("nan")}),
    ("Adam", {"betas": (0.9, 1.0)}),
    ("Adam", {"betas": (0.9,)}),
    ("Adam", {"betas": 0.9}),
    ("AdEMAMix", {"betas": (0.9, 0.999)}),
    ("AdEMAMix", {"t_alpha": 0}),
    ("Adam", {"eps": -1e-8}),
    ("Adam", {"weight_decay": -0.1}),
    ("LAMB", {"max_unorm": -1.0}),
    ("Adam", {"min_8bit_size": -1}),
]


@pytest.mark.parametrize("name, arguments", UNSUPPORTED, ids=lambda value: str(value))
def test_what_cannot_be_honoured_is_an_error_that_names_the_argument(name, arguments):
    (argument,) = arguments
    with pytest.raises(ValueError, match=f"^{argument}: "):
        build(name, [parameter(3)], **arguments)


def test_max_unorm_is_an_error_where_the_rule_has_none():
    with pytest.raises(ValueError, match="max_unorm"):
        optim.Adagrad([parameter(3)], args=SimpleNamespace(max_unorm=1.0))


def test_args_take_the_place_of_arguments():
    args = SimpleNamespace(optim_bits=8, min_8bit_size=16, max_unorm=0.5, skip_zeros=True, is_paged=True, extra=1)
    optimizer = optim.Adam([parameter(4, 4)], args=args)
    take_steps(optimizer, last=1)
    (state,) = optimizer.state.values()
    assert state["state1"].dtype == torch.uint8 and "unorm_vec" in state
    assert optimizer.is_paged and optimizer.args.skip_zeros


def test_base_attributes_that_callers_use():
    optimizer = optim.Adam8bit([parameter(4)])
    assert optimizer.mng is GlobalOptimManager.get_instance()
    assert optimizer.name2qmap.keys() == {"dynamic", "udynamic"}
    optimizer.name2qmap.clear()
    optimizer.fill_qmap()
    assert optimizer.name2qmap.keys() == {"dynamic", "udynamic"}
    assert {"state1", "qmap2", "absmax1", "unorm_vec"} <= optimizer.non_castable_tensor_keys
    config = optimizer.get_config(0, 0, optimizer.param_groups[0])
    assert config["optim_bits"] == 8 and config["lr"] == 1e-3
    assert optimizer.get_state_buffer(parameter(2, 3), dtype=torch.uint8).shape == (2, 3)


def test_sgd_without_momentum_is_plain_descent_and_keeps_no_state(backend):
    p, expected = parameter(70, 70), parameter(70, 70)
    optimizer, torch_optimizer = optim.SGD8bit([p], lr=0.1), torch.optim.SGD([expected], lr=0.1)
    take_steps(optimizer)
    take_steps(torch_optimizer)
    torch.testing.assert_close(p, expected)
    assert optimizer.state[p] == {"step": 3}
    resumed = optim.SGD8bit([p], lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.state[p] == {"step": 3}


def test_momentum_that_starts_late_makes_its_state(backend):
    p, expected = parameter(7), parameter(7)
    optimizer, torch_optimizer = optim.SGD([p], lr=0.1), torch.optim.SGD([expected], lr=0.1)
    take_steps(optimizer, last=2)
    take_steps(torch_optimizer, last=2)
    optimizer.param_groups[0]["betas"] = (0.9, 0.0)
    torch_optimizer.param_groups[0]["momentum"] = 0.9
    take_steps(optimizer, 2, 5)
    take_steps(torch_optimizer, 2, 5)
    torch.testing.assert_close(p, expected)


TORCH_TWINS = {
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"weight_decay": 0.1}),
    "Adagrad": (torch.optim.Adagrad, {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", TORCH_TWINS)
def test_32bit_agrees_with_torch(name, backend):
    torch_class, arguments = TORCH_TWINS[name]
    p, expected = parameter(33, 5), parameter(33, 5)
    take_steps(getattr(optim, name)([p], lr=0.01, **arguments), last=10)
    take_steps(torch_class([expected], lr=0.01, **arguments), last=10)
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_pytorch_lars_without_limit_is_torch_sgd():
    arguments = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    p, expected = parameter(33, 5), parameter(33, 5)
    take_steps(optim.PytorchLARS([p], max_unorm=0, **arguments))
    take_steps(torch.optim.SGD([expected], **arguments))
    torch.testing.assert_close(p, expected)
    with pytest.raises(ValueError, match="nesterov"):
        optim.PytorchLARS([p], nesterov=True)


def test_pytorch_lars_agrees_with_lars(backend):
    p, expected = parameter(33, 5), parameter(33, 5)
    take_steps(optim.LARS([p], lr=0.1, momentum=0.9, weight_decay=0.1))
    take_steps(optim.PytorchLARS([expected], lr=0.1, momentum=0.9, weight_decay=0.1))
    torch.testing.assert_close(p, expected)


@pytest.mark.parametrize("step", [1, 7, 50, 100, 200])
def test_ademamix_schedules(step):
    from math import exp, log

    settings = OptimizerStep("ademamix", step, 0.1, 0.9, 0.999, 0.9999, alpha=5.0, t_alpha=100.0, t_beta3=100.0)
    alpha, beta3 = alpha_and_beta3(settings)
    b1, b3, share = 0.9, 0.9999, step / 100
    assert alpha == pytest.approx(min(5.0 * share, 5.0))
    interpolated = exp(log(b1) * log(b3) / ((1 - share) * log(b3) + share * log(b1)))
    assert beta3 == pytest.approx(min(interpolated, b3), rel=1e-12)


def test_ademamix_without_fast_average_has_a_schedule():
    _, beta3 = alpha_and_beta3(OptimizerStep("ademamix", 50, 0.1, 0.0, 0.999, 0.9999, t_beta3=100.0))
    assert beta3 == pytest.approx(0.9999**2)


def test_groups_have_their_own_settings(backend):
    first, second, later = parameter(5), parameter(5), parameter(5)
    optimizer = optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.2}], lr=0.1)
    optimizer.add_param_group({"params": [later], "lr": 0.3})
    for p in (first, second, later):
        p.grad = torch.ones(5)
    optimizer.step()
    for p, lr in ((first, 0.1), (second, 0.2), (later, 0.3)):
        torch.testing.assert_close(p.detach(), parameter(5).detach() - lr)


def test_rejected_group_is_not_added():
    optimizer = optim.Adam([parameter(3)])
    with pytest.raises(ValueError, match=r"^lr: "):
        optimizer.add_param_group({"params": [parameter(3)], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_scheduler_sets_the_step_size(backend):
    p = parameter(5)
    optimizer = optim.SGD([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(3):
        p.grad = torch.ones(5)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(p.detach(), parameter(5).detach() - 1.75)


def test_one_cycle_moves_the_momentum():
    optimizer = optim.Adam([parameter(5)])
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10, base_momentum=0.8, max_momentum=0.95)
    assert optimizer.param_groups[0]["betas"] == (0.95, 0.999)


def test_closure_is_evaluated_with_gradients_and_its_loss_returned(backend):
    p = parameter(5)
    optimizer = optim.Adam([p])

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]


def test_parameters_without_gradient_are_left_alone(backend):
    p, frozen = parameter(5), parameter(5)
    optimizer = optim.Adam([p, frozen])
    p.grad = torch.ones(5)
    optimizer.step()
    assert torch.equal(frozen, parameter(5)) and frozen not in optimizer.state
    assert optimizer.state_dict()["state"].keys() == {0}


def test_grad_scaler_skips_the_step_with_an_infinite_gradient(backend):
    p = parameter(5)
    optimizer = optim.Adam([p])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for gradient in (1.0, float("inf")):
        before = p.detach().clone()
        scaler.scale((p * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert torch.equal(p, before) and optimizer.state[p]["step"] == 1


def test_sparse_gradient_is_an_error_before_anything_moves():
    dense, sparse = parameter(5), parameter(5)
    optimizer = optim.Adam([dense, sparse])
    dense.grad, sparse.grad = torch.ones(5), torch.ones(5).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert torch.equal(dense, parameter(5)) and not optimizer.state[dense]


@pytest.mark.parametrize("name", ["Adam8bit", "Lion32bit", "LAMB8bit", "AdEMAMix8bit"])
def test_transposed_parameter_steps_like_a_contiguous_one(name, backend):
    p, expected = (
        nn.Parameter(parameter(80, 70).detach().t()),
        nn.Parameter(parameter(80, 70).detach().t().contiguous()),
    )
    optimizer, expected_optimizer = build(name, [p]), build(name, [expected])
    take_steps(optimizer)
    take_steps(expected_optimizer)
    assert not p.is_contiguous() and torch.equal(p, expected)
    assert optimizer.state[p]["state1"].is_contiguous()
    assert_same_state(optimizer.state[p], expected_optimizer.state[expected])


def test_8bit_bfloat16_parameters_train(backend):
    p = nn.Parameter(parameter(80, 70).detach().bfloat16())
    optimizer = optim.AdamW8bit([p], lr=0.1)
    for _ in range(30):
        p.grad = p.detach().clone()
        optimizer.step()
    assert p.abs().mean() < 0.2
