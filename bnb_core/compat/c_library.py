"""``functional.lib``: the C symbols of the compiled kernels, for callers that pass pointers (csrc_shared/c_api.cpp)."""

from __future__ import annotations

import ctypes
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from bnb_core import registry

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What the endings of the names stand for."""

_pointer, _int = ctypes.c_void_p, ctypes.c_int
# code, A, absmax, out, blocksize, n, stream
_DEQUANTIZE = (*4 * (_pointer,), _int, _int, _pointer)
# out_features, rows, in_features, A, packed, absmax, code, out, lda, ldb, ldc, blocksize, stream
_GEMM = (*3 * (_int,), *5 * (_pointer,), *4 * (_int,), _pointer)

SIGNATURES: dict[str, tuple[Any, ...]] = {
    **{f"cdequantize_blockwise_{dtype}{code}": _DEQUANTIZE for dtype in DTYPES for code in ("", "_nf4", "_fp4")},
    **{f"cgemm_4bit_inference_naive_{dtype}": _GEMM for dtype in DTYPES},
}


class CLibrary:
    """The C symbols as ctypes functions without a result. They check nothing but their arguments' ctypes.

    The kernels are those of the backend that BNB_BACKEND or ``use_backend`` names when a symbol is looked up; without
    a name those for the machine's GPU, or else those for its CPU. Pointers are to memory of that device. Where no
    kernels are compiled, a symbol is there, as callers look them up when they are imported, and calling it raises.
    """

    @property
    def compiled_with_cuda(self) -> bool:
        """Whether the symbols take pointers to a GPU's memory."""
        backend = registry.library_backend()
        return backend is not None and "cuda" in backend.device_types

    def __getattr__(self, name: str) -> Any:
        if name not in SIGNATURES:
            raise AttributeError(f"no C symbol {name!r}; there are: {', '.join(SIGNATURES)}")
        backend = registry.library_backend()
        if backend is None or backend.library is None:
            return partial(_refuse, name)
        return _function(backend.library, name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *SIGNATURES]


def _refuse(name: str, *arguments: Any) -> NoReturn:
    raise RuntimeError(f"{name}: no backend with compiled kernels is available; `bnb-core info` says why")


@cache
def _function(library: Path, name: str) -> Any:
    function = getattr(ctypes.CDLL(str(library)), name)
    function.restype, function.argtypes = None, SIGNATURES[name]
    return function


lib = CLibrary()
