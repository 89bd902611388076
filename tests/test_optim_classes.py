"""The optimizer classes: their signatures, settings, states and state dicts, and how they fit into torch."""

import copy
import inspect
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bnb_core import optim, paged
from bnb_core.optim import GlobalOptimManager
from bnb_core.optim.optimizer import Optimizer1State, Optimizer2State

KEY = "__bnb_optimizer_quant_state__"
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


@pytest.fixture(autouse=True)
def fresh_manager():
    GlobalOptimManager.get_instance().initialize()
    yield
    GlobalOptimManager.get_instance().initialize()


@pytest.fixture
def paged_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(paged.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


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


@every_class
def test_signature(name):
    parameters = inspect.signature(getattr(optim, name)).parameters
    assert tuple(parameters) == SIGNATURES[FAMILY[name]]
    expected = {"optim_bits": 32, "min_8bit_size": 4096, **DEFAULTS[FAMILY[name]]}
    assert {key: parameters[key].default for key in expected} == expected


TWO_STATES = ("Adam", "AdamW", "LAMB", "AdEMAMix")
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
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == BASES[base]


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


@every_class
def test_state_has_the_promised_form(name, backend):
    large, small = parameter(64, 64), parameter(10)
    optimizer = build(name, [large, small])
    take_steps(optimizer, last=1)
    states = 2 if FAMILY[name] in ("Adam", "AdamW", "LAMB", "AdEMAMix") else 1
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

    optimizer = optim.AdEMAMix([parameter(3)], t_alpha=100, t_beta3=100)
    alpha, beta3 = optimizer.scheduled(optimizer.get_config(0, 0, optimizer.param_groups[0]), step)
    b1, b3, share = 0.9, 0.9999, step / 100
    assert alpha == pytest.approx(min(5.0 * share, 5.0))
    interpolated = exp(log(b1) * log(b3) / ((1 - share) * log(b3) + share * log(b1)))
    assert beta3 == pytest.approx(min(interpolated, b3), rel=1e-12)


def test_ademamix_without_fast_average_has_a_schedule():
    optimizer = optim.AdEMAMix([parameter(3)], betas=(0.0, 0.999, 0.9999), t_beta3=100)
    _, beta3 = optimizer.scheduled(optimizer.get_config(0, 0, optimizer.param_groups[0]), 50)
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


DAMAGE = {
    "state1 missing": ("state1", lambda s: s[KEY].pop("state1")),
    "qmap2 missing": ("qmap2", lambda s: s[KEY].pop("qmap2")),
    "absmax1 missing": ("absmax1", lambda s: s[KEY].pop("absmax1")),
    "step missing": ("step", lambda s: s.pop("step")),
    "step negative": ("step", lambda s: s.update(step=-1)),
    "step fractional": ("step", lambda s: s.update(step=1.5)),
    "step infinite": ("step", lambda s: s.update(step=float("inf"))),
    "state1 of another shape": ("state1", lambda s: s[KEY].update(state1=s[KEY]["state1"][1:])),
    "state1 of another dtype": ("state1", lambda s: s[KEY].update(state1=s[KEY]["state1"].half())),
    "state2 of another dtype": ("state2", lambda s: s[KEY].update(state2=s[KEY]["state2"].float())),
    "absmax1 too short": ("absmax1", lambda s: s[KEY].update(absmax1=s[KEY]["absmax1"][1:])),
    "absmax2 of another dtype": ("absmax2", lambda s: s[KEY].update(absmax2=s[KEY]["absmax2"].half())),
    "qmap1 too short": ("qmap1", lambda s: s[KEY].update(qmap1=s[KEY]["qmap1"][:16])),
    "qmap1 not ascending": ("qmap1", lambda s: s[KEY].update(qmap1=s[KEY]["qmap1"].flip(0))),
    "state1 not a tensor": ("state1", lambda s: s[KEY].update(state1=[1, 2])),
    "unknown key": ("max_exp_avg", lambda s: s.update(max_exp_avg=torch.zeros(1))),
    "key twice": ("state1", lambda s: s.update(state1=s[KEY]["state1"])),
    "group not a dict": (KEY, lambda s: s.update({KEY: [1]})),
}


class TestStateDict:
    def saved(self, name="Adam8bit"):
        p = parameter(70, 60)
        optimizer = build(name, [p])
        take_steps(optimizer)
        return p, optimizer, optimizer.state_dict()

    def test_quantized_tensors_are_grouped(self):
        _, _, state_dict = self.saved()
        state = state_dict["state"][0]
        assert state.keys() == {"step", KEY}
        assert state[KEY].keys() == {"state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2"}

    def test_32bit_state_is_flat(self):
        _, _, state_dict = self.saved("Adam")
        assert state_dict["state"][0].keys() == {"step", "state1", "state2"}

    def test_saving_leaves_the_optimizer_as_it_is(self):
        p, optimizer, _ = self.saved()
        assert "state1" in optimizer.state[p] and KEY not in optimizer.state[p]

    def test_loaded_state_shares_no_memory(self):
        p, _, state_dict = self.saved()
        optimizer = build("Adam8bit", [p])
        optimizer.load_state_dict(state_dict)
        for key, value in state_dict["state"][0][KEY].items():
            assert optimizer.state[p][key].data_ptr() != value.data_ptr()
        expected = {key: value.clone() for key, value in optimizer.state[p].items() if key != "step"}
        for value in state_dict["state"][0][KEY].values():
            value.zero_()
        # The state dict's own codebook is zeroed with it: a fresh optimizer must not have taken it over.
        other = build("Adam8bit", [parameter(70, 60)])
        assert other.name2qmap["dynamic"].any()
        for key in ("state1", "state2", "absmax1", "absmax2"):
            assert torch.equal(optimizer.state[p][key], expected[key])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_loading_keeps_the_dtypes_of_the_state(self, dtype):
        p = nn.Parameter(parameter(70, 60).detach().to(dtype))
        for name, expected in (("Adam8bit", torch.uint8), ("Adam", torch.float32)):
            optimizer = build(name, [p])
            take_steps(optimizer, last=1)
            other = build(name, [p])
            other.load_state_dict(optimizer.state_dict())
            assert other.state[p]["state1"].dtype == expected

    def test_settings_are_loaded_and_missing_ones_are_defaults(self):
        _, optimizer, state_dict = self.saved()
        state_dict["param_groups"][0].update(lr=0.5)
        del state_dict["param_groups"][0]["eps"]
        optimizer.load_state_dict(state_dict)
        assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["eps"] == 1e-8

    def test_without_moving_the_next_step_moves(self):
        p, _, state_dict = self.saved()
        optimizer = build("Adam8bit", [p])
        optimizer.load_state_dict(state_dict, move_to_device=False)
        take_steps(optimizer, last=1)
        assert optimizer.state[p]["step"] == 4

    def test_parameter_without_state_stays_without(self):
        p, unused = parameter(5), parameter(5)
        optimizer = optim.Adam([p, unused])
        p.grad = torch.ones(5)
        optimizer.step()
        other = optim.Adam([p, unused])
        other.load_state_dict(optimizer.state_dict())
        assert unused not in other.state and p in other.state

    def test_hooks_run(self):
        _, optimizer, state_dict = self.saved()
        calls = []
        optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("post"))
        optimizer.load_state_dict(state_dict)
        assert calls == ["pre", "post"]

    @pytest.mark.parametrize("key, damage", DAMAGE.values(), ids=DAMAGE.keys())
    def test_damage_is_an_error_that_names_the_key_and_changes_nothing(self, key, damage):
        params = [parameter(70, 60), parameter(70, 60)]
        optimizer = build("Adam8bit", params)
        take_steps(optimizer)
        state_dict = copy.deepcopy(optimizer.state_dict())
        damage(state_dict["state"][1])
        take_steps(optimizer, 3, 4)
        before, groups_before = copy.deepcopy(optimizer.state_dict()["state"]), optimizer.param_groups
        with pytest.raises(ValueError, match=rf"state\[1\]\['{key}'\]"):
            optimizer.load_state_dict(state_dict)
        after = optimizer.state_dict()["state"]
        for index in (0, 1):
            assert after[index]["step"] == before[index]["step"] == 4
            assert_same_state(after[index][KEY], before[index][KEY])
        assert optimizer.param_groups is groups_before

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda d: d.pop("state"), "^state: "),
            (lambda d: d.update(state=[]), "^state: "),
            (lambda d: d.pop("param_groups"), "^param_groups: "),
            (lambda d: d["param_groups"].append(d["param_groups"][0]), "^param_groups: "),
            (lambda d: d["param_groups"][0]["params"].append(7), r"^param_groups\[0\]\['params'\]: "),
            (lambda d: d["param_groups"][0].update(betas=(0.9,)), "^betas: "),
            (lambda d: d["state"].update({9: d["state"][0]}), r"^state\[9\]: "),
        ],
    )
    def test_damaged_outline_is_an_error(self, damage, message):
        _, optimizer, state_dict = self.saved()
        state_dict = copy.deepcopy(state_dict)
        damage(state_dict)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state_dict)


