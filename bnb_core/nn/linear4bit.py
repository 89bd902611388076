"""Linear layers with a frozen weight of 4 bits (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnb_core.autograd import linear_4bit
from bnb_core.checks import check_float
from bnb_core.functional import QuantState
from bnb_core.nn.params4bit import CodeBytes, Params4bit, code_bytes
from bnb_core.nn.quantized_parameter import copied_codes, moved_codes
from bnb_core.nn.quantized_weight import NOT_QUANTIZED, QuantizedWeightMixin, not_quantized, weight_and_bias
from bnb_core.nn.tensor_parallel import Cut, cut_4bit, cut_of, own_codes, whole_4bit
from bnb_core.sharding import is_sharded, local_part, sum_over_shards

_WEIGHT = "weight"
_log = logging.getLogger(__name__)


class Weight4bitMixin(QuantizedWeightMixin):
    """A module whose ``weight`` is a :class:`Params4bit`: its state dict holds the quant state, both ways."""

    weight: Params4bit
    quant_state: QuantState | None
    _codes_before_sharding: CodeBytes | None = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        cut = getattr(self, "_cut", None)
        if cut is None:
            quant_state = self._current_quant_state()
        else:
            destination[f"{prefix}{_WEIGHT}"], quant_state = whole_4bit(self.weight, self.quant_state, cut)  # type: ignore[arg-type]
        if quant_state is not None:
            parts = quant_state.as_dict(packed=True)
            for name, value in parts.items():
                destination[f"{prefix}{_WEIGHT}.{name}"] = value if keep_vars else value.detach()
            if not isinstance(self.weight, Params4bit):
                # Walkers of state dicts look up each key as a path of attributes, also at what sharding has put here.
                self.weight.__dict__.update({name: value for name, value in parts.items() if "." not in name})
                self.weight.quant_state = quant_state

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)
        weight, quant_state = self._parameters.get(_WEIGHT), self.quant_state
        if quant_state is not None and is_sharded(weight) and not (weight.is_meta or quant_state.absmax.is_meta):  # type: ignore[union-attr]
            quant_state.to(weight.device)  # type: ignore[union-attr]
        return result

    def _current_quant_state(self) -> QuantState | None:
        """The weight's; where a sharding wrapper has put plain codes in the weight's place, the module's own.

        None for values, as a weight has that is not quantized yet or is tied to a plain one.

        Raises:
            ValueError: the codes are not what they were, as the wrapper took them for values.
        """
        weight = self.weight
        quant_state = getattr(weight, "quant_state", None)
        if quant_state is None and tuple(weight.shape) != self._weight_shape():
            quant_state = self.quant_state
            if quant_state is not None and not torch.compiler.is_compiling():
                self._check_codes(weight)
                if quant_state.absmax.device != weight.device and not weight.is_meta:
                    quant_state.to(weight.device)
        return quant_state

    def _check_codes(self, weight: Tensor) -> None:
        """Whether codes came through sharding bit for bit; their bytes are looked at once."""
        before = self._codes_before_sharding
        if before is None:
            return
        if weight.dtype == before.dtype and (before.total is None or is_sharded(weight)):
            return
        if weight.dtype != before.dtype or bool((code_bytes(weight).total != before.total.to(weight.device)).item()):  # type: ignore[union-attr]
            raise ValueError(
                f"weight: its packed codes, stored as {before.dtype}, have been changed as if they were values, to "
                f"{weight.dtype}: by a mixed-precision policy, or a copy that rewrites NaNs. Quantize with "
                "quant_storage=torch.uint8, which nothing takes for values and FSDP2 shards as well, or with the "
                "param_dtype of the policy"
            )
        self._codes_before_sharding = before._replace(total=None)

    def _part_keys(self, prefix: str, state_dict: Mapping[str, Any]) -> list[str]:
        return [key for key in state_dict if key.startswith(f"{prefix}{_WEIGHT}.")]

    def _holds_codes(self, weight: Tensor, part_keys: list[str]) -> bool:
        return bool(part_keys)

    def _weight_of_codes(self, prefix: str, codes: Tensor, parts: dict[str, Any]) -> Params4bit:
        quant_state = self._quant_state_of(prefix, codes, parts, "cpu" if codes.is_meta else codes.device)
        device = self._device_for(codes)
        copied = copy.deepcopy(quant_state).to(device)
        return Params4bit._from_codes(moved_codes(copied_codes(codes), device), copied)

    def _has_parts(self) -> bool:
        return self.quant_state is not None

    def _part_setter(self, prefix: str, codes: Tensor, parts: dict[str, Any]) -> Callable[[], None]:
        quant_state = self._quant_state_of(prefix, codes, parts, self.weight.device)

        def keep() -> None:
            self.quant_state = self.weight.quant_state = quant_state
            self._codes_before_sharding = self._loaded_code_bytes()

        return keep

    def _loaded_code_bytes(self) -> CodeBytes:
        """Of the shards of all processes."""
        weight: Any = self.weight
        dtype, total = code_bytes(local_part(weight))
        if total is not None and is_sharded(weight):
            sum_over_shards(total, weight)
        return CodeBytes(dtype, total)

    def _quant_state_of(
        self, prefix: str, codes: Tensor, parts: dict[str, Any], device: torch.device | str
    ) -> QuantState:
        """That of the entries of a state dict, checked."""
        key = prefix + _WEIGHT
        try:
            quant_state = QuantState.from_dict(parts, device)
            quant_state.check_packed("weight", codes)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        shape = tuple(quant_state.shape)  # type: ignore[arg-type]
        if shape != self._weight_shape():
            raise ValueError(f"{key}: expected shape {self._weight_shape()}, got {shape}")
        return quant_state

    def _weight_of_values(self, values: Tensor) -> Params4bit:
        attributes = {**self.weight.__dict__, "quant_state": None, "bnb_quantized": False, "module": None}
        return Params4bit(values, **attributes)

    def _is_quantized(self) -> bool:
        return self.weight.bnb_quantized

    def _set_weight(self, weight: nn.Parameter) -> None:
        super()._set_weight(weight)
        self.weight.module = self
        self.weight._tell_module()


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
    _cut: Cut | None = None

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
        """What to compute in where nothing is asked for: autocast's dtype, else the first input's that f16 does not
        decide.

        A compiled forward changes no attribute: torch recomputes none that does under gradient checkpointing.
        """
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

    def _cut_weight(self, wished: Any) -> nn.Parameter:
        state = self._current_quant_state()
        if state is None:
            raise RuntimeError(not_quantized(self.weight))
        cut = cut_of(wished, self._weight_shape(), state.blocksize)  # type: ignore[arg-type]
        own, self.quant_state = cut_4bit(self.weight.data, state, cut)
        self._cut = cut
        return nn.Parameter(own, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        check_float("x", x)
        if self._cut is not None:
            state, codes = self.quant_state, own_codes(self.weight)
            return self._cut.product(x, self.bias, lambda x, bias: self._product(x, codes, state, bias))  # type: ignore[arg-type]
        weight, bias = weight_and_bias(self)
        quant_state = getattr(weight, "quant_state", None) or self._current_quant_state()
        if quant_state is None:
            raise RuntimeError(not_quantized(weight))
        return self._product(x, weight, quant_state, bias)

    def _product(self, x: Tensor, weight: Tensor, quant_state: QuantState, bias: Tensor | None) -> Tensor:
        dtype, given = self.compute_dtype or self._dtype_for(x), x.dtype
        if not (self._looked_at_dtype or torch.compiler.is_compiling()):
            self._look_at_dtype(x, dtype)
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
