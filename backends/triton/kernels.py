"""The primitives over Triton, by name: tensors are contiguous, arguments and outputs as primitives/ declares them.

Products return what they leave to torch's matmul (dequantized.py).
"""

from .gemm_4bit import gemm_4bit, gemm_4bit_backward
from .grouped_gemm_4bit import grouped_gemm_4bit, grouped_gemm_4bit_backward
from .int8_matmul import (
    int8_linear_backward,
    int8_linear_matmul,
    int8_mixed_scaled_mm,
    int8_mm_dequant,
    int8_scaled_mm,
)
from .int8_quantize import int8_double_quant, int8_vectorwise_dequant, int8_vectorwise_quant
from .optimizer import optimizer_update_8bit_blockwise, optimizer_update_32bit
from .quantize import dequantize_4bit, dequantize_blockwise, quantize_4bit, quantize_blockwise

__all__ = [
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
    "quantize_4bit",
    "quantize_blockwise",
]
