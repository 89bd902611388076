"""A primitive checks arguments once for all that have their signature: it tells apart whatever a check looks at."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bnb_core import functional, primitives
from bnb_core.nn.quantized_parameter import QuantizedParameter
from bnb_core.records import Weight4bit
from bnb_core.signature import compiled_signature, signature_in_python

needs_compiled = pytest.mark.skipif(compiled_signature is None, reason="not built, or torch before 2.10")
signatures = pytest.mark.parametrize(
    "signature",
    [signature_in_python, pytest.param(compiled_signature, marks=needs_compiled)],
    ids=["python", "compiled"],
)

A = torch.zeros(4, 6)
ALIKE = {
    "other values": (A, torch.ones(4, 6)),
    "another place in memory": (A[1:], torch.zeros(5, 6)[2:]),
    "strides of a dimension of one": (torch.zeros(1, 6), torch.zeros(3, 6)[::2][1:]),
    "empty": (torch.zeros(0, 6), torch.zeros(6, 0).t()),
    "a gradient asked for": (A, torch.zeros(4, 6, requires_grad=True)),
    "a parameter": (A, torch.nn.Parameter(A)),
    "a parameter of a quantized weight": (A, QuantizedParameter(A)),
    "none": (None, None),
    "a list as torch's dispatcher passes it": ((4, 6), [4, 6]),
    "a torch.Size": ((4, 6), torch.Size([4, 6])),
    "dtypes": (torch.float16, torch.float16),
}
DIFFERENT = {
    "shape": (A, torch.zeros(6, 4)),
    "dimensions": (A, torch.zeros(4, 6, 1)),
    "dtype": (A, A.half()),
    "dtypes of one size": (A.half(), A.bfloat16()),
    "signed and unsigned": (A.to(torch.uint8), A.to(torch.int8)),
    "negated": (A, torch._neg_view(A)),
    "a negated parameter": (A, torch.nn.Parameter(torch._neg_view(A))),
    "a negated parameter of a quantized weight": (A, Tensor._make_subclass(QuantizedParameter, torch._neg_view(A))),
    "strides": (torch.zeros(6, 6), torch.zeros(6, 6).t()),
    "a tensor or none": (A, None),
    "numbers": (64, 128),
    "an int, a float, a bool": (1, 1.0, True),
    "0 and none": (0, None),
    "text": ("nf4", "fp4"),
    "lengths of text": ("nf4", "nf4 "),
    "dtypes": (torch.float16, torch.bfloat16),
    "tuples": ((4, 6), (6, 4), (4, 6, 1)),
    "types in tuples": ((1, 2), (True, 2), (1.0, 2)),
    "lists": ([4, 6], [6, 4]),
}


@signatures
@pytest.mark.parametrize("name", ALIKE)
def test_what_no_check_looks_at_does_not_count(signature, name):
    first, second = ALIKE[name]
    assert signature((first, 1)) is not None
    assert signature((first, 1)) == signature((second, 1))


@signatures
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_a_check_looks_at_counts(signature, name):
    keys = {signature((argument,)) for argument in DIFFERENT[name]}
    assert len(keys) == len(DIFFERENT[name]) and None not in keys


@signatures
def test_arguments_do_not_run_into_each_other(signature):
    assert len({signature(((1, 2), 3)), signature(((1,), 2, 3)), signature((1, 2, 3))}) == 3
    assert signature(("ab", "c")) != signature(("a", "bc"))


@signatures
def test_what_cannot_be_a_key_has_no_signature(signature):
    assert signature((A, {})) is None


@needs_compiled
@pytest.mark.parametrize(
    "argument",
    [2**70, "x" * 2**20, (0,) * 2**17, torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")],
    ids=["large number", "long text", "long tuple", "sparse tensor", "meta tensor"],
)
def test_what_cannot_be_told_has_no_compiled_signature(argument):
    """Such arguments are checked with each call. No error is left behind for the next."""
    assert compiled_signature((A, argument)) is None
    assert compiled_signature((A,)) is not None


def test_arguments_unlike_checked_ones_are_checked():
    """A plan made for one call never lets another call's bad arguments through."""
    good = torch.zeros(8, 64)
    codes, state = functional.quantize_4bit(good, blocksize=64)
    weight = Weight4bit(codes, (8, 64), state.absmax, 64, "fp4")
    primitives.dequantize_4bit(weight, torch.float32)
    with pytest.raises(ValueError, match="absmax: expected 8 elements, got 7"):
        primitives.dequantize_4bit(weight._replace(absmax=state.absmax[1:]), torch.float32)
    with pytest.raises(ValueError, match=r"blocksize: expected .*, got 64\.0"):
        primitives.dequantize_4bit(weight._replace(blocksize=64.0), torch.float32)


@needs_compiled
@pytest.mark.parametrize("kind", ["fake", "freed"])
def test_a_tensor_without_memory_is_an_error_and_no_crash(kind):
    codes, state = functional.quantize_4bit(torch.zeros(8, 64), blocksize=64)
    absmax = state.absmax
    if kind == "fake":
        absmax = torch._subclasses.FakeTensorMode().from_tensor(absmax)
    else:
        absmax.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        primitives.dequantize_4bit(Weight4bit(codes, (8, 64), absmax, 64, "fp4"), torch.float32)


def test_kernels_and_signatures_do_without_the_exchange_api():
    """As with torch before 2.10: the same cases pass, by slower ways to a tensor's metadata and address."""
    older_torch = (
        "import torch; torch.Tensor.__dlpack_c_exchange_api__ = None\n"
        "from bnb_core import signature; assert signature.compiled_signature is None\n"
        "assert 'torch has no DLPack exchange API' in signature.implementation\n"
        "from bnb_core.cli import main; main()"
    )
    arguments = ("conformance", "--backend", "cpu", "--primitive", "gemm_4bit_backward")
    run = subprocess.run([sys.executable, "-c", older_torch, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 failed" in run.stdout and " 0 skipped" in run.stdout
