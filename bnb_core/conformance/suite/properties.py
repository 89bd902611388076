"""What holds for every input, tried on inputs that hypothesis makes up (the same ones in every run)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnb_core import primitives
from bnb_core.checks import BLOCKSIZES, QUANT_TYPES
from bnb_core.codebooks import create_dynamic_map, get_4bit_type
from bnb_core.conformance.case import Case, Context, Failure
from bnb_core.conformance.compare import same_bits
from bnb_core.conformance.suite.quantize import CODES
from bnb_core.formats import FORMATS
from bnb_core.primitives import OPTIMIZER_BLOCKSIZE
from bnb_core.records import OptimizerState8bit, OptimizerStep, Weight4bit

EXAMPLES = 20

# However slow the machine is, an emulated one included.
quiet = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**31)
blocksizes = st.sampled_from(BLOCKSIZES)
quant_types = st.sampled_from(QUANT_TYPES)
with_both_ends = st.sampled_from([row.name for row in FORMATS.values() if {-1.0, 1.0} <= {*row.codebook}])


def _random(n: int, number: int) -> Tensor:
    """Normal values of very different sizes."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 4 - 2)


def _quantize(context: Context, A: Tensor, blocksize: int, quant_type: str) -> tuple[Tensor, Tensor]:
    packed, absmax = primitives.quantize_4bit(context.move(A), blocksize, quant_type, torch.uint8)
    return packed.cpu(), absmax.cpu()


def _dequantize(context: Context, packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, n: int) -> Tensor:
    weight = Weight4bit(context.move(packed), (n,), context.move(absmax), blocksize, quant_type)
    return primitives.dequantize_4bit(weight, torch.float32).cpu()


def _per_element(absmax: Tensor, blocksize: int, n: int) -> Tensor:
    return absmax.repeat_interleave(blocksize)[:n]


def _check_round_trip(error: Tensor, code: Tensor, scales: Tensor) -> None:
    """At most half the widest gap of the codebook, or what lies beyond its ends, and a few roundings."""
    ordered = code.sort().values.double()
    widest = max(float(ordered.diff().max()) / 2, 1 - float(ordered.max()), 1 + float(ordered.min()))
    if bool((error.double().abs() > scales.double() * (widest + 1e-6)).any()):
        raise Failure(f"an element came back further off than {widest:.4g} of its block's absmax")


def _round_trip_4bit(context: Context) -> None:
    @quiet
    @given(sizes, seeds, blocksizes, quant_types)
    def holds(n: int, number: int, blocksize: int, quant_type: str) -> None:
        A = _random(n, number)
        packed, absmax = _quantize(context, A, blocksize, quant_type)
        error = _dequantize(context, packed, absmax, blocksize, quant_type, n) - A
        _check_round_trip(error, get_4bit_type(quant_type), _per_element(absmax, blocksize, n))

    holds()


def _round_trip_blockwise(context: Context) -> None:
    @quiet
    @given(sizes, seeds, blocksizes, st.sampled_from(("dynamic", "linear", "fp8")))
    def holds(n: int, number: int, blocksize: int, code_name: str) -> None:
        A, code = context.move(_random(n, number)), context.move(CODES[code_name]())
        q, absmax = primitives.quantize_blockwise(A, code, blocksize)
        back = primitives.dequantize_blockwise(q, absmax, code, blocksize, torch.float32)
        _check_round_trip((back - A).cpu(), code.cpu(), _per_element(absmax.cpu(), blocksize, n))

    holds()


def _idempotence_4bit(context: Context) -> None:
    """Where a codebook holds -1 and 1, a block keeps its absmax; of two zeros the first comes back."""

    @quiet
    @given(sizes, seeds, blocksizes, with_both_ends)
    def holds(n: int, number: int, blocksize: int, quant_type: str) -> None:
        packed, absmax = _quantize(context, _random(n, number), blocksize, quant_type)
        values = _dequantize(context, packed, absmax, blocksize, quant_type, n)
        again, absmax_again = _quantize(context, values, blocksize, quant_type)
        same_bits("absmax", absmax_again, absmax)
        first, second = (torch.stack([p >> 4, p & 15], 1).view(-1) for p in (packed, again))
        code = get_4bit_type(quant_type)
        zero = int((code == 0).int().argmax())
        same_bits("codes", second, torch.where(code[first.int()] == 0, zero, first))

    holds()


def _idempotence_blockwise(context: Context) -> None:
    """The dynamic map holds 1 but not -1: where the largest entry is positive, a block keeps its absmax."""

    @quiet
    @given(sizes, seeds, blocksizes)
    def holds(n: int, number: int, blocksize: int) -> None:
        A, code = _random(n, number), context.move(create_dynamic_map())
        for block in A.split(blocksize):
            block[0] = block.abs().max()
        q, absmax = primitives.quantize_blockwise(context.move(A), code, blocksize)
        values = primitives.dequantize_blockwise(q, absmax, code, blocksize, torch.float32)
        again, absmax_again = primitives.quantize_blockwise(values, code, blocksize)
        same_bits("absmax", absmax_again.cpu(), absmax.cpu())
        same_bits("codes", again.cpu(), q.cpu())

    holds()


def _power_of_two_scaling(context: Context) -> None:
    @quiet
    @given(sizes, seeds, blocksizes, quant_types, st.integers(-40, 40))
    def holds(n: int, number: int, blocksize: int, quant_type: str, exponent: int) -> None:
        A, factor = _random(n, number), 2.0**exponent
        packed, absmax = _quantize(context, A, blocksize, quant_type)
        scaled, scaled_absmax = _quantize(context, A * factor, blocksize, quant_type)
        same_bits("codes", scaled, packed)
        same_bits("absmax", scaled_absmax, absmax * factor)

    holds()


