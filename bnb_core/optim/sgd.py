"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnb_core.optim.hyperparameters import check_only
from bnb_core.optim.optimizer import Optimizer1State
from bnb_core.sharding import local_part


class MomentumOptimizer(Optimizer1State):
    """What SGD and LARS share: with a momentum of 0 there is nothing to remember, so such a parameter has no state."""

    def keeps_state(self, config: Mapping[str, Any]) -> bool:
        return config["betas"][0] > 0

    def init_state(self, group: Mapping[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        if self.keeps_state(self.get_config(gindex, pindex, group)):
            super().init_state(group, p, gindex, pindex)
        else:
            self.state[p]["step"] = self.counted(0, p)

    def _update_stateless(self, p: Tensor, state: dict[str, Any], config: Mapping[str, Any]) -> None:
        # At its first step the rule takes the gradient for the momentum and does not read the state.
        part = local_part(p)
        scratch = {"step": 0, "state1": torch.empty(part.shape, dtype=torch.float32, device=part.device)}
        self._update(p, scratch, config)
        state["step"] += 1


class SGD(MomentumOptimizer):
    """Stochastic gradient descent, as ``torch.optim.SGD`` without dampening and Nesterov's momentum.

    Args:
        lr: step size.
        momentum: decay of the gradients' sum; with 0, no state is kept.
        dampening: 0 only.
        weight_decay: added to the gradient as ``weight_decay * p``.
        nesterov: False only.

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
        *,
        capturable: bool = False,
    ) -> None:
        check_only("dampening", dampening, 0)
        check_only("nesterov", nesterov, False)
        super().__init__(
            "momentum",
            params,
            lr,
            (momentum, 0.0),
            0.0,
            weight_decay,
            optim_bits,
            args,
            min_8bit_size,
            capturable=capturable,
        )


class SGDOfFixedBits(SGD):
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
        *,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            args=args,
            min_8bit_size=min_8bit_size,
            capturable=capturable,
        )


class SGD8bit(SGDOfFixedBits):
    """SGD with 8-bit state."""

    state_bits = 8


class SGD32bit(SGDOfFixedBits):
    """SGD with 32-bit state."""

    state_bits = 32
