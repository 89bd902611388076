"""The classes of values and of memory layouts that cases are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _normal(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator).to(dtype)


def _zero(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Zeros of both signs."""
    values = torch.zeros(n, dtype=dtype)
    values[::3] = -0.0
    return values


def _subnormal(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Nothing above the largest subnormal; of f16, whose subnormals are normal in f32, the smallest values."""
    tiny = torch.finfo(dtype).tiny
    return (torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1).mul_(tiny).to(dtype)


def _tiny(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Around the smallest normal number of f32: the block's reciprocal is near the largest."""
    return (_normal(n, torch.float32, generator).double() * 2.0**-126 * 3).to(dtype)


def _huge(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    largest = torch.finfo(dtype).max
    return ((torch.rand(n, generator=generator, dtype=torch.float64) * 2 - 1) * largest).to(dtype)


def _sprinkled(*specials: float) -> Callable[[int, torch.dtype, torch.Generator], Tensor]:
    """Normal values with a special one here and there, so that some blocks hold one and others none."""

    def values(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        result = _normal(n, dtype, generator)
        places = torch.randperm(n, generator=generator)[: max(1, n // 301)]
        for index, place in enumerate(places.tolist()):
            result[place] = specials[index % len(specials)]
        return result

    return values


def _outliers(n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One value in each stretch far above the others, as in activations of large language models."""
    result = _normal(n, dtype, generator)
    result[::97] *= 64
    return result


VALUES: dict[str, Callable[[int, torch.dtype, torch.Generator], Tensor]] = {
    "normal": _normal,
    "zero": _zero,
    "subnormal": _subnormal,
    "tiny": _tiny,
    "huge": _huge,
    "inf": _sprinkled(float("inf"), float("-inf")),
    "nan": _sprinkled(float("nan")),
    "inf and nan": _sprinkled(float("inf"), float("nan"), float("-inf")),
    "outliers": _outliers,
}


def rows(size: Sequence[int], dtype: torch.dtype, values: str, generator: torch.Generator) -> Tensor:
    """[..., K], the rows of a product."""
    A = torch.randn(tuple(size), generator=generator)
    K = A.shape[-1]
    if values == "cancelling":
        # Large terms that nearly cancel: a product in half precision, or an f32 input in bf16, shows.
        A = A + torch.where(torch.arange(K) % 2 == 0, 300.0, -300.0)
    elif values in ("large", "small scales"):
        A = A * (100.0 if dtype == torch.float16 else 1e30)
    elif values == "nan row":
        A.view(-1, K)[0, K // 2] = float("nan")
    elif values == "inf row":
        A.view(-1, K)[0, K // 2] = float("inf")
    return A.to(dtype)


def unit_of_scales(dtype: torch.dtype, values: str) -> float:
    """Small scales make weights that f16 has fewer digits for, and the other dtypes all of theirs."""
    if values != "small scales":
        return 1.0
    return 1e-4 if dtype == torch.float16 else 1e-30


def midpoints(code: Tensor, blocksize: int) -> Tensor:
    """f32 blocks with absmax 1 that hold every midpoint of an ascending codebook, and one ulp on each side of it."""
    ordered = code.numpy()
    exact = (ordered[:-1] + ordered[1:]) * np.float32(0.5)
    values = np.concatenate([exact, np.nextafter(exact, np.float32(2)), np.nextafter(exact, np.float32(-2))])
    values = np.concatenate([values, -values]).clip(-1, 1)
    rows = np.array_split(values, range(blocksize - 1, len(values), blocksize - 1))
    blocks = [np.concatenate([[np.float32(1)], row, np.zeros(blocksize - 1 - len(row))]) for row in rows]
    return torch.from_numpy(np.concatenate(blocks).astype(np.float32))


def _contiguous(tensor: Tensor) -> Tensor:
    """A copy, as the other layouts are."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _transposed(tensor: Tensor) -> Tensor:
    """The same values with the strides of a transposed tensor."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0) if tensor.dim() > 1 else _strided(tensor)


def _strided(tensor: Tensor) -> Tensor:
    """Every other element of a larger tensor."""
    base = torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)
    base[..., 0] = tensor
    return base[..., 0]


def _misaligned(tensor: Tensor) -> Tensor:
    """At storage offset 1."""
    base = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    view = base[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def _negated(tensor: Tensor) -> Tensor:
    """The memory holds the other sign, and torch's negative bit is set, as of ``x.conj().imag``."""
    return torch._neg_view(-tensor)


def contiguous_copy(tensor: Tensor) -> Tensor:
    """The same values as a tensor of their own, at an address that torch gives it."""
    return tensor.clone(memory_format=torch.contiguous_format).resolve_neg()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "transposed": _transposed,
    "strided": _strided,
    "misaligned": _misaligned,
    "negated": _negated,
}
