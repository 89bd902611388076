"""Linear layers with a frozen weight of 4 bits (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core.autograd import linear_4bit
from bnb_core.checks import check_float
from bnb_core.functional import QuantState
from bnb_core.nn.params4bit import Params4bit
from bnb_core.nn.quantized_weight import NOT_QUANTIZED, QuantizedWeightMixin, not_quantized

_WEIGHT = "weight"
_log = logging.getLogger(__name__)


class Weight4bitMixin(QuantizedWeightMixin):
    """A module whose ``weight`` is a :class:`Params4bit`: its state dict holds the quant state, both ways."""

    weight: Params4bit
    quant_state: QuantState | None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        quant_state = self._current_quant_state()
        if quant_state is not None:
            for name, value in quant_state.as_dict(packed=True).items():
                destination[f"{prefix}{_WEIGHT}.{name}"] = value if keep_vars else value.detach()

    def _current_quant_state(self) -> QuantState | None:
        """The weight's; where a sharding wrapper has put plain codes in the weight's place, the module's own.

        None for values, as a weight has that is not quantized yet or is tied to a plain one.
        """
        quant_state = getattr(self.weight, "quant_state", None)
        if quant_state is None and tuple(self.weight.shape) != self._weight_shape():
            return self.quant_state
        return quant_state

    def _part_keys(self, prefix: str, state_dict: Mapping[str, Any]) -> list[str]:
        return [key for key in state_dict if key.startswith(f"{prefix}{_WEIGHT}.")]

    def _holds_codes(self, weight: Tensor, part_keys: list[str]) -> bool:
        return bool(part_keys)

    def _weight_of_codes(self, prefix: str, codes: Tensor, parts: dict[str, Any]) -> Params4bit:
        key = prefix + _WEIGHT
        try:
            quant_state = QuantState.from_dict(parts, "cpu" if codes.is_meta else codes.device)
            quant_state.check_packed("weight", codes)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        shape = tuple(quant_state.shape)  # type: ignore[arg-type]
        if shape != self._weight_shape():
            raise ValueError(f"{key}: expected shape {self._weight_shape()}, got {shape}")
        device = self._device_for(codes)
        copied = copy.deepcopy(quant_state).to(device)
        return Params4bit._from_codes(codes.clone().to(device), copied)

    def _weight_of_values(self, values: Tensor) -> Params4bit:
        attributes = {**self.weight.__dict__, "quant_state": None, "bnb_quantized": False, "module": None}
        return Params4bit(values, **attributes)

    def _is_quantized(self) -> bool:
        return self.weight.bnb_quantized

    def _set_weight(self, weight: nn.Parameter) -> None:
        super()._set_weight(weight)
        self.weight.module = self
        self.quant_state = self.weight.quant_state


def fix_4bit_weight_quant_state_from_module(module: Weight4bitMixin) -> None:
    """Give the packed weight of a layer the quant state that its module has kept, if it has lost its own.

    Sharding wrappers such as FSDP put plain tensors in the places of parameters. The layers here find the state
    either way; this is for callers that read ``weight.quant_state``.

    Warns:
        UserWarning: there is no quant state, as the weight is not quantized yet.

    Raises:
        ValueError: the weight is no column [n, 1] of packed codes that this state fits.
    """
    weight: Any = module.weight
    if getattr(weight, "quant_state", None) is not None:
        return
    quant_state = module.quant_state
    if quant_state is None:
        warnings.warn(NOT_QUANTIZED, stacklevel=2)
        return
    if weight.dim() != 2 or weight.shape[1] != 1:
        raise ValueError(f"weight: expected packed codes of shape [n, 1], got shape {tuple(weight.shape)}")
    quant_state.check_packed("weight", weight)
    if isinstance(weight, Params4bit):
        weight.quant_state, weight.bnb_quantized = quant_state, True
    else:
        module.weight = Params4bit._from_codes(weight.data, quant_state, module=module)


class Linear4bit(Weight4bitMixin, nn.Linear):
    """A linear layer whose weight is quantized to 4 bits when it moves to a device, once.

    Args:
        input_features, output_features, bias: as in nn.Linear.
        compute_dtype: inputs are converted to it; None takes it from the first f32 or bf16 input.
        compress_statistics: quantize the scales as well.
        quant_type: ``fp4`` or ``nf4``.
        quant_storage: the dtype that the packed bytes are viewed as.
        device: of the weight before quantization.

    The output has the input's dtype. The first forward logs a warning where the dtype that it computes in is slow, or
    may overflow.
    """

    weight: Params4bit
    _looked_at_dtype = False

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        """What to compute in: as asked for, else autocast's, else the first input's that f16 does not decide.

        A compiled forward changes no attribute: torch recomputes none that does under gradient checkpointing.
        """
        if self.compute_dtype is not None:
            return self.compute_dtype
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        if not torch.compiler.is_compiling():
            self.set_compute_type(x)
        return x.dtype

    def set_compute_type(self, x: Tensor) -> None:
        """Take compute_dtype, where it is not given, from an input of f32 or bf16; one of f16 leaves it open.

        A forward does so itself. Unsloth's forward calls this while ``compute_type_is_set`` is False.
        """
        if self.compute_dtype is None and x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
            self.compute_type_is_set = True

    def _look_at_dtype(self, x: Tensor, dtype: torch.dtype) -> None:
        self._looked_at_dtype = True
        purpose = "inference" if x.numel() == x.shape[-1] else "inference or training"
        if dtype == torch.float32 != x.dtype:
            _log.warning(
                "%s: its input is %s, its compute_dtype torch.float32. The input's own is faster for %s.",
                type(self).__name__, x.dtype, purpose,
            )  # fmt: skip
        elif dtype == torch.float16 and self.compute_dtype is None:
            _log.warning(
                "%s: without a compute_dtype an input of torch.float16 is multiplied in it, where values above 65504 "
                "overflow. compute_dtype=torch.bfloat16 has no such limit, for %s.",
                type(self).__name__, purpose,
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        check_float("x", x)
        weight = self.weight
        quant_state = getattr(weight, "quant_state", None) or self._current_quant_state()
        if quant_state is None:
            raise RuntimeError(not_quantized(weight))
        dtype, given = self._dtype_for(x), x.dtype
        if not (self._looked_at_dtype or torch.compiler.is_compiling()):
            self._look_at_dtype(x, dtype)
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype is not dtype:
            bias = bias.to(dtype)
        if given is dtype:
            return linear_4bit(x, weight, quant_state, bias)
        return linear_4bit(x.to(dtype), weight, quant_state, bias).to(given)


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` with the codebook nf4 (QLoRA, section 3)."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` with the codebook fp4."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )
