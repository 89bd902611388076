"""A backend to start from: two primitives of its own, the others delegated to the reference."""

from pathlib import Path

from bnb_core.backend import Backend
from bnb_core.registry import delegated_to

from . import kernels

backend = Backend(
    name="template",
    device_types=("cpu",),
    # Above the reference (0), below the compiled backends (100): chosen by name until it is better than those.
    priority=1,
    kernels={
        **delegated_to("reference"),
        "dequantize_blockwise": kernels.dequantize_blockwise,
        "int8_vectorwise_dequant": kernels.int8_vectorwise_dequant,
    },
    details=lambda: {"computes with": "numpy"},
    expected_failures=Path(__file__).parent / "expected_failures.json",
)
