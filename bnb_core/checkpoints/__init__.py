"""Checkpoints from file to file: quantize, dequantize, verify, look at; save and load any module."""

from bnb_core.checkpoints.dequantizing import dequantize_checkpoint
from bnb_core.checkpoints.headers import CheckpointFileError
from bnb_core.checkpoints.modules import load_quantized, save_quantized
from bnb_core.checkpoints.quantizing import quantize_checkpoint
from bnb_core.checkpoints.sizes import inspect_checkpoint
from bnb_core.checkpoints.verifying import verify_checkpoint

__all__ = [
    "CheckpointFileError",
    "dequantize_checkpoint",
    "inspect_checkpoint",
    "load_quantized",
    "quantize_checkpoint",
    "save_quantized",
    "verify_checkpoint",
]
