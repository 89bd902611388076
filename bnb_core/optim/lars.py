"""LARS (arXiv 1708.03888), on the kernels and in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnb_core.optim.hyperparameters import check_hyperparameters, check_only
from bnb_core.optim.sgd import MomentumOptimizer


class LARS(MomentumOptimizer):
    """LARS: momentum whose update is limited by the parameter's norm (arXiv 1708.03888).

    Args:
        lr: step size.
        momentum: decay of the gradients' sum; with 0, no state is kept.
        dampening: 0 only.
        weight_decay: added to the gradient as ``weight_decay * p``.
        nesterov: False only.
        max_unorm: the update's norm is at most this multiple of the parameter's; a parameter of zeros stays zero.

    The settings that all optimizers share are described at :class:`~bnb_core.optim.optimizer.Optimizer8bit`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        *,
        capturable: bool = False,
    ) -> None:
        check_only("dampening", dampening, 0)
        check_only("nesterov", nesterov, False)
        super().__init__(
            "lars",
            params,
            lr,
            (momentum, 0.0),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            max_unorm=max_unorm,
            capturable=capturable,
        )


class LARSOfFixedBits(LARS):
    """The base of those classes that have the bits in their name: they do not take them as an argument."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov,
            args=args, min_8bit_size=min_8bit_size, max_unorm=max_unorm, capturable=capturable,
        )  # fmt: skip


class LARS8bit(LARSOfFixedBits):
    """LARS with 8-bit state."""

    state_bits = 8


class LARS32bit(LARSOfFixedBits):
    """LARS with 32-bit state."""

    state_bits = 32


class PytorchLARS(torch.optim.Optimizer):
    """LARS in plain torch, for any floating dtype, with dampening and Nesterov's momentum as in ``torch.optim.SGD``.

    Raises:
        ValueError: a setting out of its range, or Nesterov's momentum without momentum or with dampening.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        if not momentum >= 0:
            raise ValueError(f"momentum: expected a number >= 0, got {momentum!r}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"nesterov: expected momentum > 0 and dampening 0, got momentum {momentum!r}, dampening {dampening!r}"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "max_unorm": max_unorm,
        }
        check_hyperparameters(defaults)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    update = self._direction(group, p, p.grad)
                    p.sub_(group["lr"] * _trust(p, update, group["max_unorm"]) * update)
        return loss

    def _direction(self, group: Mapping[str, Any], p: Tensor, gradient: Tensor) -> Tensor:
        gradient = gradient + group["weight_decay"] * p
        if group["momentum"] == 0:
            return gradient
        state = self.state[p]
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        else:
            state["momentum_buffer"] = gradient.clone()
        buffer = state["momentum_buffer"]
        return gradient + group["momentum"] * buffer if group["nesterov"] else buffer


def _trust(p: Tensor, update: Tensor, max_unorm: float) -> Tensor | float:
    """The factor that brings the update's norm to at most ``max_unorm`` times the parameter's."""
    if max_unorm == 0:
        return 1.0
    limit, norm = max_unorm * p.norm(), update.norm()
    return torch.where(norm > limit, limit / norm, 1.0)
