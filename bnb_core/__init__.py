"""Low-bit quantization for PyTorch: 4-bit and 8-bit weights, 8-bit optimizers, one contract on every device."""

from bnb_core import functional, nn, optim, utils
from bnb_core.autograd import MatmulLtState, matmul, matmul_4bit
from bnb_core.checkpoints import (
    dequantize_checkpoint,
    inspect_checkpoint,
    load_quantized,
    quantize_checkpoint,
    save_quantized,
    verify_checkpoint,
)
from bnb_core.compat import install_as_bitsandbytes, transformers_config
from bnb_core.quantize import QuantizationConfig, quantize_model
from bnb_core.registry import backends, batch_invariant, use_backend
from bnb_core.version import __version__

features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "hip", "hpu", "mps", "npu", "xpu"}

__all__ = [
    "MatmulLtState",
    "QuantizationConfig",
    "__version__",
    "backends",
    "batch_invariant",
    "dequantize_checkpoint",
    "features",
    "functional",
    "inspect_checkpoint",
    "install_as_bitsandbytes",
    "load_quantized",
    "matmul",
    "matmul_4bit",
    "nn",
    "optim",
    "quantize_checkpoint",
    "quantize_model",
    "save_quantized",
    "supported_torch_devices",
    "transformers_config",
    "use_backend",
    "utils",
    "verify_checkpoint",
]
