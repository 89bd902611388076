"""The base class of all: state in 32 or 8 bits per element, paged or not, and the loop over the parameters."""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bnb_core.checks import check_flag
from bnb_core.optim.checkpoint import QUANT_STATE_KEY, STATE_KEYS, TENSOR_KEYS, ParameterState
from bnb_core.optim.compiled import compiled_step, init_group, primitive_and_record
from bnb_core.optim.flat_parameters import is_flattened, original_numel
from bnb_core.optim.hyperparameters import check_hyperparameters, check_lr_tensor, check_only
from bnb_core.optim.manager import GlobalOptimManager
from bnb_core.optim.saved_state import SavedState
from bnb_core.optim.sharded import check_sharded, local_gradient, with_bound
from bnb_core.optim.state_buffers import is_capturing
from bnb_core.paged import GlobalPageManager
from bnb_core.primitives import OPTIMIZER_BLOCKSIZE, OPTIMIZERS, block_count
from bnb_core.records import OptimizerStep
from bnb_core.sharding import is_sharded, local_part, sharded_type

ABSMAX_KEYS = ("absmax1", "absmax2")

_CAPTURED = (
    "{}.step: a CUDA graph would repeat it with the step count and the learning rate of its capture; make the "
    "optimizer with capturable=True, or capture forward and backward only and call step() after each replay"
)
_UNPREPARED = (
    "{}.step: a CUDA graph would make the state anew at each replay; call step() once before the capture, with a "
    "gradient for each parameter that has one in it"
)
_UNBOUNDED_UNDER_FSDP1 = (
    "max_unorm: FSDP1 does not tell which processes have the rest of a parameter, so that its norm is not known; use "
    "FSDP2 (torch.distributed.fsdp.fully_shard), or max_unorm=0"
)
_UNBOUNDED_AND_CAPTURABLE = (
    "max_unorm: a capturable optimizer cannot bound the update of a sharded parameter, as that takes norms of all "
    "processes on the host; make it with capturable=False"
)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """What :func:`torch.compiler.disable` makes of it, at the first call: it imports all of torch's compiler."""
    disabled = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call


class MockArgs:
    """Settings as attributes. Whole optimizers that bitsandbytes has pickled name this class."""

    def __init__(self, initial_data: Mapping[str, Any]) -> None:
        self.__dict__.update(initial_data)


class Optimizer8bit(SavedState):
    """What all optimizers here share (8-bit Optimizers, arXiv 2110.02861).

    A state of a parameter with ``optim_bits=8`` and at least ``min_8bit_size`` elements is kept as u8 codes with an f32
    scale per block of 256; any other one as f32. Parameters and gradients are f32, f16 or bf16.

    Args:
        params: parameters or groups of them, as for every torch optimizer.
        defaults: the settings of a group that leaves them out: lr, betas, eps, weight_decay and those of the rule.
        optim_bits: 8 or 32. A class with the bits in its name has those: where it takes the argument, its 8-bit form
            also takes 32, the default.
        is_paged: keep large states in paged memory, which may exceed the device's (see :mod:`bnb_core.paged`).
        args: a namespace whose attributes optim_bits, min_8bit_size, max_unorm, skip_zeros and is_paged, where present,
            take the place of those arguments; other attributes are ignored.
        min_8bit_size: smaller parameters keep 32-bit state.
        max_unorm: an update's norm is at most this multiple of its parameter's norm; 0 for no limit.
        skip_zeros: leave entries whose gradient is zero, and their state, untouched.
        capturable: :meth:`step` waits for no device, may be captured in a CUDA graph and compiled. The count of a
            parameter's steps is an f64 tensor on its device, which f64 holds exactly as far as a saved state may count;
            ``lr`` may be a tensor of one number there, which may change between replays. Its value is not checked.

    Raises:
        ValueError: a setting out of its range, or one that the optimizer cannot honour.
    """

    optimizer_name: str
    state_bits: int | None = None
    always_paged = False
    capturable = False
    non_castable_tensor_keys = TENSOR_KEYS
    _overrides: dict[int, dict[str, Any]]
    _overrides_version: int | None
    _process: int
    _FSDP_WRAPPED_QUANT_STATE_KEY = QUANT_STATE_KEY

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        optim_bits: int = 32,
        is_paged: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        *,
        capturable: bool = False,
    ) -> None:
        check_flag("capturable", capturable)
        self.capturable = bool(capturable)
        settings = {
            "optim_bits": optim_bits,
            "min_8bit_size": min_8bit_size,
            "max_unorm": max_unorm,
            "skip_zeros": skip_zeros,
            "is_paged": is_paged,
        }
        settings |= {key: getattr(args, key) for key in settings if hasattr(args, key)}
        self.is_paged = bool(settings.pop("is_paged")) or self.always_paged
        if self.state_bits == 32:
            check_only("optim_bits", settings["optim_bits"], 32)
        check_hyperparameters(settings)
        settings["optim_bits"] = self.state_bits or settings["optim_bits"]
        self.args: Any = MockArgs(settings)
        self._forget_preparation()
        super().__init__(params, defaults)
        self.state = defaultdict(ParameterState)

    def _forget_preparation(self) -> None:
        """Have the next step look at the devices of the state and at the overrides again."""
        self.__dict__.update(self._unprepared())

    @staticmethod
    def _unprepared() -> dict[str, Any]:
        return {"initialized": False, "_overrides": {}, "_overrides_version": None}

    @property
    def mng(self) -> GlobalOptimManager:
        return GlobalOptimManager.get_instance()

    @property
    def page_mng(self) -> GlobalPageManager:
        return GlobalPageManager.get_instance()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise
        self.initialized = False

    def check_group(self, group: Mapping[str, Any]) -> None:
        config = {**vars(self.args), **group}
        if self.capturable and isinstance(config.get("lr"), Tensor):
            check_lr_tensor(config.pop("lr"))
        check_hyperparameters(config)
        self._check_for_rule(group)

    def _check_for_rule(self, config: Mapping[str, Any]) -> None:
        """Check those settings whose range depends on the rule."""
        betas = config.get("betas", self.defaults["betas"])
        count = 3 if OPTIMIZERS[self.optimizer_name].stacked else 2
        if len(betas) != count:
            raise ValueError(f"betas: expected {count} numbers, got {betas!r}")
        if not OPTIMIZERS[self.optimizer_name].takes_max_unorm:
            check_only("max_unorm", config.get("max_unorm", self.args.max_unorm), 0.0)

    def check_overrides(self) -> None:
        """Take over what :class:`GlobalOptimManager` holds for parameters of this optimizer."""
        self._overrides_version = self.mng.version
        overrides = self.mng.resolve()
        if overrides:
            own = {id(p) for group in self.param_groups for p in group["params"]}
            overrides = {key: config for key, config in overrides.items() if key in own}
        for config in overrides.values():
            self._check_for_rule(config)
        self._overrides = overrides

    def get_config(self, gindex: int, pindex: int, group: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of one parameter: the optimizer's, its group's and its overrides, the last one counting."""
        if self._overrides_version != self.mng.version:
            self.check_overrides()
        config = {**self.args.__dict__, **group}
        params = config.pop("params")
        if self._overrides:
            config.update(self._overrides.get(id(params[pindex]), {}))
        return config

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Every setting is checked and every state made before the first parameter is updated. A function that
        torch.compile compiles is left for it, unless ``capturable``: then it is part of what is compiled, a call of an
        operator for each parameter, and the checks are made while it is compiled.

        Raises:
            ValueError: a gradient is sparse, or a setting is out of its range; nothing has changed then.
            OSError, RuntimeError: there is no memory for a state; nothing has changed then.
            RuntimeError: a CUDA graph is being captured, which would repeat this very step; or it would make the state
                anew at each replay, as no step has made it before.
        """
        if self.capturable and is_compiling() and type(self).update_step is Optimizer8bit.update_step:
            return compiled_step(self, closure)
        return self._eager_step(closure)

    def _init_group(self, *arguments: Any) -> int:
        """:func:`bnb_core.optim.compiled.init_group`; torch's compiler runs methods of optimizers with this name."""
        return init_group(self, *arguments)

    def prepare(self, indices: list[tuple[dict[str, Any], Tensor, int, int]]) -> None:
        """Have the state of these parameters where it belongs."""
        if not self.initialized or (self.is_paged and os.getpid() != self._process):
            self.to_gpu()
            self.initialized = True
        self._init_states(indices)

    @_uncompiled
    @torch.no_grad()
    def _eager_step(self, closure: Callable[[], Any] | None) -> Any:
        capturing = is_capturing()
        if capturing and not self.capturable:
            raise RuntimeError(_CAPTURED.format(type(self).__name__))
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_overrides()
        for group in self.param_groups:
            self.check_group(group)
        indices = [
            (group, p, gindex, pindex)
            for gindex, group in enumerate(self.param_groups)
            for pindex, p in enumerate(group["params"])
            if _has_dense_gradient(p)
        ]
        self.check_bounds(indices)
        if capturing and not (self.initialized and all("step" in self.state[p] for _, p, _, _ in indices)):
            raise RuntimeError(_UNPREPARED.format(type(self).__name__))
        self.prepare(indices)
        if type(self).update_step is Optimizer8bit.update_step:
            self._update_together(indices)
            return loss
        for group, p, gindex, pindex in indices:
            if self.is_paged:
                self.prefetch_state(p)
            self.update_step(group, p, gindex, pindex)
        return loss

    def check_bounds(self, indices: list[tuple[dict[str, Any], Tensor, int, int]]) -> None:
        """Whether the norms of parameters that are spread over processes can be had, where they bound the update."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        for group, p, gindex, pindex in indices:
            hidden = is_flattened(p) and torch.distributed.get_world_size() > 1
            if (hidden or (self.capturable and is_sharded(p))) and self.get_config(gindex, pindex, group)["max_unorm"]:
                raise ValueError(_UNBOUNDED_UNDER_FSDP1 if hidden else _UNBOUNDED_AND_CAPTURABLE)

    def _update_together(self, indices: list[tuple[dict[str, Any], Tensor, int, int]]) -> None:
        """One call for the parameters that differ in nothing but their tensors; each for itself where norms count."""
        together: dict[Any, list[tuple[Tensor, dict[str, Any]]]] = {}
        configs: dict[Any, dict[str, Any]] = {}
        for group, p, gindex, pindex in indices:
            own = id(p) if id(p) in self._overrides else None
            settings = (gindex, own)
            config = configs.get(settings)
            if config is None:
                config = configs[settings] = self.get_config(gindex, pindex, group)
            state = self.state[p]
            if self.is_paged:
                self.prefetch_state(p)
            if "state1" not in state or config["max_unorm"] > 0:
                self.update_step(group, p, gindex, pindex)
            else:
                codebooks = id(state.get("qmap1")), id(state.get("qmap2"))
                count = None if self.capturable else state["step"]
                key = (settings, count, p.dtype, p.device, state["state1"].dtype, codebooks)
                together.setdefault(key, []).append((p, state))
        for key, members in together.items():
            self._update_several(members, configs[key[0]])

    def _update_several(self, members: list[tuple[Tensor, dict[str, Any]]], config: Mapping[str, Any]) -> None:
        states = [state for _, state in members]
        first = states[0]
        if self.capturable:
            step = [state["step"] for state in states]
            torch._foreach_add_(step, 1.0)
        else:
            step = first["step"] + 1
        columns = {key: [state[key] for state in states] for key in (*STATE_KEYS, *ABSMAX_KEYS) if key in first}
        update, record = primitive_and_record({**first, **columns})
        g, p = [p.grad for p, _ in members], [p for p, _ in members]
        if sharded_type():
            g, p = [local_gradient(whole) for whole in p], [local_part(whole) for whole in p]
        update.several(self.settings_of(config, step, p[0].device), g, p, record, None)
        if not self.capturable:
            for state in states:
                state["step"] = step

    def settings_of(self, config: Mapping[str, Any], step: Any, device: torch.device) -> OptimizerStep:
        """The settings of a step of parameters on a device; ``step`` is an int, a tensor or a list of tensors."""
        beta1, beta2, *others = config["betas"]
        alpha, beta3, t_alpha, t_beta3 = 0.0, 0.0, 0.0, 0.0
        if others:
            alpha, beta3 = config["alpha"], others[0]
            t_alpha, t_beta3 = config["t_alpha"] or 0.0, config["t_beta3"] or 0.0
        eps, weight_decay = config["eps"], config["weight_decay"]
        max_unorm, skip_zeros = config["max_unorm"], config["skip_zeros"]
        lr: Any = config["lr"]
        lr_tensor, step_tensor = None, None
        if self.capturable and isinstance(lr, Tensor):
            lr, lr_tensor = 0.0, lr.detach().to(device, torch.float64)
        if not isinstance(step, int):
            step, step_tensor = 1, step
        return OptimizerStep(
            self.optimizer_name, step, float(lr), beta1, beta2, beta3, alpha, eps, weight_decay, 1.0, max_unorm,
            skip_zeros, t_alpha, t_beta3, step_tensor, lr_tensor,
        )  # fmt: skip

    def _init_states(self, indices: list[tuple[dict[str, Any], Tensor, int, int]]) -> None:
        """Make the states that are missing, or none."""
        new = [index for index in indices if "step" not in self.state[index[1]]]
        try:
            for group, p, gindex, pindex in new:
                self.init_state(group, p, gindex, pindex)
        except BaseException:
            for _, p, _, _ in new:
                del self.state[p]
            raise

    def init_state(self, group: Mapping[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make the state of a parameter that has none: zeros, in the form its settings ask for.

        That of a DTensor is as large as this process's shard; what the settings say of its size, the whole decides.
        """
        config = self.get_config(gindex, pindex, group)
        quantized = config["optim_bits"] == 8 and original_numel(p) >= config["min_8bit_size"]
        traits = OPTIMIZERS[self.optimizer_name]
        state: dict[str, Any] = {"step": self.counted(0, p)}
        part = local_part(p)
        for number, key in enumerate(STATE_KEYS[: traits.states], start=1):
            stack = (2,) if traits.stacked and key == "state1" else ()
            dtype = torch.uint8 if quantized else torch.float32
            state[key] = self.get_state_buffer(p, dtype, (*stack, *part.shape))
            if quantized:
                blocks = block_count(part.numel(), OPTIMIZER_BLOCKSIZE)
                state[f"qmap{number}"] = self._qmap(key, part.device)
                state[f"absmax{number}"] = torch.zeros((*stack, blocks), dtype=torch.float32, device=part.device)
        self.state[p].update(state)

    def counted(self, step: int, p: Tensor) -> int | Tensor:
        """A count of the parameter's steps as its state has it."""
        return torch.full((), step, dtype=torch.float64, device=p.device) if self.capturable else step

    def update_step(self, group: Mapping[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Step one parameter that has its gradient and its state."""
        config, state = self.get_config(gindex, pindex, group), self.state[p]
        if "state1" not in state and self.keeps_state(config):
            self.init_state(group, p, gindex, pindex)
        if "state1" in state:
            self._update(p, state, config)
        else:
            self._update_stateless(p, state, config)

    def _update_stateless(self, p: Tensor, state: dict[str, Any], config: Mapping[str, Any]) -> None:
        """For rules that may do without a state (``keeps_state``)."""
        raise NotImplementedError

    def _update(self, p: Tensor, state: dict[str, Any], config: Mapping[str, Any]) -> None:
        assert p.grad is not None
        count = state["step"]
        step = count.add_(1.0) if isinstance(count, Tensor) else count + 1
        self.make_room(p, state, config)
        update, record = primitive_and_record(state)
        settings = self.settings_of(config, step, p.device)
        if settings.max_unorm > 0 and is_sharded(p):
            settings = with_bound(update, settings, p, record, state["unorm_vec"])
        update(settings, local_gradient(p), local_part(p), record, state.get("unorm_vec"))
        state["step"] = step

    @staticmethod
    def make_room(p: Tensor, state: dict[str, Any], config: Mapping[str, Any]) -> None:
        """For the norm of the update, where that is bounded."""
        if config["max_unorm"] > 0 and "unorm_vec" not in state:
            state["unorm_vec"] = torch.zeros(1, dtype=torch.float32, device=p.device)


def _has_dense_gradient(p: Tensor) -> bool:
    grad = p.grad
    if grad is not None and grad.layout is not torch.strided:
        raise ValueError(f"grad: sparse gradients are not supported, got layout {grad.layout}; expected a dense tensor")
    if grad is not None and sharded_type():
        check_sharded(p)
    return grad is not None
