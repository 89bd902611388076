"""Section 5: optimizer steps, near the f64 result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnb_core import primitives
from bnb_core.codebooks import create_dynamic_map
from bnb_core.conformance import oracle
from bnb_core.conformance.case import Case, Context, Failure, named
from bnb_core.conformance.compare import ROUNDOFF, SUBNORMAL_ROUNDOFF, same_bits, within
from bnb_core.conformance.values import DTYPES, LAYOUTS, dtype_name
from bnb_core.primitive import Primitive
from bnb_core.primitives import OPTIMIZER_BLOCKSIZE, OPTIMIZERS
from bnb_core.records import OptimizerState8bit, OptimizerState32bit, OptimizerStep, flat, map_tensors

PRIMITIVES = {32: primitives.optimizer_update_32bit, 8: primitives.optimizer_update_8bit_blockwise}
"""By the bits of the state."""
RELATIVE = 1e-5

# (sizes that leave blocks short, hold one element, none, or more dimensions)
SHAPES: dict[str, tuple[int, ...]] = {
    "one": (1,),
    "short last block": (3 * 256 + 7,),
    "one block": (256,),
    "matrix": (33, 50),
    "3-D": (5, 7, 11),
    "empty": (0,),
    "many blocks": (40, 512),
}

OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "first step": {"step": 1},
    "weight decay": {"weight_decay": 0.1},
    "scaled gradient": {"gnorm_scale": 0.3},
    "bounded update": {"max_unorm": 0.02},
    "skipped zeros": {"skip_zeros": True},
    "schedules": {"t_alpha": 7, "t_beta3": 9},
    "schedules that end": {"t_alpha": 3, "t_beta3": 4},
    "all": {"weight_decay": 0.1, "gnorm_scale": 0.3, "max_unorm": 0.02, "skip_zeros": True},
}


@dataclass(frozen=True)
class Sample:
    """One step, by its classes."""

    optimizer: str
    dtype: torch.dtype
    shape: str = "short last block"
    option: str = "plain"
    gradient: str = "normal"

    @property
    def traits(self) -> dict[str, str]:
        return {
            "optimizer": self.optimizer,
            "dtype": dtype_name(self.dtype),
            "shape": self.shape,
            "option": self.option,
            "gradient": self.gradient,
        }

    @property
    def name(self) -> str:
        return ",".join(self.traits.values())

    @property
    def step(self) -> OptimizerStep:
        options = dict(OPTIONS[self.option])
        if not OPTIMIZERS[self.optimizer].takes_max_unorm:
            options.pop("max_unorm", None)
        defaults = OptimizerStep(
            self.optimizer, step=4, lr=0.01, beta1=0.9, beta2=0.99, beta3=0.999, alpha=2.0, eps=1e-8
        )
        return defaults._replace(**options)  # type: ignore[arg-type]

    def gradient_and_parameter(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = SHAPES[self.shape]
        g, p = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        if self.gradient == "some zero":
            g[torch.rand(shape, generator=generator) < 0.3] = 0.0
        elif self.gradient == "wide":
            g = g * 10 ** (torch.rand(shape, generator=generator) * 6 - 6)
        elif self.gradient == "zero":
            g = torch.zeros(shape)
        return g.to(self.dtype), p.to(self.dtype)

    def moments(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """f32 states as a few steps leave them; zero before the first."""
        traits, shape = OPTIMIZERS[self.optimizer], SHAPES[self.shape]
        scale = 0.0 if self.step.step == 1 else 0.1
        state1 = scale * torch.randn((2, *shape) if traits.stacked else shape, generator=generator)
        if traits.divides_by_state1:
            state1 = state1.square()
        if traits.states == 1:
            return state1, None
        newest = state1[0] if traits.stacked else state1
        return state1, (newest.square() + scale**2) * (0.5 + torch.rand(shape, generator=generator))


def _f64(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.double().numpy()


def unorm_of(sample: Sample) -> Tensor | None:
    return torch.zeros(1) if sample.step.max_unorm > 0 else None


def _effective_terms(sample: Sample, g: oracle.F64, p: oracle.F64) -> oracle.F64:
    """The magnitude of what a gradient is added up from: an f32 sum is only as exact as its terms are large."""
    h = sample.step
    return np.abs(h.gnorm_scale * g) + h.weight_decay * np.abs(p)


def _check_parameter(sample: Sample, after: Tensor | None, g: Tensor, p: Tensor, expected: oracle.Moments) -> None:
    """Within 1e-5 of the change, f32's roundings of the terms, and one rounding to the parameter's dtype."""
    h, wanted = sample.step, expected.p
    change = h.lr * np.abs(expected.update)
    if sample.optimizer in ("momentum", "lars"):
        # Not a ratio, in which the gradient's own error nearly cancels.
        change = change + h.lr * _effective_terms(sample, _f64(g), _f64(p))
    bound = RELATIVE * change + 2.0**-22 * np.abs(_f64(p)) + 2 * ROUNDOFF[sample.dtype] * np.abs(wanted)
    within("p", _f64(after), wanted, bound + SUBNORMAL_ROUNDOFF[sample.dtype] + 1e-9)


def _state1_bound(sample: Sample, g: oracle.F64, p: oracle.F64, expected: oracle.F64) -> oracle.F64:
    terms = _effective_terms(sample, g, p)
    if OPTIMIZERS[sample.optimizer].divides_by_state1:
        return RELATIVE * expected + 2.0**-21 * terms**2
    return RELATIVE * np.abs(expected) + 2.0**-22 * terms


def _check_32bit(context: Context, sample: Sample) -> None:
    generator = context.generator(sample.name)
    (g, p), (state1, state2) = sample.gradient_and_parameter(generator), sample.moments(generator)
    state = OptimizerState32bit(state1, state2)
    after = context.update(primitives.optimizer_update_32bit, sample.step, g, p, state, unorm_of(sample))
    expected = oracle.optimizer_step(sample.step, _f64(g), _f64(p), _f64(state1), _f64(state2))
    _check_parameter(sample, after["p"], g, p, expected)
    within("state1", _f64(after["state1"]), expected.state1, _state1_bound(sample, _f64(g), _f64(p), expected.state1))
    if state2 is not None:
        within("state2", _f64(after["state2"]), expected.state2, RELATIVE * np.abs(expected.state2) + 1e-30)  # type: ignore[arg-type]
    if sample.step.max_unorm > 0:
        norm = np.sqrt((expected.update**2).sum(keepdims=True)).reshape(1)
        within("unorm_vec", _f64(after["unorm_vec"]), norm, RELATIVE * norm)


@dataclass(frozen=True)
class Quantized:
    """An 8-bit state: codes, codebook, scales; f64 values; whether the state divides."""

    codes: Tensor
    qmap: Tensor
    absmax: Tensor
    divides: bool

    @classmethod
    def of(cls, state: Tensor, qmap: Tensor, divides: bool, stacked: bool) -> Quantized:
        parts = state.unbind(0) if stacked else [state]
        quantized = [
            oracle.quantize_blockwise(part.reshape(-1).numpy(), qmap.numpy(), OPTIMIZER_BLOCKSIZE) for part in parts
        ]
        codes = torch.from_numpy(np.concatenate([codes for codes, _ in quantized])).view(state.shape)
        absmax = torch.from_numpy(np.stack([scales for _, scales in quantized]))
        return cls(codes, qmap, absmax if stacked else absmax[0], divides)

    @property
    def values(self) -> oracle.F64:
        return decoded(self.codes, self.absmax, self.qmap)


def decoded(codes: Tensor, absmax: Tensor, qmap: Tensor) -> oracle.F64:
    """The f32 values of an 8-bit state as f64; a stacked state has a row of scales for each part."""
    scales = absmax.view(absmax.shape[0] if absmax.dim() == 2 else 1, -1)
    parts = codes.reshape(scales.shape[0], -1)
    values = [
        oracle.dequantize(part.numpy(), scale.numpy(), qmap.numpy(), OPTIMIZER_BLOCKSIZE)
        for part, scale in zip(parts, scales, strict=True)
    ]
    return np.stack(values).reshape(tuple(codes.shape)).astype(np.float64)


def _check_state(what: str, before: Quantized, codes: Tensor, absmax: Tensor, expected: oracle.F64) -> None:
    """The codes nearest to the exact state, but where it lies within 1e-5 of a midpoint."""
    stacked = absmax.dim() == 2
    parts = (absmax.shape[0] if stacked else 1, -1)
    pairs = zip(codes.reshape(parts), absmax.view(parts), expected.reshape(parts), strict=True)
    for got_codes, got_absmax, exact in pairs:
        starts = range(0, len(exact), OPTIMIZER_BLOCKSIZE)
        largest = np.array([np.abs(exact[start : start + OPTIMIZER_BLOCKSIZE]).max() for start in starts])
        stored = np.where(largest < 2.0**-126, 0.0, largest)
        within(f"{what} absmax", _f64(got_absmax), stored, RELATIVE * stored + 2.0**-126)
        _check_codes(what, before, got_codes.numpy(), exact, np.repeat(stored, OPTIMIZER_BLOCKSIZE)[: len(exact)])


def _check_codes(what: str, before: Quantized, got: Any, exact: oracle.F64, scales: oracle.F64) -> None:
    qmap = _f64(before.qmap)
    zero = int(np.abs(qmap).argmin())
    midpoints = (qmap[:-1] + qmap[1:]) / 2
    scaled = np.divide(exact, scales, out=np.zeros_like(exact), where=scales > 0)
    slack = RELATIVE * np.abs(scaled) + 1e-12
    low, high = (np.searchsorted(midpoints, scaled + side * slack) for side in (-1, 1))
    if before.divides:
        smallest = np.where((exact > 0) & (scales > 0), zero + 1, 0)
        low, high = np.maximum(low, smallest), np.maximum(high, smallest)
    low, high = (np.where(scales > 0, bound, zero) for bound in (low, high))
    wrong = (got < low) | (got > high)
    if wrong.any():
        first = int(wrong.argmax())
        raise Failure(
            f"{what}: {int(wrong.sum())} of {wrong.size} codes are not the nearest, first at {first}: "
            f"expected {low[first]} to {high[first]} for {scaled[first]:.9g} of its block's absmax, got {got[first]}"
        )


def _crowded_map(signed: bool) -> Tensor:
    """Sixteen values next to one another, so that no table of equal or of relative steps tells them apart."""
    qmap = create_dynamic_map(signed)
    qmap[200:216] = qmap[200] + 2.0**-20 * torch.arange(16)
    return qmap


def _quantized(
    optimizer: str, state1: Tensor, state2: Tensor | None, qmap: Callable[[bool], Tensor] = create_dynamic_map
) -> tuple[Quantized, Quantized | None]:
    traits = OPTIMIZERS[optimizer]
    first = Quantized.of(state1, qmap(True), traits.divides_by_state1, traits.stacked)
    return first, None if state2 is None else Quantized.of(state2, qmap(False), True, False)


def _state_8bit(first: Quantized, second: Quantized | None) -> OptimizerState8bit:
    codes2, qmap2, absmax2 = (None, None, None) if second is None else (second.codes, second.qmap, second.absmax)
    return OptimizerState8bit(first.codes, codes2, first.qmap, qmap2, first.absmax, absmax2)


def _check_8bit(context: Context, sample: Sample, qmap: Callable[[bool], Tensor] = create_dynamic_map) -> None:
    generator = context.generator(sample.name)
    (g, p), (state1, state2) = sample.gradient_and_parameter(generator), sample.moments(generator)
    first, second = _quantized(sample.optimizer, state1, state2, qmap)
    state = _state_8bit(first, second)
    after: Any = context.update(primitives.optimizer_update_8bit_blockwise, sample.step, g, p, state, unorm_of(sample))
    values2 = None if second is None else second.values
    expected = oracle.optimizer_step(sample.step, _f64(g), _f64(p), first.values, values2)
    _check_parameter(sample, after["p"], g, p, expected)
    if p.numel() == 0:
        return
    _check_state("state1", first, after["state1"], after["absmax1"], expected.state1)
    if second is not None:
        _check_state("state2", second, after["state2"], after["absmax2"], expected.state2)  # type: ignore[arg-type]


def call_of(sample: Sample, bits: int, generator: torch.Generator) -> tuple[Any, ...]:
    """The arguments of a step without a bound, with state of so many bits."""
    (g, p), (state1, state2) = sample.gradient_and_parameter(generator), sample.moments(generator)
    state = OptimizerState32bit(state1, state2)
    return sample.step, g, p, state if bits == 32 else _state_8bit(*_quantized(sample.optimizer, *state)), None


def _contained(context: Context, optimizer: str, bits: int, bad: float) -> None:
    """A gradient entry that is not finite touches its own parameter entry and its own state block, nothing else."""
    sample = Sample(optimizer, torch.float32, "many blocks")
    step, g, *others = call_of(sample, bits, context.generator(f"contained,{optimizer}"))
    place = 3 * OPTIMIZER_BLOCKSIZE + 17
    spoilt = g.clone()
    spoilt.view(-1)[place] = bad
    clean: Any = context.update(PRIMITIVES[bits], step, g, *others)
    dirty: Any = context.update(PRIMITIVES[bits], step, spoilt, *others)
    touched = torch.zeros(g.numel(), dtype=torch.bool)
    touched[place] = True
    if not torch.equal(clean["p"].view(-1)[~touched], dirty["p"].view(-1)[~touched]):
        raise Failure("p: an entry changed whose gradient is finite")
    touched[3 * OPTIMIZER_BLOCKSIZE : 4 * OPTIMIZER_BLOCKSIZE] = True
    for name in ("state1", "state2"):
        if clean[name] is None:
            continue
        pair = (after[name].reshape(-1, g.numel())[:, ~touched] for after in (clean, dirty))
        if not torch.equal(*pair):
            raise Failure(f"{name}: an entry of another block changed")


def _several(context: Context, optimizer: str, dtype: torch.dtype, bits: int, layout: str) -> None:
    """One call for parameters of all shapes gives the bits of a call for each."""
    primitive = PRIMITIVES[bits]
    samples = [Sample(optimizer, dtype, shape) for shape in (*SHAPES, "many blocks")]
    calls = [call_of(sample, bits, context.generator(f"several,{sample.name}")) for sample in samples]

    def copies() -> list[tuple[Any, ...]]:
        laid_out = [map_tensors(lambda t: LAYOUTS[layout](t) if t.dim() > 1 else t, call) for call in calls]
        return [map_tensors(lambda t: t.to(context.device).clone(), call) for call in laid_out]

    for_each, together = copies(), copies()
    for call in for_each:
        primitive(*call)
    primitive.several(*in_one(primitive, together))
    for sample, one, other in zip(samples, for_each, together, strict=True):
        got = named(primitive, other)
        for name, expected in named(primitive, one).items():
            if isinstance(expected, Tensor):
                same_bits(f"{name} of {sample.shape}", got[name], expected)


SHARED = ("qmap1", "qmap2", "lr_tensor")
"""What parameters that are updated in one call have in common."""


def in_one(primitive: Primitive, calls: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The arguments of several calls as those of one: lists of all tensors that differ."""
    columns = zip(primitive.names, *map(flat, calls), strict=True)
    return primitive.structured(
        [
            list(column) if isinstance(column[0], Tensor) and name not in SHARED else column[0]
            for name, *column in columns
        ]
    )