def _block_independence(context: Context) -> None:
    @quiet
    @given(st.integers(2, 12), seeds, st.sampled_from(BLOCKSIZES[:4]), quant_types, seeds)
    def holds(blocks: int, number: int, blocksize: int, quant_type: str, place: int) -> None:
        A = _random(blocks * blocksize, number)
        packed, absmax = _quantize(context, A, blocksize, quant_type)
        changed = place % blocks
        A.view(blocks, -1)[changed] = float("nan")
        other, other_absmax = _quantize(context, A, blocksize, quant_type)
        rest = torch.arange(blocks) != changed
        same_bits("codes", other.view(blocks, -1)[rest], packed.view(blocks, -1)[rest])
        same_bits("absmax", other_absmax[rest], absmax[rest])

    holds()


def _weight(context: Context, N: int, K: int, number: int) -> Weight4bit:
    packed, absmax = _quantize(context, _random(N * K, number), 64, "nf4")
    return Weight4bit(context.move(packed), (N, K), context.move(absmax), 64, "nf4")


def _row_permutation(context: Context) -> None:
    @quiet
    @given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 200), seeds)
    def holds(M: int, N: int, K: int, number: int) -> None:
        weight = _weight(context, N, K, number)
        A, order = context.move(_random(M * K, number + 1).view(M, K)), context.move(torch.randperm(M))
        plain = primitives.gemm_4bit(A, weight, None)
        permuted = primitives.gemm_4bit(A[order], weight, None)
        slack = 2.0**-21 * K**0.5 * A.abs().sum(1, keepdim=True) * weight.absmax.max()
        if bool(((permuted - plain[order]).abs() > slack[order]).any()):
            raise Failure("permuting the rows of A did more to the result than permute its rows")

    holds()


def _linear_in_bias(context: Context) -> None:
    @quiet
    @given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 200), seeds)
    def holds(M: int, N: int, K: int, number: int) -> None:
        weight = _weight(context, N, K, number)
        A, bias = context.move(_random(M * K, number + 1).view(M, K)), context.move(_random(N, number + 2))
        plain, biased = (primitives.gemm_4bit(A, weight, b) for b in (None, bias))
        slack = 1e-5 * (plain.abs() + bias.abs() + (A.abs().sum(1, keepdim=True) * weight.absmax.max()))
        if bool(((biased - plain - bias).abs() > slack).any()):
            raise Failure("with a bias the result is not the one without it plus the bias")

    holds()


def _optimizer_splitting(context: Context) -> None:
    """A parameter split where blocks end takes the same step in parts as whole."""

    @quiet
    @given(st.integers(2, 6), seeds, seeds)
    def holds(blocks: int, number: int, place: int) -> None:
        n, cut = blocks * OPTIMIZER_BLOCKSIZE, (1 + place % (blocks - 1)) * OPTIMIZER_BLOCKSIZE
        g, start = _random(n, number), _random(n, number + 1)
        whole = _adam_8bit(context, g, start)
        parts = [_adam_8bit(context, g[side], start[side]) for side in (slice(0, cut), slice(cut, n))]
        for index, name in enumerate(("p", "state1", "state2", "absmax1", "absmax2")):
            same_bits(name, torch.cat([part[index] for part in parts]), whole[index])

    holds()


def _adam_8bit(context: Context, g: Tensor, start: Tensor) -> list[Tensor]:
    """p, both states and both scales after two steps."""
    p, codes = context.move(start.clone()), [create_dynamic_map(signed) for signed in (True, False)]
    qmaps = [context.move(code) for code in codes]
    states = [context.move(torch.full(p.shape, int(code.abs().argmin()), dtype=torch.uint8)) for code in codes]
    scales = [context.move(torch.zeros(p.numel() // OPTIMIZER_BLOCKSIZE)) for _ in codes]
    state = OptimizerState8bit(*states, *qmaps, *scales)
    for number in (1, 2):
        step = OptimizerStep("adam", number, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
        primitives.optimizer_update_8bit_blockwise(step, context.move(g), p, state, None)
    return [tensor.cpu() for tensor in (p, *states, *scales)]


PROPERTIES: dict[tuple[str, str], Callable[[Context], None]] = {
    ("dequantize_4bit", "round trip"): _round_trip_4bit,
    ("dequantize_blockwise", "round trip"): _round_trip_blockwise,
    ("quantize_4bit", "idempotence"): _idempotence_4bit,
    ("quantize_blockwise", "idempotence"): _idempotence_blockwise,
    ("quantize_4bit", "scaling by powers of two"): _power_of_two_scaling,
    ("quantize_4bit", "block independence"): _block_independence,
    ("gemm_4bit", "row permutation"): _row_permutation,
    ("gemm_4bit", "linear in the bias"): _linear_in_bias,
    ("optimizer_update_8bit_blockwise", "splitting at block boundaries"): _optimizer_splitting,
}


def cases() -> Iterator[Case]:
    for (primitive, name), run in PROPERTIES.items():
        yield Case(primitive, f"property,{name}", run, {"property": name})


REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {}
for _primitive, _name in PROPERTIES:
    _classes = REQUIRED.setdefault(_primitive, {"property": ()})
    _classes["property"] = (*_classes["property"], _name)
