"""Every update rule, in 32 and in 8 bits, against an implementation of its own in f64."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from bnb_core import functional, primitives, use_backend
from bnb_core.codebooks import create_dynamic_map
from bnb_core.primitives import OPTIMIZERS
from bnb_core.records import OptimizerState32bit, OptimizerStep

BLOCKSIZE = 256
SHAPE = (37, 53)


@dataclass(frozen=True)
class Case:
    name: str
    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = 0.0
    alpha: float = 0.0
    eps: float = 1e-8
    lr: float = 0.01
    weight_decay: float = 0.0
    gnorm_scale: float = 1.0
    max_unorm: float = 0.0
    skip_zeros: bool = False

    @property
    def has_state2(self):
        return OPTIMIZERS[self.name].states == 2

    @property
    def stacked(self):
        return OPTIMIZERS[self.name].stacked

    @property
    def divides_by_state1(self):
        return self.name in ("rmsprop", "adagrad")


PLAIN = {
    case.name: case
    for case in (
        Case("adam"),
        Case("lamb", max_unorm=1.0),
        Case("ademamix", beta3=0.9999, alpha=5.0),
        Case("momentum"),
        Case("lars", max_unorm=0.02),
        Case("lion", beta2=0.99),
        Case("rmsprop", beta1=0.99),
        Case("adagrad", eps=1e-10),
    )
}
CASES = {
    **PLAIN,
    **{f"{name}-weight_decay": replace(case, weight_decay=0.1) for name, case in PLAIN.items()},
    **{f"{name}-gnorm_scale": replace(case, gnorm_scale=0.3) for name, case in PLAIN.items()},
    **{f"{name}-skip_zeros": replace(case, skip_zeros=True, weight_decay=0.1) for name, case in PLAIN.items()},
    **{
        f"{name}-max_unorm": replace(PLAIN[name], max_unorm=0.01, weight_decay=0.1)
        for name in ("adam", "lamb", "momentum", "lars", "lion", "rmsprop")
    },
}
rule_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
plain_case = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN.keys())


def f64_step(case, t, gradient, p, state1, state2):
    """New p, state1, state2 and the update's norm, all f64."""
    b1, b2, eps, wd, lr = case.beta1, case.beta2, case.eps, case.weight_decay, case.lr
    c1, c2 = 1 - b1**t, math.sqrt(1 - b2**t)
    g = case.gnorm_scale * gradient
    new1, new2, decayed = None, state2, p
    if case.name in ("adam", "lamb"):
        new1, new2 = b1 * state1 + (1 - b1) * g, b2 * state2 + (1 - b2) * g**2
        update = c2 / c1 * new1 / (np.sqrt(new2) + eps * c2)
        decayed = p * (1 - lr * wd)
    elif case.name == "ademamix":
        fast, slow = b1 * state1[0] + (1 - b1) * g, case.beta3 * state1[1] + (1 - case.beta3) * g
        new1, new2 = np.stack([fast, slow]), b2 * state2 + (1 - b2) * g**2
        update = (fast / c1 + case.alpha * slow) / (np.sqrt(new2) / c2 + eps)
        decayed = p * (1 - lr * wd)
    elif case.name in ("momentum", "lars"):
        new1 = update = g + wd * p if t == 1 else b1 * state1 + g + wd * p
    elif case.name == "lion":
        update = np.sign(b1 * state1 + (1 - b1) * g)
        new1 = b2 * state1 + (1 - b2) * g
        decayed = p * (1 - lr * wd)
    else:
        g = g + wd * p
        new1 = b1 * state1 + (1 - b1) * g**2 if case.name == "rmsprop" else state1 + g**2
        update = g / (np.sqrt(new1) + eps)
    if case.skip_zeros:
        moves = gradient != 0
        update, decayed, new1 = np.where(moves, update, 0), np.where(moves, decayed, p), np.where(moves, new1, state1)
        new2 = None if new2 is None else np.where(moves, new2, state2)
    norm = np.linalg.norm(update)
    scale = min(1.0, case.max_unorm * np.linalg.norm(p) / norm) if case.max_unorm > 0 else 1.0
    return decayed - lr * scale * update, new1, new2, norm


def random_gradients(steps, shape=SHAPE):
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(steps, *shape, generator=generator)
    gradients[torch.rand(gradients.shape, generator=generator) < 0.1] = 0.0
    return gradients


