"""What the real bitsandbytes has and bnb_core under its name has not, by the reason for it.

A name is as surface.py has it, without ``bitsandbytes.``; ``name(argument)`` stands for an argument of a call and
``name=`` for the value of a constant. A star stands for anything. What belongs to an absent name needs no row.
"""

from __future__ import annotations

_NAMES: dict[str, tuple[str, ...]] = {
    # Its kernels.
    "It registers its kernels for one device there; those here are the packages of bnb_core.backends.": (
        "backends.cpu",
        "backends.cuda",
        "backends.default",
        "backends.hpu",
        "backends.mps",
        "backends.triton",
        "backends.xpu",
        "?*_ops",
    ),
    "Its kernels for Gaudi depend on it; the operators of torch serve there.": (
        "backends.utils.GAUDI_SW_VER",
        "backends.utils.get_gaudi_sw_version",
    ),
    "No forward changes a weight here, so no layer asks whether it is to repack it.": (
        "nn.modules.Linear*().support_avx512bf16_for_cpu",
    ),
    # Its compiled library.
    "It chooses among compiled files by the version of CUDA, ROCm or SYCL; here one serves a kind of device.": (
        "$BNB_CUDA_VERSION",
        "$BNB_ROCM_VERSION",
        "cextension.CudaBNBNativeLibrary",
        "cextension.XpuBNBNativeLibrary",
        "cextension.get_available_cuda_binary_versions",
        "cextension.get_cuda_bnb_library_path",
        "cextension.get_xpu_bnb_library_path",
        "cextension.parse_cuda_version",
    ),
    "There is one library object, lib, which is not made of a ctypes.CDLL.": ("cextension.BNBNativeLibrary(lib)",),
    "Where no kernels are compiled, lib itself says so when a symbol is called.": (
        "cextension.ErrorHandlerMockBNBNativeLibrary",
    ),
    "It is a handle of its own library; what needs cuBLAS here asks torch for it.": ("functional.CUBLAS_Context",),
    # Its diagnostics.
    "They are the parts of its report; diagnostics.main.main() prints that of bnb-core info.": (
        "diagnostics.cuda",
        "diagnostics.main.*",
        "diagnostics.utils",
    ),
    "It is an address of another project.": ("consts.NONPYTORCH_DOC_URL", "consts.PACKAGE_GITHUB_URL"),
    # What classes keep for themselves.
    "Overrides are stored otherwise here; GlobalOptimManager.resolve() gives them by parameter.": (
        "optim.optimizer.GlobalOptimManager().index2config",
        "optim.optimizer.GlobalOptimManager().optimizer",
        "optim.optimizer.GlobalOptimManager().pid2config",
        "optim.optimizer.GlobalOptimManager().uses_config_override",
    ),
    "It is never set.": ("utils.OutlierTracer().current_outlier_dims",),
    # What modules import for themselves.
    "A module imports bitsandbytes, or bitsandbytes.functional, under this name.": ("*.F", "nn.modules.bnb"),
    "A module imports it; it is in optim.optimizer.": ("optim.lars.Optimizer1State",),
    "The module logs nothing here; the layers log to nn.modules.logger.": ("*.logger",),
    # Defaults.
    "With its default, a class, no call works; None here stands for a fresh state.": (
        "autograd._functions.MatMul8bitFp.forward(state)",
    ),
    "Its default is the first CUDA device; None here stands for that, or for the CPU where there is none.": (
        "functional.get_paged(device)",
    ),
}

ABSENCES = {
    name if name.startswith("$") else f"bitsandbytes.{name}": reason
    for reason, names in _NAMES.items()
    for name in names
}
"""The reason by the name or the pattern of names."""
