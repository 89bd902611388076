"""Differentiable matmuls with quantized weights. The weights are frozen; inputs and biases get their gradients."""

from bnb_core.autograd.grouped_product import grouped_linear_4bit
from bnb_core.autograd.product_4bit import linear_4bit, matmul_4bit
from bnb_core.autograd.product_int8 import MatmulLtState, int8_linear, matmul

__all__ = ["MatmulLtState", "grouped_linear_4bit", "int8_linear", "linear_4bit", "matmul", "matmul_4bit"]
