"""AdEMAMix (arXiv 2409.03137), on the kernels and in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnb_core.optim.hyperparameters import check_hyperparameters
from bnb_core.optim.optimizer import Optimizer2State
from bnb_core.records import OptimizerStep
from bnb_core.step_numbers import alpha_and_beta3


class AdEMAMix(Optimizer2State):
    """AdEMAMix: Adam with a second, slow average of the gradient (arXiv 2409.03137).

    Args:
        lr: step size.
        betas: decay of the fast average, of the second moment and of the slow average.
        alpha: weight of the slow average.
        t_alpha: steps over which alpha rises from 0; None for alpha from the start.
        t_beta3: steps over which the slow average's decay rises from the fast one's; None for all of it at once.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient; a step takes ``lr * weight_decay`` of the parameter.

    The settings that all optimizers share are described at :class:`~bnb_core.optim.optimizer.Optimizer8bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            "ademamix", params, lr, betas, eps, weight_decay, optim_bits, None, min_8bit_size,
            is_paged=is_paged, alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3, capturable=capturable,
        )  # fmt: skip


class AdEMAMixOfFixedBits(AdEMAMix):
    """The base of those classes that have the bits in their name: they do not take them as an argument."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay,
            min_8bit_size=min_8bit_size, is_paged=is_paged, capturable=capturable,
        )  # fmt: skip


class AdEMAMix8bit(AdEMAMixOfFixedBits):
    """AdEMAMix with 8-bit state."""

    state_bits = 8


class AdEMAMix32bit(AdEMAMixOfFixedBits):
    """AdEMAMix with 32-bit state."""

    state_bits = 32


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with its state in paged memory, whatever ``is_paged`` says."""

    always_paged = True


class PagedAdEMAMix8bit(PagedAdEMAMix, AdEMAMix8bit):
    """AdEMAMix with 8-bit state in paged memory."""


class PagedAdEMAMix32bit(PagedAdEMAMix, AdEMAMix32bit):
    """AdEMAMix with 32-bit state in paged memory."""


class _ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix in plain torch, for any floating dtype; the state has at least 32 bits.

    The arguments are those of :class:`AdEMAMix`, in another order. The state of a parameter is ``m1_m2``, the fast and
    the slow average stacked, and ``nu``; its group counts the steps.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "t_beta3": t_beta3,
            "t_alpha": t_alpha,
        }
        check_hyperparameters(defaults)
        if len(betas) != 3:
            raise ValueError(f"betas: expected 3 numbers, got {betas!r}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p, p.grad)
        return loss

    def _update(self, group: Mapping[str, Any], p: Tensor, gradient: Tensor) -> None:
        dtype = torch.promote_types(p.dtype, torch.float32)
        state = self.state[p]
        if not state:
            state["m1_m2"] = torch.zeros((2, *p.shape), dtype=dtype, device=p.device)
            state["nu"] = torch.zeros(p.shape, dtype=dtype, device=p.device)
        (m1, m2), nu, g = state["m1_m2"], state["nu"], gradient.to(dtype)
        beta1, beta2, beta3 = group["betas"]
        step = OptimizerStep(
            "ademamix", group["step"], group["lr"], beta1, beta2, beta3, group["alpha"],
            t_alpha=group["t_alpha"] or 0.0, t_beta3=group["t_beta3"] or 0.0,
        )  # fmt: skip
        alpha, beta3 = alpha_and_beta3(step)
        m1.mul_(beta1).add_(g, alpha=1 - beta1)
        m2.mul_(beta3).add_(g, alpha=1 - beta3)
        nu.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        correction1, correction2 = (1 - beta ** group["step"] for beta in (beta1, beta2))
        update = (m1 / correction1 + alpha * m2) / ((nu / correction2).sqrt() + group["eps"])
        p.copy_(p.to(dtype) * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update)
