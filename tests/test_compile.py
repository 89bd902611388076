"""Every primitive is a well-formed torch operator."""

from __future__ import annotations

import pytest
import torch

from bnb_core import primitives
from bnb_core.conformance.suite.errors import valid_arguments
from bnb_core.primitive import Primitive

PRIMITIVES = [value for value in vars(primitives).values() if isinstance(value, Primitive)]


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.name)
def test_operator_is_well_formed(primitive):
    """Schema, fake result and autograd registration agree with what the kernel does."""
    arguments = tuple(valid_arguments(primitive.name).values())
    torch.library.opcheck(primitive.op, arguments)


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.name)
def test_operator_and_direct_call_give_the_same(primitive):
    direct = primitive(*valid_arguments(primitive.name).values())
    dispatched = primitive.op(*valid_arguments(primitive.name).values())
    torch.testing.assert_close(direct, dispatched, rtol=0, atol=0, equal_nan=True)


def test_meta_tensors_get_shapes_without_a_kernel():
    packed, absmax = primitives.quantize_4bit(torch.empty(40, 64, device="meta"), 64, "nf4", torch.uint8)
    assert packed.shape == (1280, 1) and absmax.shape == (40,) and packed.is_meta


def test_tracing_records_the_operator():
    traced = torch.jit.trace(lambda x: primitives.quantize_4bit(x, 64, "nf4", torch.uint8)[0], torch.randn(128))
    fresh = torch.randn(128)
    assert torch.equal(traced(fresh), primitives.quantize_4bit(fresh, 64, "nf4", torch.uint8)[0])


def test_out_is_filled_under_compile():
    def dequantize(packed, absmax, out):
        return primitives.dequantize_4bit(packed, absmax, 64, "nf4", (128,), torch.float32, out=out)

    packed, absmax = primitives.quantize_4bit(torch.randn(128), 64, "nf4", torch.uint8)
    out, expected = torch.zeros(128), torch.zeros(128)
    torch.compile(dequantize, fullgraph=True, backend="aot_eager")(packed, absmax, out)
    dequantize(packed, absmax, expected)
    assert torch.equal(out, expected)
