"""``capturable=True``: steps that wait for no device and may be repeated have the bits of all others."""

import copy
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from optimizers import FAMILY, assert_same_state, build, every_class, parameter, take_steps
from torch import nn

from bnb_core import optim, use_backend

SHAPES = ((33, 50), (10,), (64, 64), (64, 64))
OPTIONS = {
    "max_unorm": {"args": SimpleNamespace(max_unorm=0.02)},
    "skip_zeros": {"args": SimpleNamespace(skip_zeros=True)},
    "weight_decay": {"weight_decay": 0.1},
    "schedules": {"t_alpha": 5, "t_beta3": 4},
}
OPTIONS_OF = {
    "max_unorm": ("Adam8bit", "Lion32bit", "RMSprop8bit"),
    "skip_zeros": ("AdamW8bit", "Adagrad32bit"),
    "weight_decay": ("Adam8bit", "Adam32bit", "SGD8bit", "Lion8bit", "LAMB8bit"),
    "schedules": ("AdEMAMix8bit", "AdEMAMix32bit"),
}


def _pair(name, shapes=SHAPES, **arguments):
    """The optimizer with capturable and without, over parameters of the same values."""
    return [
        build(name, [parameter(*shape, seed=seed) for seed, shape in enumerate(shapes)], capturable=each, **arguments)
        for each in (True, False)
    ]


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def _assert_same(capturable, plain):
    for p, expected in zip(_parameters(capturable), _parameters(plain), strict=True):
        assert torch.equal(p, expected)
    states, expected = capturable.state_dict()["state"], plain.state_dict()["state"]
    assert states.keys() == expected.keys()
    for index, state in expected.items():
        quantized = state.pop("__bnb_optimizer_quant_state__", {})
        assert_same_state(states[index].pop("__bnb_optimizer_quant_state__", {}), quantized)
        assert_same_state(states[index], state)


@contextmanager
def _no_value_is_read(monkeypatch):
    """No tensor gives its value to Python, as that would wait for its device."""

    def refuse(self, *arguments):
        raise AssertionError("a step read a tensor's value")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__", "__index__", "__contains__"):
            patch.setattr(torch.Tensor, name, refuse)
        yield


@every_class
def test_steps_have_the_same_bits(name, backend):
    capturable, plain = _pair(name, min_8bit_size=64)
    for optimizer in (capturable, plain):
        take_steps(optimizer)
    _assert_same(capturable, plain)
    for p in _parameters(capturable):
        count = capturable.state[p]["step"]
        assert count.dtype == torch.float64 and count.shape == () and count == 3


@pytest.mark.parametrize(("name", "option"), [(name, option) for option, names in OPTIONS_OF.items() for name in names])
def test_options_have_the_same_bits(name, option, backend):
    capturable, plain = _pair(name, min_8bit_size=64, **OPTIONS[option])
    for optimizer in (capturable, plain):
        take_steps(optimizer, last=6)
    _assert_same(capturable, plain)


@every_class
def test_a_step_reads_no_value(name, monkeypatch):
    with use_backend("cpu"):
        optimizer = build(name, [parameter(*shape) for shape in SHAPES], capturable=True, min_8bit_size=64)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01)
        take_steps(optimizer, last=1)
        with _no_value_is_read(monkeypatch):
            take_steps(optimizer, first=1)
    assert optimizer.state[_parameters(optimizer)[0]]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_learning_rate_in_a_tensor_may_change_in_place(dtype, backend):
    capturable, plain = _pair("AdamW8bit", min_8bit_size=64)
    rate = torch.tensor(0.01, dtype=dtype)
    for optimizer in (capturable, plain):
        optimizer.param_groups[0]["lr"] = rate.clone()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (capturable, plain)]
    kept = capturable.param_groups[0]["lr"]
    for step in range(4):
        for optimizer, scheduler in zip((capturable, plain), schedulers, strict=True):
            take_steps(optimizer, first=step, last=step + 1)
            scheduler.step()
    _assert_same(capturable, plain)
    assert capturable.param_groups[0]["lr"] is kept and kept < rate / 8


