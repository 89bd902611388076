"""Linear layers with a frozen weight of 4 bits (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnb_core.autograd import matmul_4bit
from bnb_core.checks import check_float
from bnb_core.functional import QuantState
from bnb_core.nn.params4bit import Params4bit

_WEIGHT = "weight"


class Weight4bitMixin(nn.Module):
    """A module whose ``weight`` is a :class:`Params4bit`: its state dict holds the quant state, both ways."""

    weight: Params4bit
    quant_state: QuantState | None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        quant_state = self._current_quant_state()
        if quant_state is not None:
            for name, value in quant_state.as_dict(packed=True).items():
                destination[f"{prefix}{_WEIGHT}.{name}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Replace the weight by what the state dict holds, packed codes or values, and load the rest as usual."""
        weight_key = prefix + _WEIGHT
        state_keys = [key for key in state_dict if key.startswith(weight_key + ".")]
        handled = set(state_keys)
        value = state_dict.get(weight_key)
        if state_keys:
            if value is None:
                raise ValueError(f"{weight_key}: missing, though the state dict has {state_keys[0]}")
            self._load_packed(weight_key, value, {key: state_dict[key] for key in state_keys})
            handled.add(weight_key)
        elif value is not None and self.weight.bnb_quantized:
            self._load_values(weight_key, value)
            handled.add(weight_key)
        rest = {key: value for key, value in state_dict.items() if key not in handled}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [key for key in missing if key not in handled]

    def _current_quant_state(self) -> QuantState | None:
        """The weight's; where a sharding wrapper has put a plain tensor in the weight's place, the module's own."""
        quant_state = getattr(self.weight, "quant_state", None)
        return self.quant_state if quant_state is None else quant_state

    def _device_for(self, value: Tensor) -> torch.device:
        return value.device if self.weight.is_meta else self.weight.device

    def _expected_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _check_shape(self, weight_key: str, shape: Any) -> None:
        if tuple(shape) != self._expected_shape():
            raise ValueError(f"{weight_key}: expected shape {self._expected_shape()}, got {tuple(shape)}")

    def _load_packed(self, weight_key: str, packed: Tensor, stats: dict[str, Any]) -> None:
        try:
            parameter = Params4bit.from_prequantized(packed.clone(), stats, device=self._device_for(packed))
        except ValueError as error:
            raise ValueError(f"{weight_key}: {error}") from error
        self._check_shape(weight_key, parameter.quant_state.shape)  # type: ignore[union-attr]
        parameter.quant_state = QuantState.from_dict(
            {key: value.clone() for key, value in stats.items()}, parameter.device
        )
        self._set_weight(parameter)

    def _load_values(self, weight_key: str, value: Tensor) -> None:
        """Full-precision values for a weight that is quantized already: quantize them alike."""
        check_float(weight_key, value)
        self._check_shape(weight_key, value.shape)
        attributes = {**self.weight.__dict__, "quant_state": None, "bnb_quantized": False}
        self._set_weight(Params4bit(value.clone(), **attributes).to(self._device_for(value)))

    def _set_weight(self, parameter: Params4bit) -> None:
        parameter.module = self
        self.weight = parameter
        self.quant_state = parameter.quant_state


class Linear4bit(Weight4bitMixin, nn.Linear):
    """A linear layer whose weight is quantized to 4 bits when it moves to a device, once.

    Args:
        input_features, output_features, bias: as in nn.Linear.
        compute_dtype: inputs are converted to it; None takes it from the first f32 or bf16 input.
        compress_statistics: quantize the scales as well.
        quant_type: ``fp4`` or ``nf4``.
        quant_storage: the dtype that the packed bytes are viewed as.
        device: of the weight before quantization.

    The output has the input's dtype.
    """

    weight: Params4bit

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
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage

    def _expected_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def _dtype_for(self, x: Tensor) -> torch.dtype:
        """What to compute in: as asked for, else autocast's, else the first input's that f16 does not decide."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        if x.dtype in (torch.float32, torch.bfloat16):
            self.compute_dtype = x.dtype
        return x.dtype

    def forward(self, x: Tensor) -> Tensor:
        check_float("x", x)
        quant_state = self._current_quant_state()
        if quant_state is None:
            raise RuntimeError("the weight is not quantized yet: move the layer to a device, such as .to('cpu')")
        dtype = self._dtype_for(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch._C.DisableTorchFunctionSubclass():
            packed = self.weight.data.view(1, -1)
        return matmul_4bit(x.to(dtype), packed, quant_state, bias=bias).to(x.dtype)


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
