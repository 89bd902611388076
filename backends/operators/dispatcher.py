"""What torch's dispatcher knows of the operators of bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

NAMESPACE = "bitsandbytes"


def operator(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def defined(name: str) -> bool:
    return hasattr(getattr(torch.ops, NAMESPACE), name)


def has_kernel(name: str, device_type: str) -> bool:
    """Whether a kernel is registered on the device's own key: that for every device does not count."""
    try:
        key = torch._C._dispatch_key_for_device(device_type)
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
    except RuntimeError:  # no such operator is defined, or torch has no such device
        return False


def device_types() -> list[str]:
    """Those for which kernels may be registered, PrivateUse1, the likeliest, by the name that it has now."""
    others = ("hpu", "mps", "xpu", "cuda", "cpu", "mtia", "ipu", "xla", "vulkan")
    return [torch._C._get_privateuse1_backend_name(), *others]
