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
    arguments[1] = arguments[1].roll(1)


def _drop_last_block(arguments, out):
    blocksize = arguments[3]
    out.view(-1)[(out.numel() - 1) // blocksize * blocksize :] = 0


def _tie_upwards(arguments):
    """A midpoint goes up: every value is moved by the least there is."""
    arguments[0] = torch.nextafter(arguments[0].float(), torch.tensor(float("inf")))


def _forget_offset(arguments):
    offset = len(arguments) - 2
    if arguments[offset] is not None:
        arguments[offset] = torch.zeros_like(arguments[offset])


def _add_bias_twice(arguments):
    if arguments[6] is not None:
        arguments[6] = 2 * arguments[6]


def _compute_in_bf16(arguments):
    if arguments[0].dtype == torch.float32:
        arguments[0] = arguments[0].bfloat16().float()


def _keep_outlier_columns(arguments, out):
    q, _, mask = out
    if mask.any():
        q[..., mask] = 1


def _drop_row(arguments, out):
    if out.numel() and out.dim() > 1:
        out.view(-1, out.shape[-1])[-1] = 0


def _keep_stale_state(arguments):
    """The update of the second moment goes into a copy."""
    if arguments[4] is not None:
        arguments[4] = arguments[4].clone()


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
