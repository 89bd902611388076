"""Which kernel of csrc_cuda serves products with a 4-bit weight, where somebody asks for one by name."""

from __future__ import annotations

import os
from types import ModuleType

from bnb_core.backend import SettingError

VARIABLE = "BNB_GEMM_4BIT_KERNEL"
AS_THE_TABLE_SAYS = -1


def ask_for_kernel(module: ModuleType) -> None:
    """Give the products that it takes to the kernel that the variable names; without one the module's table decides.

    Raises:
        SettingError: the module has no kernel of this name.
    """
    name = os.environ.get(VARIABLE)
    if name and name not in module.gemm_4bit_kernels:
        raise SettingError(VARIABLE, name, " or ".join(module.gemm_4bit_kernels))
    module.set_gemm_4bit_kernel(module.gemm_4bit_kernels.index(name) if name else AS_THE_TABLE_SAYS)