@pytest.mark.parametrize("rate", [torch.ones(2), torch.tensor(1), torch.tensor(1j), torch.ones(1).to_sparse()])
def test_a_tensor_that_is_no_learning_rate_is_refused(rate):
    with pytest.raises(ValueError, match="lr: expected a number"):
        optim.AdamW8bit([parameter(4)], lr=rate, capturable=True)


def test_capturable_is_a_flag():
    with pytest.raises(TypeError, match="capturable: expected True or False"):
        optim.AdamW8bit([parameter(4)], capturable="yes")


def test_parameters_count_for_themselves(backend):
    """One without a gradient takes no part in a step."""
    capturable, plain = _pair("Adam", shapes=[(5, 7)] * 3)
    for optimizer in (capturable, plain):
        for step in range(4):
            for place, p in enumerate(_parameters(optimizer)):
                p.grad = torch.full_like(p, 0.1 * step - 0.15) if step >= place else None
            optimizer.step()
    _assert_same(capturable, plain)
    assert [int(capturable.state[p]["step"]) for p in _parameters(capturable)] == [4, 3, 2]


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam32bit", "SGD8bit", "LAMB8bit", "PagedLion8bit", "AdEMAMix8bit"])
@pytest.mark.parametrize("saved_by_capturable", [False, True])
def test_a_saved_state_resumes_in_either_form(name, saved_by_capturable, tmp_path):
    first = build(name, [parameter(64, 64)], capturable=saved_by_capturable)
    take_steps(first)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved["state"][0]["step"] == 3 and type(saved["state"][0]["step"]) is int
    for capturable in (False, True):
        p = nn.Parameter(_parameters(first)[0].detach().clone())
        resumed = build(name, [p], capturable=capturable)
        resumed.load_state_dict(saved)
        assert isinstance(resumed.state[p]["step"], torch.Tensor) == capturable
        take_steps(resumed, first=3, last=5)
        expected = copy.deepcopy(first)
        take_steps(expected, first=3, last=5)
        assert torch.equal(p, _parameters(expected)[0])


@pytest.mark.parametrize("step", [5, torch.tensor(5), torch.tensor(5.0), torch.tensor([5.0], dtype=torch.float64)])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_count_is_loaded_from_a_number_or_a_tensor(step, capturable):
    optimizer = optim.Lion8bit([parameter(64, 64)], capturable=capturable)
    take_steps(optimizer)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = step
    optimizer.load_state_dict(saved)
    assert optimizer.state[_parameters(optimizer)[0]]["step"] == 5
    assert optimizer.state_dict()["state"][0]["step"] == 5


def test_copies_stay_capturable():
    optimizer = optim.AdamW8bit([parameter(64, 64)], capturable=True)
    take_steps(optimizer)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.capturable
        take_steps(other, first=3, last=4)
        assert other.state[_parameters(other)[0]]["step"] == 4
    assert optimizer.state[_parameters(optimizer)[0]]["step"] == 3


@pytest.fixture
def capturing(monkeypatch):
    """As if a CUDA graph were being captured."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    return monkeypatch


def test_a_capture_names_the_remedy(capturing):
    with pytest.raises(RuntimeError, match=r"AdamW8bit.step: .* capturable=True"):
        take_steps(optim.AdamW8bit([parameter(64)]))


@pytest.mark.parametrize("name", [name for name in FAMILY if name.endswith("8bit")])
def test_a_capture_needs_the_state_of_a_step_before(name, capturing):
    optimizer = build(name, [parameter(320, 320)], capturable=True)
    with pytest.raises(RuntimeError, match="step: a CUDA graph would make the state anew"):
        take_steps(optimizer)
    assert not optimizer.state or "step" not in optimizer.state[_parameters(optimizer)[0]]
    with capturing.context() as outside:
        outside.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        take_steps(optimizer, last=1)
    take_steps(optimizer, first=1)
    expected = build(name, [parameter(320, 320)], capturable=True)
    capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    take_steps(expected)
    _assert_same(optimizer, expected)


def test_a_loaded_state_is_in_place_before_a_capture(capturing):
    """It is moved at the next step, which a graph would repeat."""
    optimizer = optim.AdamW8bit([parameter(64, 64)], capturable=True)
    capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    take_steps(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call step\\(\\) once before the capture"):
        take_steps(optimizer)
