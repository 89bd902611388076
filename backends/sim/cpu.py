"""The CPU's kernels with AVX-512 and AMX, simulated in AVX2 by csrc_sim/x86: chosen by name only, to test them."""

from __future__ import annotations

from importlib import import_module

from bnb_core.backend import Backend

from ..cpu import facts, served_by, set_openmp


def _unavailable(reason: str) -> Backend:
    return Backend("cpu-sim", ("cpu",), 0, {}, unavailable=reason, by_name_only=True)


def _make_backend() -> Backend:
    try:
        module = import_module("bnb_core.backends.sim._cpu_kernels")
        set_openmp(module)
    except ImportError as error:
        return _unavailable(
            f"its kernels are not built ({error}); BNB_BUILD=cpu,cpu-sim pip install . builds them on x86-64, by GCC"
        )
    except RuntimeError as error:
        return _unavailable(str(error))
    if module.isas_available() != module.isas_built():
        return _unavailable("it simulates AVX-512 and AMX in AVX2, which this machine lacks")
    return Backend("cpu-sim", priority=0, by_name_only=True, **served_by(module), details=lambda: facts(module))


cpu_sim = _make_backend()
