"""Which backend serves: by priority, or the one that is chosen, strictly."""

from __future__ import annotations

import re
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from fresh_python import QUANTIZE, run_python

import bnb_core
from bnb_core import registry
from bnb_core.backend import Backend, BackendError, Kernel


def test_our_backends_are_available_and_serve_everything():
    found = bnb_core.backends()
    assert list(found)[-1] == "reference" and found["reference"].available
    assert found["cpu"].available, found["cpu"].unavailable
    assert set(registry.serving("cpu").values()) == {"cpu"}
    assert set(registry.serving("mps").values()) == {"reference"}


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_environment_variable_chooses_strictly(name):
    code = f"{QUANTIZE}; from bnb_core import registry; print(set(registry.serving('cpu').values()))"
    assert run_python(code, BNB_BACKEND=name).stdout.split() == ["served", f"{{'{name}'}}"]


def test_the_environment_variable_chooses_per_primitive():
    code = "from bnb_core import registry; s = registry.serving('cpu'); print(s['gemm_4bit'], s['quantize_4bit'])"
    assert run_python(code, BNB_BACKEND="gemm_4bit=reference,*=cpu").stdout.split() == ["reference", "cpu"]


@pytest.mark.parametrize(
    ("value", "named"),
    [("nowhere", "cpu, cpu-sim, cuda"), ("gemm_3bit=cpu", "quantize_4bit"), ("gemm_4bit=cpu,gemm_4bit=cpu", "twice")],
)
def test_a_wrong_environment_variable_is_an_error_that_lists_what_there_is(value, named):
    result = run_python(f"import bnb_core; print('imported')\n{QUANTIZE}", BNB_BACKEND=value)
    assert result.returncode and "BackendError: BNB_BACKEND: " in result.stderr and named in result.stderr
    assert result.stdout == "imported\n"


def test_use_backend_nests_and_ends():
    with bnb_core.use_backend("reference"):
        assert registry.serving("cpu")["gemm_4bit"] == "reference"
        with bnb_core.use_backend("gemm_4bit=cpu,*=reference"):
            assert registry.serving("cpu")["gemm_4bit"] == "cpu"
        assert registry.serving("cpu")["gemm_4bit"] == "reference"
    assert registry.serving("cpu")["gemm_4bit"] == "cpu"


def test_use_backend_concerns_its_own_thread():
    seen = []
    with bnb_core.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(registry.serving("cpu")["gemm_4bit"]))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.parametrize("layer", ["4bit", "8bit"])
def test_use_backend_reaches_a_backward_pass_in_another_thread(layer):
    """Autograd has threads of its own for each GPU."""
    weight, A = torch.randn(8, 64), torch.randn(3, 64, requires_grad=True)
    with bnb_core.use_backend("reference"):
        if layer == "4bit":
            packed, state = bnb_core.functional.quantize_4bit(weight, compress_statistics=True)
            loss = bnb_core.matmul_4bit(A, packed.t(), state).sum()
        else:
            loss = bnb_core.matmul(A, weight).sum()
    served = []
    with registry.observe(lambda primitive, backend: served.append(backend)):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert A.grad is not None
    assert set(served) == {"reference"}


def test_use_backend_refuses_an_unknown_name():
    with pytest.raises(BackendError, match="registered are"), bnb_core.use_backend("nowhere"):
        pass


def test_a_named_backend_refuses_other_devices_with_a_remedy():
    with bnb_core.use_backend("cpu"), pytest.raises(BackendError, match=r"cuda.*choose another"):
        registry.kernel_for("gemm_4bit", "cuda", ())


def test_observers_see_who_served():
    seen = []
    with registry.observe(lambda *served: seen.append(served)), bnb_core.use_backend("reference"):
        bnb_core.functional.quantize_4bit(torch.ones(64))
    assert seen == [("quantize_4bit", "reference")]


WRONG_FIELDS = {
    "name": {"name": None},
    "device_types": {"device_types": "cpu"},
    "priority": {"priority": "high"},
    "kernels": {"kernels": ["gemm_4bit"]},
    "kernels['gemm_4bit']": {"kernels": {"gemm_4bit": "a function"}},
    "unavailable": {"unavailable": False},
    "details": {"details": {"driver": "13.0"}},
    "expected_failures": {"expected_failures": "failures.json"},
}


@pytest.mark.parametrize("named", WRONG_FIELDS)
def test_a_backend_with_a_wrong_field_is_refused_where_it_is_made(named):
    right = {"name": "x", "device_types": ("cpu",), "priority": 1, "kernels": {}}
    with pytest.raises(TypeError, match=re.escape(f"Backend: {named}: expected")):
        Backend(**{**right, **WRONG_FIELDS[named]})


