"""Embeddings: with a layer norm and 32-bit optimizer state, or with a quantized weight."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from bnb_core import functional, primitives
from bnb_core.functional import QuantState
from bnb_core.nn.linear4bit import Weight4bitMixin
from bnb_core.nn.linear8bit import Int8Params, Weight8bitMixin
from bnb_core.nn.params4bit import Params4bit
from bnb_core.nn.quantized_weight import not_quantized
from bnb_core.optim import GlobalOptimManager
from bnb_core.records import Weight4bit

_log = logging.getLogger(__name__)


class Embedding(nn.Embedding):
    """nn.Embedding with Xavier initialization whose weight keeps 32-bit optimizer state (8-bit Optimizers, 2.3)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        _freeze: bool = False,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            _freeze, device, dtype,
        )  # fmt: skip
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """:class:`Embedding` followed by a layer norm (8-bit Optimizers, section 2.3)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        _freeze: bool = False,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            device, dtype, _freeze=_freeze,
        )  # fmt: skip
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """The norm is taken in its own dtype; the result has the weight's."""
        return self.norm(super().forward(input).to(self.norm.weight.dtype)).to(self.weight.dtype)


class Embedding8bit(Weight8bitMixin, nn.Embedding):
    """An embedding whose weight is quantized to int8 by rows when it moves to a device.

    Its output has the dtype that the weight had before.
    """

    weight: Int8Params

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, requires_grad=False)

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        scales = self._scales()
        if scales is None or self.weight.dtype != torch.int8:
            raise RuntimeError(not_quantized(self.weight))
        rows = input.reshape(-1)
        with torch._C.DisableTorchFunctionSubclass():
            codes = self.weight.index_select(0, rows)
        values = functional.int8_vectorwise_dequant(codes, scales.to(codes.device).index_select(0, rows))
        return values.to(self.dtype).view(*input.shape, self.embedding_dim)


class Embedding4bit(Weight4bitMixin, nn.Embedding):
    """An embedding whose weight is quantized to 4 bits when it moves to a device.

    Args:
        num_embeddings, embedding_dim, dtype, device: as in nn.Embedding; the output has this dtype.
        quant_type: ``fp4`` or ``nf4``.
        quant_storage: the dtype that the packed bytes are viewed as.

    A warning is logged where ``embedding_dim`` is no multiple of the block size: rows then share blocks, and each
    forward dequantizes the whole weight.
    """

    weight: Params4bit

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.quant_state: QuantState | None = None
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        if embedding_dim % self.weight.blocksize:
            _log.warning(
                "%s: embedding_dim %s is no multiple of the block size %s, so that each forward dequantizes the whole "
                "weight: slow inference.",
                type(self).__name__, embedding_dim, self.weight.blocksize,
            )  # fmt: skip

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: Tensor) -> Tensor:
        quant_state = self._current_quant_state()
        if quant_state is None:
            raise RuntimeError(not_quantized(self.weight))
        with torch._C.DisableTorchFunctionSubclass():
            packed = self.weight.view(-1)  # torch.export does not see through .data
        if self.embedding_dim % quant_state.blocksize:  # type: ignore[operator]
            # Rows share blocks, perhaps bytes.
            weight = functional.dequantize_4bit(packed, quant_state)
            return nn.functional.embedding(input, weight).to(self.dtype)
        rows = input.reshape(-1)
        taken = Weight4bit(
            packed.view(torch.uint8).view(self.num_embeddings, -1).index_select(0, rows),
            (rows.numel(), self.embedding_dim),
            self._scales_of(quant_state, rows),
            quant_state.blocksize,  # type: ignore[arg-type]
            quant_state.quant_type,  # type: ignore[arg-type]
        )
        values = primitives.dequantize_4bit(taken, self.dtype)
        return values.view(*input.shape, self.embedding_dim)

    def _scales_of(self, quant_state: QuantState, rows: Tensor) -> Tensor:
        """The f32 scales of these rows, each a whole number of blocks."""
        scales = functional.dequantize_absmax(quant_state)
        return scales.view(self.num_embeddings, -1).index_select(0, rows)


class EmbeddingNF4(Embedding4bit):
    """:class:`Embedding4bit` with the codebook nf4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """:class:`Embedding4bit` with the codebook fp4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)
