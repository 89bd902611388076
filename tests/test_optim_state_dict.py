"""State dicts of the optimizers: what they hold, what is loaded, and what is refused."""

import copy
import errno
import sys

import pytest
import torch
from optimizers import assert_same_state, build, parameter, take_steps
from torch import nn

from bnb_core import optim

KEY = "__bnb_optimizer_quant_state__"
DAMAGE = {
    "state1 missing": ("state1", lambda s: s[KEY].pop("state1")),
    "qmap2 missing": ("qmap2", lambda s: s[KEY].pop("qmap2")),
    "absmax1 missing": ("absmax1", lambda s: s[KEY].pop("absmax1")),
    "step missing": ("step", lambda s: s.pop("step")),
    "step negative": ("step", lambda s: s.update(step=-1)),
    "step fractional": ("step", lambda s: s.update(step=1.5)),
    "step beyond what a double counts": ("step", lambda s: s.update(step=2**53 + 1)),
    "step of 400 digits": ("step", lambda s: s.update(step=10**400)),
    "step on meta": ("step", lambda s: s.update(step=torch.ones(1, device="meta"))),
    "qmap1 on meta": ("qmap1", lambda s: s[KEY].update(qmap1=s[KEY]["qmap1"].to("meta"))),
    "absmax1 sparse": ("absmax1", lambda s: s[KEY].update(absmax1=s[KEY]["absmax1"].to_sparse())),
    "state1 in one byte": ("state1", lambda s: s[KEY].update(state1=s[KEY]["state1"][:1, :1].clone().expand(70, 60))),
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


@pytest.mark.parametrize("name", ["Adam8bit", "AdEMAMix8bit", "Lion"])
def test_an_interrupt_finds_the_optimizer_before_a_load_or_after_it(name):
    """At every instruction of the load in turn."""
    p = parameter(70, 60)
    optimizer = build(name, [p])
    take_steps(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    count, at = 0, 0

    class Interrupt(BaseException):
        pass

    def interrupted(frame, event, argument):
        nonlocal count
        if frame.f_code.co_name != "load_state_dict":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == at:
                raise Interrupt
        return interrupted

    outcomes = set()
    for instruction in range(1, 10_000):
        other, at = build(name, [p]), instruction
        before = (other.state, other.param_groups)
        count, tracer = 0, sys.gettrace()
        try:
            sys.settrace(interrupted)
            other.load_state_dict(saved)
            finished = True
        except Interrupt:
            finished = False
        finally:
            sys.settrace(tracer)
        is_before = other.state is before[0] and other.param_groups is before[1]
        is_after = len(other.state) == 1 and other.param_groups[0]["lr"] == 0.5
        assert is_before != is_after
        outcomes.add((is_before, is_after))
        if finished:
            break
    assert finished and len(outcomes) == 2


class TestFailedStep:
    """After an error every step count and every parameter is what it was, and no state is there that was not."""

    def _optimizer(self):
        params = [parameter(70, 60, seed=seed) for seed in range(3)]
        optimizer = build("Adam8bit", [{"params": params[:2]}, {"params": params[2:]}])
        for p in params:
            p.grad = torch.ones_like(p)
        return optimizer, params

    def _assert_unchanged(self, optimizer, params, before, steps):
        for p, value in zip(params, before, strict=True):
            assert torch.equal(p.data, value)
        assert [optimizer.state[p].get("step", 0) for p in params] == [steps] * 3
        assert all(bool(optimizer.state[p]) == (steps > 0) for p in params)

    @pytest.mark.parametrize("steps", [0, 2])
    @pytest.mark.parametrize("setting", [{"lr": None}, {"betas": (0.9, 1.0)}, {"eps": "small"}, {"weight_decay": -1.0}])
    def test_a_setting_of_a_later_group(self, setting, steps):
        optimizer, params = self._optimizer()
        for _ in range(steps):
            optimizer.step()
        before = [p.data.clone() for p in params]
        (name,) = setting
        right = optimizer.param_groups[1][name]
        optimizer.param_groups[1].update(setting)
        with pytest.raises(ValueError, match=name):
            optimizer.step()
        self._assert_unchanged(optimizer, params, before, steps)
        optimizer.param_groups[1][name] = right
        optimizer.step()
        assert [optimizer.state[p]["step"] for p in params] == [steps + 1] * 3

    def test_a_state_for_which_there_is_no_memory(self, monkeypatch):
        optimizer, params = self._optimizer()
        before = [p.data.clone() for p in params]
        allocate, allocated = optimizer.get_state_buffer, []

        def full(p, *arguments):
            allocated.append(p)
            if len(allocated) == 4:
                raise OSError(errno.ENOSPC, "no space")
            return allocate(p, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(optimizer, "get_state_buffer", full)
            with pytest.raises(OSError, match="no space"):
                optimizer.step()
        self._assert_unchanged(optimizer, params, before, 0)
        optimizer.step()
        assert [optimizer.state[p]["step"] for p in params] == [1] * 3


def test_parameters_with_codebooks_of_their_own_step_by_them():
    """Parameters are stepped together where nothing but their tensors differs."""
    linear = torch.linspace(-1, 1, 256)
    params = [parameter(70, 60, seed=seed) for seed in range(3)]
    optimizer = build("Lion8bit", params)
    take_steps(optimizer)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][1][KEY]["qmap1"] = linear
    optimizer.load_state_dict(state_dict)
    alone = []
    for index, p in enumerate(params):
        other = build("Lion8bit", [nn.Parameter(p.detach().clone())])
        groups = copy.deepcopy(state_dict["param_groups"])
        groups[0]["params"] = [0]
        other.load_state_dict({"state": {0: copy.deepcopy(state_dict["state"][index])}, "param_groups": groups})
        alone.append(other)
    for index, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
        (own,) = alone[index].param_groups[0]["params"]
        own.grad = p.grad.clone()
        alone[index].step()
    optimizer.step()
    for p, other in zip(params, alone, strict=True):
        (own,) = other.param_groups[0]["params"]
        assert torch.equal(p, own)
        assert_same_state(optimizer.state[p], other.state[own])