def random_parameter(shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def make_state_32bit(case, shape=SHAPE):
    state1 = torch.zeros((2, *shape) if case.stacked else shape)
    return {
        "state1": state1,
        "state2": torch.zeros(shape) if case.has_state2 else None,
        "unorm_vec": torch.zeros(1) if case.max_unorm > 0 else None,
    }


def make_state_8bit(case, shape=SHAPE):
    state = make_state_32bit(case, shape)
    blocks = -(-math.prod(shape) // BLOCKSIZE)
    state["state1"] = state["state1"].to(torch.uint8)
    state["qmap1"] = create_dynamic_map(signed=True)
    state["absmax1"] = torch.zeros((2, blocks) if case.stacked else blocks)
    state["qmap2"] = state["absmax2"] = None
    if case.has_state2:
        state["state2"] = state["state2"].to(torch.uint8)
        state["qmap2"] = create_dynamic_map(signed=False)
        state["absmax2"] = torch.zeros(blocks)
    return state


def step_32bit(case, t, g, p, state):
    functional.optimizer_update_32bit(
        case.name, g, p, state["state1"], case.beta1, case.eps, t, case.lr, state["state2"], case.beta2,
        case.beta3, case.alpha, case.weight_decay, case.gnorm_scale, state["unorm_vec"], case.max_unorm,
        case.skip_zeros,
    )  # fmt: skip


def step_8bit(case, t, g, p, state):
    functional.optimizer_update_8bit_blockwise(
        case.name, g, p, state["state1"], state["state2"], case.beta1, case.beta2, case.beta3, case.alpha, case.eps,
        t, case.lr, state["qmap1"], state["qmap2"], state["absmax1"], state["absmax2"], case.weight_decay,
        case.gnorm_scale, case.skip_zeros, unorm_vec=state["unorm_vec"], max_unorm=case.max_unorm,
    )  # fmt: skip


FORMS = {"32bit": (make_state_32bit, step_32bit), "8bit": (make_state_8bit, step_8bit)}
both_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def blocks_of(values):
    """[moments, blocks, 256] of an array that holds one moment of SHAPE or two, zero-padded."""
    values = values.reshape(-1, math.prod(SHAPE))
    padding = -values.shape[1] % BLOCKSIZE
    return np.pad(values, ((0, 0), (0, padding))).reshape(len(values), -1, BLOCKSIZE)


def decoded(codes, qmap, absmax):
    """f64 values of an 8-bit state."""
    flat_codes = codes.reshape(-1, math.prod(SHAPE))
    scales = absmax.reshape(len(flat_codes), -1).repeat_interleave(BLOCKSIZE, dim=1)[:, : flat_codes.shape[1]]
    return (qmap[flat_codes.long()] * scales).reshape(codes.shape).double().numpy()


def assert_close(actual, expected, scale=None):
    """Within 1e-5 relative, entries that cancel to almost nothing excepted."""
    scale = np.abs(expected).max() if scale is None else scale
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=1e-5, atol=1e-6 * scale)


def assert_nearest_codes(codes, absmax, values, qmap, never_zero):
    """Codes are the nearest, except within 1e-5 of a midpoint; ``never_zero`` lifts positive values off the zero."""
    blocks = blocks_of(values)
    np.testing.assert_allclose(absmax.numpy().reshape(blocks.shape[:2]), np.abs(blocks).max(axis=2), rtol=1e-5)
    scaled = blocks / np.maximum(np.abs(blocks).max(axis=2, keepdims=True), 1e-300)
    code = qmap.double().numpy()
    midpoints = (code[:-1] + code[1:]) / 2
    low, high = scaled - 1e-5 * np.abs(scaled) - 1e-12, scaled + 1e-5 * np.abs(scaled) + 1e-12
    lowest, highest = np.searchsorted(midpoints, low), np.searchsorted(midpoints, high)
    if never_zero:
        zero = int(np.abs(code).argmin())
        lowest = np.where((blocks > 0) & (lowest == zero), zero + 1, lowest)
        highest = np.where((blocks > 0) & (highest == zero), zero + 1, highest)
    actual = blocks_of(codes.numpy().astype(np.int64))
    inside = blocks_of(np.ones(values.shape)) > 0
    assert ((actual >= lowest) & (actual <= highest))[inside].all()


@rule_case
def test_32bit_step_agrees_with_f64(case, backend):
    p, state = random_parameter(), make_state_32bit(case)
    for t, g in enumerate(random_gradients(4), start=1):
        state1, state2 = (None if s is None else s.double().numpy() for s in (state["state1"], state["state2"]))
        before = p.double().numpy()
        expected_p, expected1, expected2, norm = f64_step(case, t, g.double().numpy(), before, state1, state2)
        step_32bit(case, t, g, p, state)
        assert_close(p, expected_p)
        assert_close(state["state1"], expected1)
        if case.has_state2:
            assert_close(state["state2"], expected2)
        if case.max_unorm > 0:
            assert state["unorm_vec"].item() == pytest.approx(norm, rel=1e-5)


@rule_case
def test_8bit_step_agrees_with_f64(case, backend):
    p, state = random_parameter(), make_state_8bit(case)
    for t, g in enumerate(random_gradients(4), start=1):
        state1 = decoded(state["state1"], state["qmap1"], state["absmax1"])
        state2 = decoded(state["state2"], state["qmap2"], state["absmax2"]) if case.has_state2 else None
        before = p.double().numpy()
        expected_p, expected1, expected2, norm = f64_step(case, t, g.double().numpy(), before, state1, state2)
        step_8bit(case, t, g, p, state)
        assert_close(p, expected_p)
        never_zero = case.divides_by_state1
        assert_nearest_codes(state["state1"], state["absmax1"], expected1, state["qmap1"], never_zero)
        if case.has_state2:
            assert_nearest_codes(state["state2"], state["absmax2"], expected2, state["qmap2"], never_zero=True)
        if case.max_unorm > 0:
            assert state["unorm_vec"].item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
@both_forms
@plain_case
def test_half_precision_parameter_is_rounded_once(case, form, dtype, backend):
    make_state, step = form
    g, p = random_gradients(1)[0].to(dtype), random_parameter().to(dtype)
    exact, state = p.float(), make_state(case)
    step(case, 1, g.float(), exact, make_state(case))
    step(case, 1, g, p, state)
    assert torch.equal(p, exact.to(dtype))


@both_forms
@plain_case
def test_non_contiguous_tensors_step_like_contiguous_ones(case, form, backend):
    make_state, step = form
    expected, gradients = random_parameter(), random_gradients(2)
    memory = random_parameter((2 * SHAPE[1], SHAPE[0]))
    p = memory[::2].t().copy_(expected)
    between = memory[1::2].clone()
    state, expected_state = make_state(case), make_state(case)
    for t, g in enumerate(gradients, start=1):
        step(case, t, g, expected, expected_state)
        step(case, t, g.t().contiguous().t(), p, state)
    assert not p.is_contiguous() and torch.equal(p, expected)
    assert torch.equal(memory[1::2], between)
    assert torch.equal(state["state1"], expected_state["state1"])


@both_forms
@pytest.mark.parametrize("shape", [(0,), (), (1,), (257,)], ids=str)
@plain_case
def test_any_shape_steps(case, shape, form, backend):
    make_state, step = form
    p, state = torch.full(shape, 0.5), make_state(case, shape)
    step(case, 1, torch.full(shape, 0.5), p, state)
    assert p.shape == shape and (p < 0.5).all()


@both_forms
@plain_case
def test_skip_zeros_leaves_parameter_and_state_untouched(case, form, backend):
    make_state, step = form
    case = replace(case, skip_zeros=True, weight_decay=0.1)
    p, state = random_parameter(), make_state(case)
    step(case, 1, torch.ones(SHAPE), p, state)
    before, state1_before = p.clone(), state["state1"].clone()
    g = torch.ones(SHAPE)
    g[::2] = 0.0
    step(case, 2, g, p, state)
    assert torch.equal(p[::2], before[::2])
    assert (p[1::2] != before[1::2]).all()
    if state1_before.dtype == torch.float32:
        assert torch.equal(state["state1"][..., ::2, :], state1_before[..., ::2, :])


@plain_case
def test_zero_state_stays_exactly_zero(case, backend):
    p, state = random_parameter(), make_state_8bit(case)
    g = random_gradients(1)[0]
    for t in (1, 2, 3):
        step_8bit(case, t, g, p, state)
    for key, qmap, absmax in (("state1", "qmap1", "absmax1"), ("state2", "qmap2", "absmax2")):
        if state[key] is not None:
            values = decoded(state[key], state[qmap], state[absmax])
            assert (values[..., (g == 0).numpy()] == 0).all()


SECOND_MOMENTS = {"adam": "2", "lamb": "2", "ademamix": "2", "rmsprop": "1", "adagrad": "1"}


@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_small_second_moment_is_never_stored_as_zero(name, backend):
    case, suffix = PLAIN[name], SECOND_MOMENTS[name]
    g = torch.full(SHAPE, 1e-5)
    g.view(-1)[::BLOCKSIZE] = 1.0
    p, state = random_parameter(), make_state_8bit(case)
    for t in (1, 2):
        step_8bit(case, t, g, p, state)
    assert (decoded(state[f"state{suffix}"], state[f"qmap{suffix}"], state[f"absmax{suffix}"]) > 0).all()


@pytest.mark.parametrize("name", ["adam", "rmsprop", "adagrad"])
def test_small_gradients_are_not_divided_by_eps(name, backend):
    """At 1e-4 of its block's largest gradient an entry's step stays below four times that with 32-bit state."""
    case = PLAIN[name]
    g = torch.full(SHAPE, 1e-4)
    g.view(-1)[::BLOCKSIZE] = 1.0
    travelled = []
    for make_state, step in FORMS.values():
        p, state = torch.zeros(SHAPE), make_state(case)
        for t in range(1, 11):
            step(case, t, g, p, state)
        travelled.append(p.abs().max())
    exact, quantized = travelled
    assert quantized < 4 * exact


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@both_forms
@plain_case
def test_bad_gradient_entry_touches_its_own_entry_and_block(case, form, bad, backend):
    make_state, step = form
    case = replace(case, max_unorm=0.0)
    bad_index, own_block = 300, slice(256, 512)
    g = random_gradients(1)[0]
    p, state = random_parameter(), make_state(case)
    clean_p, clean_state = random_parameter(), make_state(case)
    step(case, 1, g, clean_p, clean_state)
    g.view(-1)[bad_index] = bad
    step(case, 1, g, p, state)
    p, clean_p = p.view(-1), clean_p.view(-1)
    others = torch.arange(p.numel()) != bad_index
    assert torch.equal(p[others], clean_p[others])
    outside = torch.ones(p.numel(), dtype=torch.bool)
    outside[own_block] = False
    for key in ("state1", "state2"):
        if state[key] is not None:
            actual, clean = (s[key].view(-1, p.numel())[:, outside] for s in (state, clean_state))
            assert torch.equal(actual, clean)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@both_forms
@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_bad_gradient_entry_does_not_decide_how_far_the_others_move(name, form, bad, backend):
    make_state, step = form
    g = random_gradients(1)[0]
    p, clean_p, start = random_parameter(), random_parameter(), random_parameter()
    step(PLAIN[name], 1, g, clean_p, make_state(PLAIN[name]))
    g.view(-1)[300] = bad
    step(PLAIN[name], 1, g, p, make_state(PLAIN[name]))
    others = torch.arange(p.numel()) != 300
    torch.testing.assert_close((p - start).view(-1)[others], (clean_p - start).view(-1)[others], rtol=0.01, atol=1e-6)


@both_forms
@plain_case
def test_zero_gradient_moves_nothing(case, form, backend):
    make_state, step = form
    p = random_parameter()
    step(case, 1, torch.zeros(SHAPE), p, make_state(case))
    assert torch.equal(p, random_parameter())


def test_several_parameters_at_once_have_no_bounded_update():
    """Each would need norms of its own, for which the kernels have no memory then."""
    tensors = [torch.ones(8), torch.ones(8)]
    step = OptimizerStep("adam", 1, 0.1, 0.9, 0.99, max_unorm=1.0)
    state = OptimizerState32bit(list(tensors), list(tensors))
    with use_backend("cpu"), pytest.raises(ValueError, match="max_unorm: expected 0 for several parameters"):
        primitives.optimizer_update_32bit.several(step, tensors, list(tensors), state, torch.zeros(1))


@pytest.mark.parametrize(("signed", "mantissa_bits"), [(True, 6), (False, 7)])
def test_the_maps_of_8bit_state_have_one_threshold_in_a_cell(signed, mantissa_bits):
    """GPU kernels find codes in one look-up then (csrc_cuda/cell_words.h), else by bisection."""
    code = create_dynamic_map(signed=signed)
    thresholds = ((code[1:] + code[:-1]) / 2).numpy()
    cells = thresholds.view(np.int32) >> (23 - mantissa_bits)
    assert len(np.unique(cells)) == len(cells)
    assert np.abs(thresholds).min() > 2.0**-23
    assert np.abs(thresholds).max() <= 1