def test_a_kernel_that_does_not_support_the_arguments_is_passed_over_unless_named():
    served = []
    picky = Kernel(lambda *arguments, out: served.append(arguments), lambda *arguments: "too small")
    with registry.registered(Backend("picky", ("cpu",), 1000, {"quantize_4bit": picky})):
        seen = []
        with registry.observe(lambda *by: seen.append(by)):
            bnb_core.functional.quantize_4bit(torch.ones(64))
        assert seen == [("quantize_4bit", "cpu")] and not served
        with bnb_core.use_backend("picky"), pytest.raises(BackendError, match="picky: too small"):
            bnb_core.functional.quantize_4bit(torch.ones(64))


@pytest.mark.parametrize("override", ["temporary", "gemm_4bit=reference"], ids=["named", "by priority"])
def test_a_backend_that_was_removed_serves_no_longer(override):
    temporary = Backend("temporary", ("cpu",), 1000, {"quantize_4bit": lambda *arguments, out: None})
    registration = registry.registered(temporary)
    registration.__enter__()
    with bnb_core.use_backend(override):
        assert registry.serving("cpu")["quantize_4bit"] == "temporary"
        registration.__exit__(None, None, None)
        after = "unknown backend 'temporary'" if override == "temporary" else "cpu"
        assert registry.serving("cpu")["quantize_4bit"].startswith(after)


def test_a_wrong_environment_variable_neither_prevents_nor_keeps_a_registration():
    code = (
        "from bnb_core.backend import Backend\n"
        "from bnb_core.registry import registered\n"
        "for attempt in ('first', 'second'):\n"
        "    with registered(Backend('temporary', ('cpu',), 1, {})): print(attempt)\n"
    )
    result = run_python(code, BNB_BACKEND="nowhere")
    assert result.stdout.split() == ["first", "second"], result.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before Python 3.11")
@pytest.mark.parametrize("backend", ["theirs", None], ids=["named", "by priority"])
def test_what_a_kernel_of_somebody_else_raises_names_the_backend_and_the_primitive(backend):
    def fail(*arguments, out):
        raise ZeroDivisionError("a bug of theirs")

    with (
        registry.registered(Backend("theirs", ("cpu",), 1000, {"quantize_4bit": fail})),
        bnb_core.use_backend(backend) if backend else nullcontext(),
        pytest.raises(ZeroDivisionError, match="a bug of theirs") as caught,
    ):
        bnb_core.functional.quantize_4bit(torch.ones(64))
    assert caught.value.__notes__ == ["raised in quantize_4bit: backend 'theirs'"]


def test_a_kernel_of_somebody_else_takes_many_parameters_in_one_call():
    calls = []

    def one(*arguments):
        calls.append("one")

    def several(step, g, p, state, unorm_vec):
        calls.append(len(p))

    parameters = [torch.nn.Parameter(torch.ones(8)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(8)
    optimizer = bnb_core.optim.Adam32bit(parameters)
    kernel = Kernel(one, several=several)
    with registry.registered(Backend("theirs", ("cpu",), 1000, {"optimizer_update_32bit": kernel})):
        optimizer.step()
    assert calls == [3]


def test_a_backend_that_cannot_say_what_it_supports_is_passed_over_with_a_warning_unless_named():
    def fail(*arguments):
        raise ZeroDivisionError("a bug of theirs")

    kernel = Kernel(lambda *arguments, out: None, supports=fail, present=fail)
    sentence = r"backend 'theirs' cannot say whether it supports a call: ZeroDivisionError: a bug of theirs"
    with registry.registered(Backend("theirs", ("cpu",), 1000, {"quantize_4bit": kernel})):
        seen = []
        with registry.observe(lambda *by: seen.append(by)), pytest.warns(UserWarning, match=sentence):
            bnb_core.functional.quantize_4bit(torch.ones(64))
        assert seen == [("quantize_4bit", "cpu")]
        with pytest.warns(UserWarning, match=sentence):
            assert registry.served_by("quantize_4bit", "cpu") == "cpu"
        with (
            bnb_core.use_backend("theirs"),
            pytest.warns(UserWarning, match=sentence),
            pytest.raises(BackendError, match="theirs: cannot say whether it supports a call"),
        ):
            bnb_core.functional.quantize_4bit(torch.ones(64))


def test_a_backend_that_cannot_prepare_is_not_available_with_the_reason():
    class Unprepared(Backend):
        def prepare(self):
            raise ZeroDivisionError("a bug of theirs")

    backend = Unprepared("theirs", ("cpu",), 1, {})
    assert registry.why_unavailable(backend) == "preparing it failed: ZeroDivisionError: a bug of theirs"
    with registry.registered(backend), pytest.raises(BackendError, match="'theirs' is not available: preparing it"):
        registry.available_backend("theirs")
