"""The GPU kernels on a CPU, in the simulator of csrc_sim: chosen by name only, to test them where there is no GPU.

BNB_SIM_WARP is the warp's size (32 or 64). The order in which lanes and blocks run stands where other backends have
their instruction sets: `bnb-core conformance --isa all` runs every one of ORDERS.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch

from bnb_core.backend import Backend, InstructionSets, SettingError

from ..gemm_4bit_kernel import ask_for_kernel
from ..gpu import COMPILED_ROWS_ALIKE, GpuKernels
from ..native import NativeKernels, kernels_of, module_file

WARP_VARIABLE = "BNB_SIM_WARP"
WARP_SIZES = (32, 64)
ORDERS = ("forward", "reverse", "shuffled:1")


def _no_stream(device: torch.device) -> int:
    return 0


def _warp_size(default: int) -> int:
    text = os.environ.get(WARP_VARIABLE) or str(default)
    if text not in map(str, WARP_SIZES):
        raise SettingError(WARP_VARIABLE, text, " or ".join(map(str, WARP_SIZES)))
    return int(text)


def _make_backend(name: str, module_name: str, warp_size: int) -> Backend:
    try:
        module = import_module(f"bnb_core.backends.sim.{module_name}")
    except ImportError as error:
        reason = (
            f"its kernels are not built ({error}); BNB_BUILD=cpu,{name} pip install --no-build-isolation . builds "
            "them with a C++17 compiler, HIP's beside the torch that translates them"
        )
        return Backend(name, ("cpu",), 0, {}, unavailable=reason, by_name_only=True)
    module.set_warp_size(_warp_size(warp_size))
    ask_for_kernel(module)
    return Backend(
        name=name,
        device_types=("cpu",),
        priority=0,
        kernels=kernels_of(GpuKernels(NativeKernels(module, _no_stream)), COMPILED_ROWS_ALIKE),
        by_name_only=True,
        details=lambda: {"warp": str(module.warp_size()), "order": module.order(), "threads": str(module.workers())},
        instruction_sets=InstructionSets(lambda: list(ORDERS), module.order, module.set_order),
        library=module_file(module),
    )


cuda_sim = _make_backend("cuda-sim", "_cuda_kernels", warp_size=32)
hip_sim = _make_backend("hip-sim", "_hip_kernels", warp_size=64)
