"""What a process allows torch's matmuls is out of force during our calls, and as it was after them."""

from __future__ import annotations

import os

import pytest
import torch

from bnb_core.backends.torch_precision import exact_matmuls

if not hasattr(torch.backends.mkldnn, "matmul"):
    pytest.skip("this torch, before 2.9, has fewer settings", allow_module_level=True)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
MATMUL = torch.backends.cuda.matmul
HALF_SETTINGS = {
    torch.float16: ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"),
    torch.bfloat16: ("allow_bf16_reduced_precision_reduction",),
}


def _all_settings():
    names = {name for names in HALF_SETTINGS.values() for name in names} | {"fp32_precision"}
    names |= {f"{name}_split_k" for name in names if "reduction" in name}
    settings = {name: getattr(MATMUL, name) for name in names if hasattr(MATMUL, name)}
    return {**settings, "mkldnn": torch.backends.mkldnn.matmul.fp32_precision}


@pytest.fixture(autouse=True)
def restored():
    before = _all_settings()
    yield
    torch.set_float32_matmul_precision("highest")
    for setting in (MATMUL, torch.backends.mkldnn.matmul):
        setting.fp32_precision = "none"
    for name, value in before.items():
        if name.endswith("reduction"):
            setattr(MATMUL, name, (value, before[f"{name}_split_k"]))
    MATMUL.allow_fp16_accumulation = before["allow_fp16_accumulation"]


def _older(precision):
    return lambda: torch.set_float32_matmul_precision(precision)


def _newer(settings, precision):
    return lambda: setattr(settings, "fp32_precision", precision)


F32_ALLOWANCES = {
    "high": _older("high"),
    "medium": _older("medium"),
    "allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "cuda by newer names": _newer(MATMUL, "tf32"),
    "cpu by newer names": _newer(torch.backends.mkldnn.matmul, "bf16"),
}


@pytest.mark.parametrize("allow", F32_ALLOWANCES.values(), ids=F32_ALLOWANCES)
def test_f32_stays_f32(allow):
    allow()
    allowed = _all_settings()
    with exact_matmuls(CUDA, torch.float32):
        assert MATMUL.fp32_precision in ("none", "ieee")
        assert torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    assert _all_settings() == allowed


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_that_the_user_set_can_still_be_read(precision):
    torch.set_float32_matmul_precision(precision)
    with exact_matmuls(CUDA, torch.float32):
        pass
    assert torch.get_float32_matmul_precision() == precision


STARTS = {str(start): start for start in (True, False, (True, False), (True, True), (False, True), (False, False))}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("dtype", HALF_SETTINGS)
def test_half_precision_adds_up_in_f32(dtype, start):
    for name in HALF_SETTINGS[dtype]:
        try:
            setattr(MATMUL, name, start if "reduction" in name else start is not False)
        except RuntimeError as error:
            pytest.skip(f"this torch refuses it: {error}")
    allowed = _all_settings()
    with exact_matmuls(CUDA, dtype):
        assert not any(getattr(MATMUL, name) for name in HALF_SETTINGS[dtype])
    assert _all_settings() == allowed
    with pytest.raises(ArithmeticError), exact_matmuls(CUDA, dtype):
        raise ArithmeticError
    assert _all_settings() == allowed


def test_overlapping_calls_leave_the_setting_as_it_was():
    MATMUL.allow_fp16_accumulation = True
    first, second = exact_matmuls(CUDA, torch.float16), exact_matmuls(CUDA, torch.float16)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not MATMUL.allow_fp16_accumulation
    second.__exit__(None, None, None)
    assert MATMUL.allow_fp16_accumulation


def test_calls_on_two_devices_may_overlap():
    torch.set_float32_matmul_precision("medium")
    first, second = exact_matmuls(CUDA, torch.float32), exact_matmuls(CPU, torch.float32)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_a_child_process_has_what_the_user_set():
    """It is forked while another thread is in a call."""
    torch.set_float32_matmul_precision("medium")
    with exact_matmuls(CPU, torch.float32):
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.backends.mkldnn.matmul.fp32_precision == "bf16" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_is_exact_already_is_not_touched(monkeypatch):
    monkeypatch.setattr(type(MATMUL), "__setattr__", lambda *arguments: pytest.fail("a setting was written"))
    with exact_matmuls(CUDA, torch.float32):
        pass
