"""GlobalOptimManager: settings of single parameters hold whatever the order of the calls."""

import gc
import weakref

import pytest
import torch
from torch import nn

from bnb_core import optim
from bnb_core.optim import GlobalOptimManager


def parameter(*shape):
    return nn.Parameter(torch.ones(shape))


def take_step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


ORDERS = [
    ("register", "override", "build"),
    ("override", "register", "build"),
    ("override", "build", "register"),
    ("build", "override", "register"),
    ("build", "register", "override"),
    ("register", "build", "override"),
    ("override", "build"),
    ("build", "override"),
    ("override", "move", "build"),
    ("build", "override", "move"),
]


class TestOverrides:
    """An override holds in whatever order it, the registration, the optimizer and the module's move come."""

    def run(self, order, override):
        module = nn.Linear(70, 70, bias=False)
        manager, made = GlobalOptimManager.get_instance(), {}
        actions = {
            "register": lambda: manager.register_parameters(module.parameters()),
            "override": lambda: override(manager, module),
            "build": lambda: made.update(optimizer=optim.Adam8bit(module.parameters())),
            "move": lambda: module.to(torch.bfloat16).to("cpu"),
        }
        for action in order:
            actions[action]()
        take_step(made["optimizer"])
        return made["optimizer"].state[module.weight]["state1"].dtype

    @pytest.mark.parametrize("order", ORDERS, ids="-".join)
    @pytest.mark.parametrize(
        "override",
        [
            lambda manager, module: manager.override_config(module.weight, "optim_bits", 32),
            lambda manager, module: manager.override_config([module.weight], key_value_dict={"optim_bits": 32}),
            lambda manager, module: manager.register_module_override(module, "weight", {"optim_bits": 32}),
        ],
        ids=["parameter", "dict", "module"],
    )
    def test_holds_in_any_order(self, order, override):
        assert self.run(order, override) == torch.float32
        assert self.run(order, lambda *_: None) == torch.uint8

    def test_module_override_follows_a_replaced_parameter(self):
        module = nn.Linear(70, 70, bias=False)
        GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
        module.weight = nn.Parameter(torch.randn(70, 70))
        optimizer = optim.Adam8bit(module.parameters())
        take_step(optimizer)
        assert optimizer.state[module.weight]["state1"].dtype == torch.float32

    def test_touches_only_its_own_parameter(self):
        p, other = parameter(70, 70), parameter(70, 70)
        GlobalOptimManager.get_instance().override_config(p, "lr", 0.0)
        optimizer = optim.Adam8bit([p, other])
        take_step(optimizer)
        assert torch.equal(p, parameter(70, 70)) and not torch.equal(other, parameter(70, 70))

    def test_holds_from_the_next_step_on(self):
        p = parameter(5)
        optimizer = optim.Adam([p])
        take_step(optimizer)
        moved = p.detach().clone()
        GlobalOptimManager.get_instance().override_config(p, "lr", 0.0)
        take_step(optimizer)
        assert torch.equal(p, moved)
        assert optimizer.get_config(0, 0, optimizer.param_groups[0])["lr"] == 0.0

    def test_later_override_of_a_key_wins_and_others_remain(self):
        p = parameter(5)
        manager = GlobalOptimManager.get_instance()
        manager.override_config(p, key_value_dict={"lr": 0.5, "eps": 0.25})
        manager.override_config(p, "lr", 0.75)
        assert manager.resolve() == {id(p): {"lr": 0.75, "eps": 0.25}}

    def test_keeps_nothing_alive(self):
        module = nn.Linear(2, 2)
        manager = GlobalOptimManager.get_instance()
        manager.override_config(module.weight, "lr", 0.1)
        manager.register_module_override(module, "bias", {"lr": 0.1})
        gone = weakref.ref(module)
        del module
        gc.collect()
        assert gone() is None and manager.resolve() == {}

    def test_mistakes_are_named(self):
        manager, p = GlobalOptimManager.get_instance(), parameter(3)
        with pytest.raises(ValueError, match="bits"):
            manager.override_config(p, "bits", 8)
        with pytest.raises(ValueError, match="optim_bits: expected 8 or 32"):
            manager.override_config(p, "optim_bits", 16)
        with pytest.raises(ValueError, match="key"):
            manager.override_config(p)
        with pytest.raises(TypeError, match="parameters: expected tensors, got str"):
            manager.override_config(["weight"], "lr", 0.1)
        with pytest.raises(ValueError, match="param_name"):
            manager.register_module_override(nn.Linear(2, 2), "wait", {"lr": 0.1})
        with pytest.raises(RuntimeError, match="get_instance"):
            GlobalOptimManager()

    def test_override_that_the_rule_cannot_honour_stops_the_step(self):
        p = parameter(3)
        GlobalOptimManager.get_instance().override_config(p, "max_unorm", 1.0)
        with pytest.raises(ValueError, match="max_unorm"):
            take_step(optim.Adagrad([p]))


def test_overrides_by_modules_are_listed_while_the_modules_live():
    manager, embedding, other = GlobalOptimManager.get_instance(), nn.Embedding(8, 4), nn.Linear(4, 4)
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    manager.register_module_override(other, "weight", {"lr": 0.1})
    manager.override_config(other.bias, "lr", 0.2)
    listed = manager.module_weight_config_triple
    assert listed == [(embedding, "weight", {"optim_bits": 32}), (other, "weight", {"lr": 0.1})]
    listed[0][2]["optim_bits"] = 8
    del listed, other
    assert manager.module_weight_config_triple == [(embedding, "weight", {"optim_bits": 32})]