def _samples() -> Iterator[Sample]:
    for optimizer in OPTIMIZERS:
        for dtype in DTYPES:
            for option in OPTIONS:
                if option.startswith("schedules") and not OPTIMIZERS[optimizer].stacked:
                    continue
                yield Sample(optimizer, dtype, option=option, gradient="some zero")
            for shape in SHAPES:
                yield Sample(optimizer, dtype, shape)
        for gradient in GRADIENTS:
            yield Sample(optimizer, torch.float32, gradient=gradient)
        yield Sample(optimizer, torch.float32, "many blocks", "all", "some zero")


GRADIENTS = ("normal", "some zero", "wide", "zero")


def cases() -> Iterator[Case]:
    for sample in dict.fromkeys(_samples()):
        yield Case("optimizer_update_32bit", sample.name, partial(_check_32bit, sample=sample), sample.traits)
        run = partial(_check_8bit, sample=sample)
        yield Case("optimizer_update_8bit_blockwise", sample.name, run, sample.traits)
    for optimizer in OPTIMIZERS:
        sample = Sample(optimizer, torch.float32, "many blocks")
        run = partial(_check_8bit, sample=sample, qmap=_crowded_map)
        traits = {**sample.traits, "code": "crowded"}
        yield Case("optimizer_update_8bit_blockwise", f"crowded code,{optimizer}", run, traits)
        for bits, primitive in PRIMITIVES.items():
            for bad in (float("nan"), float("inf")):
                contained = partial(_contained, optimizer=optimizer, bits=bits, bad=bad)
                yield Case(primitive.name, f"contained,{optimizer},{bad}", contained, {"gradient": str(bad)})
            for dtype, layout in product(DTYPES, ("contiguous", "transposed")):
                several = partial(_several, optimizer=optimizer, dtype=dtype, bits=bits, layout=layout)
                name = f"several,{optimizer},{dtype_name(dtype)},{layout}"
                yield Case(primitive.name, name, several, {"dtype": dtype_name(dtype), "shape": "several"})


_REQUIRED = {
    "optimizer": tuple(OPTIMIZERS),
    "dtype": tuple(dtype_name(dtype) for dtype in DTYPES),
    "shape": (*SHAPES, "several"),
    "option": tuple(OPTIONS),
    "gradient": (*GRADIENTS, "nan", "inf"),
}
REQUIRED = {
    "optimizer_update_32bit": _REQUIRED,
    "optimizer_update_8bit_blockwise": {**_REQUIRED, "code": ("crowded",)},
}
