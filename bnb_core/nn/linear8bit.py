"""Linear layers with an int8 weight (LLM.int8(), arXiv 2208.07339)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core import functional
from bnb_core.autograd import MatmulLtState, int8_linear, matmul
from bnb_core.checkpoint_entries import checked_entry
from bnb_core.checks import check_float
from bnb_core.nn.quantized_parameter import QuantizedParameter, in_any_mode
from bnb_core.nn.quantized_weight import NOT_QUANTIZED, QuantizedWeightMixin, not_quantized, weight_and_bias
from bnb_core.nn.tensor_parallel import Cut, cut_of, cut_scales_8bit, whole_scales_8bit
from bnb_core.primitive import plain_tensor_type
from bnb_core.sharding import is_sharded, local_part
from bnb_core.utils import LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING

ROW_FORMAT = LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"]


@plain_tensor_type
class Int8Params(QuantizedParameter):
    """A weight [N, K] that the first move to a device quantizes to int8 by rows, unless it trains.

    Args:
        data: the weight, floating-point; or its codes i8, with their scales in ``SCB``.
        has_fp16_weights: the weight stays floating-point and trains.
        CB: the codes, once quantized the same tensor as ``data``.
        SCB: f32[N], the absmax of each row.

    Unknown keyword arguments are ignored.
    """

    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **ignored: Any,
    ) -> Int8Params:
        data = torch.empty(0) if data is None else data
        self = Tensor._make_subclass(cls, data, requires_grad and data.is_floating_point())
        self.has_fp16_weights = has_fp16_weights
        self.CB = CB
        self.SCB = SCB
        return self

    def _quantize(self, device: torch.device) -> Int8Params:
        """In place, because torch moves a module by setting its parameters' data."""
        codes, scales, _ = functional.int8_vectorwise_quant(self.data.contiguous().to(device))
        self.requires_grad = False
        self.data, self.CB, self.SCB = codes, codes, scales
        return self

    def _holds_codes(self) -> bool:
        return self.dtype == torch.int8

    def _moved(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> Int8Params:
        if self.has_fp16_weights:
            return self._like(self.data.to(device, dtype, non_blocking))
        return self._moved_frozen(device, dtype, non_blocking)

    @in_any_mode
    def _moved_frozen(self, device: torch.device | None, dtype: torch.dtype | None, non_blocking: bool) -> Int8Params:
        if self.is_floating_point() and device is not None and device.type != "meta":
            return self._quantize(device)
        moved = self.data.to(device, dtype if self.is_floating_point() else None, non_blocking)
        scales = self.SCB
        if scales is not None and device is not None and device.type != "meta":
            # The module keeps this very parameter and takes only its new data, so its scales must move too.
            self.SCB = scales.to(device, non_blocking=non_blocking)
        return self._like(moved)

    def _like(self, data: Tensor) -> Int8Params:
        CB = data if data.dtype == torch.int8 else self.CB
        return type(self)(data, self.requires_grad, self.has_fp16_weights, CB, self.SCB)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        copied: Any = super().__deepcopy__(memo)
        if copied.CB is not None:
            copied.CB = copied.data
        return copied


class Weight8bitMixin(QuantizedWeightMixin):
    """A module whose ``weight`` is an :class:`Int8Params`: its state dict holds the scales, both ways."""

    weight: Int8Params
    _kept_scales: Tensor | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and is_sharded(value):
            self._parameters[name] = value  # as FSDP2 does it; what is registered, parallelize_module cuts
        else:
            super().__setattr__(name, value)
        if name == "weight":
            self._keep_scales()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        self._keep_scales()
        return result

    def _keep_scales(self) -> None:
        """The layer has the scales, too: sharding puts another parameter in the place of a quantized weight."""
        scales = getattr(self._parameters.get("weight"), "SCB", None)
        if scales is not None:
            self._kept_scales = scales

    def _scales(self) -> Tensor | None:
        """The weight's, or those that it had before something else was put in its place."""
        scales = getattr(self.weight, "SCB", None)
        return self._kept_scales if scales is None else scales

    @property
    def SCB(self) -> Tensor:
        """The scales f32[N] of a quantized weight, under their key of a state dict: walkers of those look it up."""
        scales = self._scales()
        if scales is None:
            raise AttributeError(f"SCB: {NOT_QUANTIZED}")
        return scales

    @property
    def weight_format(self) -> Tensor:
        """The code of the layout of int8 weights by rows, u8 on the CPU, under its key of a state dict."""
        return torch.tensor(ROW_FORMAT, dtype=torch.uint8, device="cpu")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        scales, cut = self._scales(), getattr(self, "_cut", None)
        if cut is not None:
            destination[f"{prefix}weight"] = self.weight.detach().full_tensor()  # type: ignore[attr-defined]
            scales = whole_scales_8bit(scales, cut)  # type: ignore[arg-type]
        if scales is not None and self.weight.dtype == torch.int8:
            destination[f"{prefix}SCB"] = scales if keep_vars else scales.detach()
            destination[f"{prefix}weight_format"] = self.weight_format

    def _part_keys(self, prefix: str, state_dict: Mapping[str, Any]) -> list[str]:
        return [key for key in (f"{prefix}SCB", f"{prefix}weight_format") if key in state_dict]

    def _holds_codes(self, weight: Tensor, part_keys: list[str]) -> bool:
        holds_codes = weight.dtype == torch.int8
        if (holds_codes or part_keys) and not isinstance(self.weight, Int8Params):
            raise ValueError(
                f"{(part_keys or ['weight'])[0]}: Loading a quantized checkpoint into non-quantized "
                f"{type(self).__name__}: its weight is a {type(self.weight).__name__}, such as a tied one; "
                "load before layers are tied"
            )
        if part_keys and not holds_codes:
            raise ValueError(
                f"{part_keys[0]}: belongs to int8 codes, but the weight is {weight.dtype}, expected torch.int8"
            )
        return holds_codes

    def _weight_of_codes(self, prefix: str, codes: Tensor, parts: dict[str, Any]) -> Int8Params:
        """``weight_format`` may be missing, as older checkpoints have none."""
        weight_key = f"{prefix}weight"
        if self.weight.has_fp16_weights:
            raise ValueError(
                f"{weight_key}: int8 codes cannot be loaded into a weight with has_fp16_weights=True"
                "; make the layer with has_fp16_weights=False"
            )
        codes = checked_entry(weight_key, codes, (torch.int8,), self._weight_shape(), on_meta=True)
        scales = self._scales_of_parts(prefix, codes, parts)
        device = self._device_for(codes)
        codes, scales = codes.clone().to(device), scales.clone().to(device)
        return Int8Params(codes, requires_grad=False, CB=codes, SCB=scales)

    def _scales_of_parts(self, prefix: str, codes: Tensor, parts: dict[str, Any]) -> Tensor:
        """The scales of a state dict, checked."""
        weight_key, scales_key, format_key = f"{prefix}weight", f"{prefix}SCB", f"{prefix}weight_format"
        if scales_key not in parts:
            raise ValueError(
                f"{scales_key}: missing, though {weight_key} is int8; expected the scales of each row beside it"
            )
        scales = checked_entry(scales_key, parts[scales_key], (torch.float32,), (codes.shape[0],))
        if format_key in parts:
            weight_format = checked_entry(format_key, parts[format_key], (torch.uint8,), ())
            if weight_format.item() != ROW_FORMAT:
                raise ValueError(f"{format_key}: expected {ROW_FORMAT}, for rows, got {weight_format.item()}")
        return scales

    def _has_parts(self) -> bool:
        return self.weight.dtype == torch.int8

    def _part_setter(self, prefix: str, codes: Tensor, parts: dict[str, Any]) -> Callable[[], None]:
        scales = self._scales_of_parts(prefix, codes, parts).clone().to(self.weight.device)
        return partial(self._set_kept_scales, scales)

    def _set_kept_scales(self, scales: Tensor) -> None:
        self._kept_scales = scales
        if isinstance(self.weight, Int8Params):
            self.weight.CB, self.weight.SCB = self.weight.data, scales

    def _weight_of_values(self, values: Tensor) -> Int8Params:
        return Int8Params(values, self.weight.requires_grad, self.weight.has_fp16_weights)

    def _is_quantized(self) -> bool:
        return self.weight.dtype == torch.int8


class Linear8bitLt(Weight8bitMixin, nn.Linear):
    """A linear layer by LLM.int8(): rows of the input and of the weight in int8, outlier columns in the input's dtype.

    Args:
        input_features, output_features, bias: as in nn.Linear.
        has_fp16_weights: keep a floating-point weight that trains, quantized anew at each forward; otherwise the
            weight is quantized once, when it moves to a device, and frozen.
        threshold: input columns with an entry of at least this magnitude are outliers; 0 for none.
        index: kept for callers; it has no meaning.
        device: of the weight before quantization.
    """

    weight: Int8Params
    _cut: Cut | None = None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.index = index
        self.weight = Int8Params(self.weight.data, requires_grad=has_fp16_weights, has_fp16_weights=has_fp16_weights)

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _scales(self) -> Tensor | None:
        return self._scales_of(self.weight)

    def _scales_of(self, weight: Tensor) -> Tensor | None:
        """The weight's; adapters that rebuild the weight leave them in the state."""
        scales = getattr(weight, "SCB", None)
        if scales is None:
            scales = self.state.SCB
        return self._kept_scales if scales is None else scales

    def _set_kept_scales(self, scales: Tensor) -> None:
        super()._set_kept_scales(scales)
        self.state.SCB = None

    def init_8bit_state(self) -> None:
        """Point the state at the weight as it is now: it may have moved or been replaced since the last forward."""
        scales = self._scales()
        self.state.CB = self.weight.data
        self.state.SCB = None if scales is None else scales.to(self.weight.device)

    def _cut_weight(self, wished: Any) -> nn.Parameter:
        scales = self._scales()
        if self.state.has_fp16_weights or scales is None:
            return super()._cut_weight(wished)
        cut = cut_of(wished, self._weight_shape(), blocksize=1)
        self._set_kept_scales(cut_scales_8bit(scales, cut).clone())
        self._cut = cut
        return nn.Parameter(wished, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        check_float("x", x)
        if self._cut is not None:
            codes, scales, threshold = local_part(self.weight), self._kept_scales, self.state.threshold
            return self._cut.product(x, self.bias, lambda x, bias: int8_linear(x, codes, scales, bias, threshold))  # type: ignore[arg-type]
        weight, bias = weight_and_bias(self)
        state = self.state
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        is_compiling = torch.compiler.is_compiling()
        if not is_compiling:
            state.is_training = self.training
        if state.has_fp16_weights:
            return matmul(x, weight if weight.dtype is x.dtype else weight.to(x.dtype), bias=bias, state=state)
        with torch._C.DisableTorchFunctionSubclass():
            codes = weight.detach()  # torch.export does not see through .data
        if codes.dtype is not torch.int8:
            raise RuntimeError(not_quantized(weight))
        scales = self._scales_for_forward(weight, codes.device)
        if not is_compiling:
            state.CB, state.SCB = codes, scales
        return int8_linear(x, codes, scales, bias, state.threshold)

    def _scales_for_forward(self, weight: Tensor, device: torch.device) -> Tensor:
        scales = self._scales_of(weight)
        if scales is None:
            raise ValueError("weight.SCB: the int8 weight has no scales; expected float32, one per row, got None")
        return scales if scales.device == device else scales.to(device)
