"""Quantized linear layers that torch's ``parallelize_module`` cuts, by their outputs or by their inputs.

``ColwiseParallel`` and ``RowwiseParallel`` cut a weight as if its packed codes were values, and register the result. A
layer takes that for the wish it is and cuts its own weight: whole blocks go to each process, with f32 scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnb_core import functional
from bnb_core.quant_state import QuantState
from bnb_core.sharding import local_part

_REMEDY = "quantize with a smaller block size, use fewer processes, or leave the layer out of the plan"


class Cut(NamedTuple):
    """How a weight [N, K] lies over the processes of a mesh."""

    mesh: Any
    dim: int
    """0 where each process has some of N, the outputs; 1 where it has some of K, the inputs."""

    def product(self, x: Any, bias: Any, local: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The layer's output, a DTensor: ``local`` multiplies with this process's part of the weight."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if not isinstance(x, DTensor):
            raise ValueError(f"x: expected the DTensor that parallelize_module's styles make, got {type(x).__name__}")
        if self.dim == 0:
            own_bias = None if bias is None else bias.to_local()
            y = local(x.to_local(grad_placements=[Partial()]), own_bias)
            return DTensor.from_local(y, self.mesh, [Shard(-1)], run_check=False)
        y = local(x.to_local(), None)
        result = DTensor.from_local(y, self.mesh, [Partial()], run_check=False)
        if bias is None:
            return result
        return result.redistribute(placements=[Replicate()]) + bias.to(y.dtype)


def cut_of(weight: Any, shape: tuple[int, int], blocksize: int) -> Cut:
    """What a parallel style has wished for, by the weight that it registers.

    Raises:
        ValueError: another placement or mesh, or one that would cut a block.
    """
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1 or not placements[0].is_shard():
        raise ValueError(f"weight: expected one Shard on a mesh of one dimension, got {placements} on {mesh}")
    cut = Cut(mesh, placements[0].dim)
    processes, size = mesh.size(), shape[cut.dim]
    block_of_dim = blocksize if cut.dim == 1 or shape[1] % blocksize else 1
    if size % processes or (size // processes) % block_of_dim:
        name = ("out_features", "in_features")[cut.dim]
        raise ValueError(
            f"weight: {name} {size} over {processes} processes would cut blocks of {blocksize}: expected a multiple of "
            f"{processes * block_of_dim}; {_REMEDY}"
        )
    return cut


def cut_4bit(codes: Tensor, state: QuantState, cut: Cut) -> tuple[Any, QuantState]:
    """This process's part of packed codes, as a DTensor [N, K / codes per element], and its quant state.

    Of a stack of weights, N is how many there are, and K the elements of one.
    """
    from torch.distributed.tensor import DTensor, Shard

    sizes = list(state.shape)  # type: ignore[arg-type]
    N, K = sizes[0], math.prod(sizes[1:])
    blocksize: int = state.blocksize  # type: ignore[assignment]
    scales = functional.dequantize_absmax(state) if state.nested else state.absmax
    own_codes = _part(codes.view(torch.uint8).reshape(N, -1), cut).view(codes.dtype)
    if K % blocksize:  # Blocks go over several rows, and whole ones to each process.
        own_scales = scales.reshape(cut.mesh.size(), -1)[cut.mesh.get_local_rank()].clone()
    else:
        own_scales = _part(scales.reshape(N, -1), cut).reshape(-1)
    sizes[cut.dim] //= cut.mesh.size()
    own = QuantState(own_scales, torch.Size(sizes), state.code, blocksize, state.quant_type, state.dtype)
    return DTensor.from_local(own_codes, cut.mesh, [Shard(cut.dim)], run_check=False), own


def whole_4bit(weight: Any, own: QuantState, cut: Cut) -> tuple[Tensor, QuantState]:
    """Undo :func:`cut_4bit`, on each process; the scales stay f32."""
    codes = weight.detach().full_tensor().reshape(-1, 1)
    sizes = list(own.shape)  # type: ignore[arg-type]
    sizes[cut.dim] *= cut.mesh.size()
    along = 0 if sizes[1] % own.blocksize else cut.dim  # type: ignore[operator]
    scales = own.absmax.reshape(own.shape[0] if along or not sizes[1] % own.blocksize else 1, -1)  # type: ignore[index,operator]
    scales = _gathered(scales, Cut(cut.mesh, along)).reshape(-1)
    return codes, QuantState(scales, torch.Size(sizes), own.code, own.blocksize, own.quant_type, own.dtype)


def cut_scales_8bit(scales: Tensor, cut: Cut) -> Tensor:
    """Those of this process's rows of int8 codes; all of them where the rows themselves are cut."""
    return _part(scales[:, None], cut).reshape(-1) if cut.dim == 0 else scales


def whole_scales_8bit(scales: Tensor, cut: Cut) -> Tensor:
    return _gathered(scales, cut) if cut.dim == 0 else scales


def _part(values: Tensor, cut: Cut) -> Tensor:
    return values.chunk(cut.mesh.size(), cut.dim)[cut.mesh.get_local_rank()].contiguous().clone()


def _gathered(values: Tensor, cut: Cut) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(values, cut.mesh, [Shard(cut.dim)], run_check=False).full_tensor()


def own_codes(weight: Any) -> Tensor:
    """This process's packed codes of a weight that is cut, as a column."""
    return local_part(weight).reshape(-1, 1)
