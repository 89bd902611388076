"""Every primitive once: schema, checks, result and documentation. docs/SPEC.md says what each computes, to the bit.

All arguments are positional and none has a default, so that a kernel's signature reads like its primitive's.
"""

from bnb_core.primitives.blockwise import dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_blockwise
from bnb_core.primitives.int8 import (
    MAX_INT8_INNER_SIZE,
    int8_double_quant,
    int8_linear_backward,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from bnb_core.primitives.optimizers import (
    OPTIMIZER_BLOCKSIZE,
    OPTIMIZERS,
    OptimizerTraits,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
)
from bnb_core.primitives.products import (
    gemm_4bit,
    gemm_4bit_backward,
    grouped_gemm_4bit,
    grouped_gemm_4bit_backward,
)
from bnb_core.primitives.shapes import block_count, packed_numel

__all__ = [
    "MAX_INT8_INNER_SIZE",
    "OPTIMIZERS",
    "OPTIMIZER_BLOCKSIZE",
    "OptimizerTraits",
    "block_count",
    "dequantize_4bit",
    "dequantize_blockwise",
    "gemm_4bit",
    "gemm_4bit_backward",
    "grouped_gemm_4bit",
    "grouped_gemm_4bit_backward",
    "int8_double_quant",
    "int8_linear_backward",
    "int8_linear_matmul",
    "int8_mixed_scaled_mm",
    "int8_mm_dequant",
    "int8_scaled_mm",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "packed_numel",
    "quantize_4bit",
    "quantize_blockwise",
]