class TestPaged:
    def test_steps_like_unpaged_state(self, paged_folder, backend):
        p, expected = parameter(400, 300), parameter(400, 300)
        optimizer, expected_optimizer = optim.PagedAdamW8bit([p]), optim.AdamW8bit([expected])
        take_steps(optimizer)
        take_steps(expected_optimizer)
        assert torch.equal(p, expected)
        assert_same_state(optimizer.state[p], expected_optimizer.state[expected])
        assert optimizer.state[p]["state1"].is_paged and optimizer.state[p]["state2"].is_paged

    def test_small_state_is_not_paged(self):
        optimizer = optim.PagedAdamW([parameter(300, 300)])
        take_steps(optimizer, last=1)
        (state,) = optimizer.state.values()
        assert not hasattr(state["state1"], "is_paged")

    @pytest.mark.parametrize("duplicate", ["load", "load and move later", "deepcopy", "pickle"])
    def test_copied_state_is_paged_again(self, paged_folder, duplicate):
        optimizer = optim.PagedAdamW([parameter(400, 300)])
        take_steps(optimizer)
        if duplicate == "deepcopy":
            twin = copy.deepcopy(optimizer)
        elif duplicate == "pickle":
            twin = pickle.loads(pickle.dumps(optimizer))
        else:
            twin = optim.PagedAdamW([nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())])
            twin.load_state_dict(optimizer.state_dict(), move_to_device=duplicate == "load")
        take_steps(optimizer, 3, 4)
        take_steps(twin, 3, 4)
        ((p, state),), ((twin_p, twin_state),) = optimizer.state.items(), twin.state.items()
        assert torch.equal(twin_p, p)
        assert_same_state(twin_state, state)
        assert twin_state["state1"].is_paged
        assert twin_state["state1"].data_ptr() != state["state1"].data_ptr()
