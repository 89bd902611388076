"""The suite catches typical kernel bugs: each is planted, and must make some case fail."""

from __future__ import annotations

import pytest
import torch
from throwaway import after, before, run, throwaway

from bnb_core.conformance.suite import all_cases


def _swap_nibbles(arguments, out):
    packed = out[0].view(torch.uint8)
    packed.copy_(packed << 4 | packed >> 4)


def _neighbours_absmax(arguments):
    arguments["absmax"] = arguments["absmax"].roll(1)


def _drop_last_block(arguments, out):
    blocksize = arguments["blocksize"]
    out.view(-1)[(out.numel() - 1) // blocksize * blocksize :] = 0


def _tie_upwards(arguments):
    """A midpoint goes up: every value is moved by the least there is."""
    arguments["A"] = torch.nextafter(arguments["A"].float(), torch.tensor(float("inf")))


def _forget_offset(arguments):
    if arguments["offset"] is not None:
        arguments["offset"] = torch.zeros_like(arguments["offset"])


def _add_bias_twice(arguments):
    if arguments["bias"] is not None:
        arguments["bias"] = 2 * arguments["bias"]


def _compute_in_bf16(arguments):
    if arguments["A"].dtype == torch.float32:
        arguments["A"] = arguments["A"].bfloat16().float()


def _keep_outlier_columns(arguments, out):
    q, _, mask = out
    if mask.any():
        q[..., mask] = 1


def _drop_row(arguments, out):
    if out.numel() and out.dim() > 1:
        out.view(-1, out.shape[-1])[-1] = 0


def _neighbours_scale(arguments):
    arguments["col_stats"] = arguments["col_stats"].roll(1)


def _keep_stale_state(arguments):
    """The update of the second moment goes into a copy."""
    if arguments["state2"] is not None:
        arguments["state2"] = arguments["state2"].clone()


def _round_by_threads(arguments, out):
    """Well within the bound, but not what another number of threads gives."""
    if torch.get_num_threads() > 1:
        out.copy_(torch.nextafter(out, torch.tensor(float("inf"))))


BUGS = {
    "swapped nibbles": lambda: after("quantize_4bit", _swap_nibbles),
    "absmax of the neighbouring block": lambda: before("dequantize_blockwise", _neighbours_absmax),
    "last block dropped": lambda: after("dequantize_blockwise", _drop_last_block),
    "midpoint tie the wrong way": lambda: before("quantize_blockwise", _tie_upwards),
    "missing offset in double quantization": lambda: before("gemm_4bit", _forget_offset),
    "missing offset in dequantizing": lambda: before("dequantize_4bit", _forget_offset),
    "stale state": lambda: before("optimizer_update_32bit", _keep_stale_state),
    "bias added twice": lambda: before("gemm_4bit", _add_bias_twice),
    "f32 silently computed in bf16": lambda: before("gemm_4bit", _compute_in_bf16),
    "outlier column not zeroed": lambda: after("int8_vectorwise_quant", _keep_outlier_columns),
    "one dropped row": lambda: after("gemm_4bit", _drop_row),
    "scale of the neighbouring row": lambda: before("int8_linear_backward", _neighbours_scale),
    "rounding by the number of threads": lambda: after("int8_vectorwise_dequant", _round_by_threads),
}


def _cases_of(primitive):
    return [case for case in all_cases() if case.primitive == primitive and not case.large]


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_planted_bug_is_caught(bug):
    kernels = bug()
    (primitive,) = kernels
    with throwaway(kernels) as backend:
        results = run(backend, _cases_of(primitive))
    assert any(result.failed for result in results)


@pytest.mark.parametrize("primitive", sorted({next(iter(bug())) for bug in BUGS.values()}))
def test_without_a_bug_the_same_cases_pass(primitive):
    with throwaway() as backend:
        results = run(backend, _cases_of(primitive))
    assert [result.message for result in results if result.failed] == []
