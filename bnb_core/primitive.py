"""What a primitive is: one declaration that holds its schema, its checks, its result and its documentation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from bnb_core import registry
from bnb_core.checks import check_dtype, check_same_device, check_shape, check_tensor
from bnb_core.records import RECORDS, SCHEMAS, flat, is_record, map_tensors
from bnb_core.signature import is_readable, signature

NAMESPACE = "bnb_core"
MOST_PLANS = 1024
"""Signatures of calls that a primitive remembers."""
TORCH_ALIGNMENT = 64
"""Of the memory that torch allocates: on CPUs exactly so, on GPUs at least."""

_library = torch.library.Library(NAMESPACE, "DEF")
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}


class Out(NamedTuple):
    """The shape and dtype of one output. It is allocated on the device of the first tensor argument."""

    shape: Sequence[int]
    dtype: torch.dtype
    zeroed: bool = False
    """Whether the kernel leaves some of it unwritten, which is zero then."""

    def allocate(self, device: torch.device) -> Tensor:
        make = torch.zeros if self.zeroed else torch.empty
        return make(self.shape, dtype=self.dtype, device=device)

    def allocator(self, device: torch.device) -> Callable[[], Tensor]:
        """:meth:`allocate` for many calls: what it gives is what ``torch.empty`` gives, in two thirds of the time."""
        if self.zeroed:
            return partial(self.allocate, device)
        strides = self.allocate(torch.device("meta")).stride()
        return partial(torch.empty_strided, self.shape, strides, dtype=self.dtype, device=device)


class _Plan(NamedTuple):
    """What follows from the metadata of a call's arguments."""

    outputs: tuple[Out, ...]
    device: torch.device
    device_type: str
    readable: bool
    """Whether the kernel may have the arguments as they are."""
    allocate: Callable[[], Any]
    """The outputs, as the caller gets them: a tensor, a tuple of them, or None."""


def plain_tensor_type(cls: Any) -> Any:
    """Class decorator: a Tensor subclass without behaviour of its own, whose instances go straight to the kernels."""
    _PLAIN_TYPES.add(cls)
    return cls


def goes_to_dispatcher(tensor: Tensor) -> bool:
    """Whether torch must see the call: compiled, traced, under torch.func or a mode, with fake or meta tensors."""
    return (
        is_compiling()
        or _are_functorch_transforms_active()
        or type(tensor) not in _PLAIN_TYPES
        or tensor.is_meta
        or _len_torch_dispatch_stack() > 0
        or _is_tracing()
    )


def plain(value: Any) -> Any:
    """A tensor without a class of ours, which torch's dispatcher would ask about each operation; others as they are."""
    if not isinstance(value, Tensor) or type(value) not in _PLAIN_TYPES or type(value) is Tensor:
        return value
    with torch._C.DisableTorchFunctionSubclass():
        # torch.export does not see through .data, and a view costs four times as much as what detach gives.
        return value.view(value.shape) if value.requires_grad else value.detach()


def plain_codes(codes: Tensor) -> Tensor:
    """:func:`plain` of codes, which take no gradient, in two thirds of the time."""
    if type(codes) is Tensor or type(codes) not in _PLAIN_TYPES:
        return codes
    return torch._C._disabled_torch_function_impl(Tensor.detach, (), (codes,), {})


class Primitive:
    """A callable that checks its arguments, allocates its outputs and has the serving backend's kernel fill them.

    Eager calls go straight to the kernel; traced ones go through ``torch.ops.bnb_core.<name>``, which does the same
    at run time. ``out=`` takes the outputs from the caller, who then gets them back.
    """

    def __init__(
        self, schema: str, declaration: Callable[..., Out | tuple[Out, ...] | None], differentiable: bool
    ) -> None:
        self.name = declaration.__name__
        self.declaration = declaration
        self.__doc__ = declaration.__doc__
        self.__signature__ = inspect.signature(declaration)
        arguments = schema[1 : schema.rindex(") ->")].split(", ")
        self._records = [RECORDS.get(argument.split()[0]) for argument in arguments]
        self.schema = f"{self.name}{_RECORD.sub(_expanded, schema)}"
        self._plans: dict[Any, _Plan] = {}
        _library.define(self.schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, lambda *flat: self.run(self.structured(flat)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", self._fake, lib=_library)
        if not differentiable:
            _library.impl(self.name, torch.library.fallthrough_kernel, "Autograd")
        self.op = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.names = tuple(argument.name for argument in self.op._schema.arguments)
        """Of the operator's arguments, and of those that errors tell of."""
        # An optimizer's arguments are never like earlier ones, as they count its steps.
        self._signature = signature if self.op._schema.returns else lambda arguments: None
        self._first_name, self._first_place, self._first_field = self._first_tensor()
        registry.declare(self.name)

    def _first_tensor(self) -> tuple[str, int, int | None]:
        """Its name, which argument it is, and which field of that where the argument is a record."""
        places = [
            (place, None if record is None else field)
            for place, record in enumerate(self._records)
            for field in range(1 if record is None else len(record._fields))
        ]
        types = [str(argument.type) for argument in self.op._schema.arguments]
        first = types.index("Tensor")
        return self.names[first], *places[first]

    def structured(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """The operator's arguments as the declaration has them, records among them."""
        remaining = iter(flat)
        return tuple(
            [
                next(remaining) if record is None else record._make([next(remaining) for _ in record._fields])
                for record in self._records
            ]
        )

    def __repr__(self) -> str:
        return f"<primitive {self.schema}>"

    def __call__(self, *arguments: Any, out: Any = None) -> Any:
        first = arguments[self._first_place]
        if self._first_field is not None:
            if not is_record(first):
                self._checked(arguments)
            first = first[self._first_field]
        if not goes_to_dispatcher(first):
            return self.run(arguments, out)
        check_tensor(self._first_name, first)
        result = self._dispatched(arguments)
        if out is None:
            return result
        filled = tuple(
            computed if given is None else _copied_into(name, given, computed)
            for (name, given), computed in zip(
                _given_outputs(out, len(_as_tuple(result))), _as_tuple(result), strict=True
            )
        )
        return filled if isinstance(out, tuple) else filled[0]

    def _dispatched(self, arguments: tuple[Any, ...]) -> Any:
        """The call by way of torch, which names no argument when one is of a kind that the schema does not have."""
        try:
            return self.op(*[plain(argument) for argument in flat(arguments)])
        except RuntimeError:
            self._checked(arguments)
            raise

    def run(self, arguments: tuple[Any, ...], out: Any = None) -> Any:
        """The call itself, for callers who know that torch need not see it (:func:`goes_to_dispatcher`)."""
        key = self._signature(arguments)
        plan = self._plans.get(key) or self._planned(arguments, key)
        if out is not None:
            return self._run_into(out, plan, arguments)
        result = plan.allocate()
        if not plan.readable:
            arguments = made_readable(arguments)
        kernel = registry.kernel_for(self.name, plan.device_type, arguments)
        if result is None:
            kernel.function(*arguments)
        else:
            kernel.function(*arguments, out=result)
        return result

    def several(self, *arguments: Any) -> None:
        """Many calls of a primitive that changes its arguments, in one where the kernel can.

        Args:
            arguments: those of one call, with a list of one length for each tensor that differs between the calls. The
                fields of a record without tensors are checked at each time, and all but the first not remembered.
        """
        first = self._of_call(arguments, 0)
        tensors = [value for value in flat(arguments) if isinstance(value, Tensor | list)]
        count = len(next(value for value in tensors if isinstance(value, list)))
        if any(goes_to_dispatcher(value) for value in flat(first) if isinstance(value, Tensor)):
            for index in range(count):
                self(*self._of_call(arguments, index))
            return
        self.declaration(*first)
        key = signature((arguments[0][0], *tensors))
        plan = self._plans.get(key)
        if plan is None:
            plans = [self._plan(self._of_call(arguments, index)) for index in range(count)]
            each = [t for value in tensors for t in (value if isinstance(value, list) else [value])]
            readable = all(is_readable(t) for t in each) and len({p.device for p in plans}) == 1
            plan = plans[0]._replace(readable=readable)
            self._remember(key, plan)
        kernel = registry.kernel_for(self.name, plan.device_type, first)
        if plan.readable and kernel.several is not None:
            kernel.several(*arguments)
        else:
            for index in range(count):
                kernel.function(*self._of_call(arguments, index))

    @staticmethod
    def _of_call(arguments: tuple[Any, ...], index: int) -> tuple[Any, ...]:
        """The arguments of one of the calls."""

        def member(argument: Any) -> Any:
            if is_record(argument):
                return type(argument)._make([member(field) for field in argument])
            return argument[index] if isinstance(argument, list) else argument

        return tuple([member(argument) for argument in arguments])

    def _run_into(self, out: Any, plan: _Plan, arguments: tuple[Any, ...]) -> Any:
        """Fill the caller's outputs; those that are None are allocated."""
        outputs, device = plan.outputs, plan.device
        named = _given_outputs(out, len(outputs))
        given = tuple(
            expected.allocate(device) if tensor is None else tensor
            for (_, tensor), expected in zip(named, outputs, strict=True)
        )
        for (name, _), tensor, expected in zip(named, given, outputs, strict=True):
            self._check_output(name, tensor, expected, arguments, device)
        for tensor, other in combinations(given, 2):
            if _share_memory(tensor, other):
                raise ValueError("out: two of its tensors share memory; expected one memory for each")
        for tensor, expected in zip(given, outputs, strict=True):
            if expected.zeroed:
                tensor.zero_()
        buffers = tuple(t if is_readable(t) else e.allocate(device) for t, e in zip(given, outputs, strict=True))
        arguments = made_readable(arguments)
        kernel = registry.kernel_for(self.name, plan.device_type, arguments)
        kernel.function(*arguments, out=buffers if isinstance(out, tuple) else buffers[0])
        for tensor, buffer in zip(given, buffers, strict=True):
            if tensor is not buffer:
                tensor.copy_(buffer)
        return given if isinstance(out, tuple) else given[0]

    def _check_output(
        self, name: str, tensor: Tensor, expected: Out, arguments: tuple[Any, ...], device: torch.device
    ) -> None:
        _check_fits(name, tensor, expected.dtype, expected.shape, device)
        for argument_name, argument in self._tensors(arguments):
            if _share_memory(argument, tensor):
                raise ValueError(
                    f"{name}: shares its memory with {argument_name}, which is still to be read; give other memory"
                )

    def _fake(self, *flat: Any) -> Any:
        outputs, device = self._checked(self.structured(flat))
        if outputs is None or isinstance(outputs, Out):
            return None if outputs is None else outputs.allocate(device)
        return tuple(o.allocate(device) for o in outputs)

    def _planned(self, arguments: tuple[Any, ...], key: Hashable | None) -> _Plan:
        """Check the arguments, plan the call, and remember the plan for arguments of the same signature.

        All of a plan follows from the arguments' metadata. Without a signature the arguments are checked each time.
        """
        plan = self._plan(arguments)
        self._remember(key, plan)
        return plan

    def _remember(self, key: Hashable | None, plan: _Plan) -> None:
        """In place of the oldest, where there are too many."""
        if key is None:
            return
        if len(self._plans) >= MOST_PLANS:
            with suppress(KeyError, RuntimeError, StopIteration):  # another thread may have done so
                del self._plans[next(iter(self._plans))]
        self._plans[key] = plan

    def _plan(self, arguments: tuple[Any, ...]) -> _Plan:
        outputs, device = self._checked(arguments)
        if outputs is None:  # the kernel changes some of its arguments, and takes any strides
            return _Plan((), device, device.type, True, lambda: None)
        readable = all(is_readable(tensor) for _, tensor in self._tensors(arguments))
        if isinstance(outputs, Out):
            return _Plan((outputs,), device, device.type, readable, outputs.allocator(device))
        allocators = [output.allocator(device) for output in outputs]
        return _Plan(outputs, device, device.type, readable, lambda: tuple([allocate() for allocate in allocators]))

    def _checked(self, arguments: tuple[Any, ...]) -> tuple[Any, torch.device]:
        for argument, record, name in zip(arguments, self._records, self.__signature__.parameters, strict=True):
            if record is not None and type(argument) is not record:
                raise TypeError(f"{name}: expected a {record.__name__}, got {type(argument).__name__}")
        outputs = self.declaration(*arguments)
        tensors = list(self._tensors(arguments))
        check_same_device(tensors)
        return outputs, tensors[0][1].device

    def _tensors(self, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
        """All tensors, those in records too, with their names."""
        for name, value in zip(self.names, flat(arguments), strict=True):
            if isinstance(value, Tensor):
                yield name, value


def primitive(schema: str, differentiable: bool = False) -> Callable[[Callable[..., Any]], Primitive]:
    """Declare a primitive.

    The decorated function checks the arguments, raising TypeError or ValueError (docs/SPEC.md section 7), and
    returns the :class:`Out` or the tuple of them that the primitive gives; None if it only changes its arguments.

    Args:
        schema: the arguments and results in torch's schema language, without the name; a record of records.py stands
            for its fields.
        differentiable: the package autograd registers a gradient; otherwise torch sees results that need none.
    """
    return lambda declaration: Primitive(schema, declaration, differentiable)


_RECORD = re.compile(rf"({'|'.join(RECORDS)}) (\w+)")


def _expanded(argument: re.Match[str]) -> str:
    """The fields of a record in torch's schema language."""
    return SCHEMAS[RECORDS[argument[1]]].format(argument=argument[2])


def _as_tuple(value: Any) -> tuple[Any, ...]:
    """A lone Out is itself a tuple, of shape and dtype."""
    return value if isinstance(value, tuple) and not isinstance(value, Out) else (value,)


def _given_outputs(out: Any, count: int) -> list[tuple[str, Any]]:
    """The caller's outputs and what errors call them: ``out``, or ``out[0]`` and so on where it is a tuple."""
    if not isinstance(out, tuple):
        out, names = (out,), ["out"]
    else:
        names = [f"out[{index}]" for index in range(len(out))]
    if len(out) != count:
        raise ValueError(f"out: expected {count} tensors, got {len(out)}")
    return list(zip(names, out, strict=True))


def _check_fits(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device) -> None:
    check_dtype(name, tensor, (dtype,))
    check_shape(name, tensor, shape)
    if tensor.device != device:
        raise ValueError(f"{name}: expected on {device}, got on {tensor.device}")


def _copied_into(name: str, given: Tensor, computed: Tensor) -> Tensor:
    _check_fits(name, given, computed.dtype, computed.shape, computed.device)
    return given.copy_(computed)


def made_readable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments, with a copy of each tensor whose memory does not hold its values in order (``is_readable``)."""
    return map_tensors(_readable, arguments)


def _readable(tensor: Tensor) -> Tensor:
    return tensor.resolve_neg().contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that begins where no allocation of torch's does.

    At such an address kernels and torch's matmuls may add up in another order, but a result depends on values alone.
    """
    return tensor if tensor.data_ptr() % TORCH_ALIGNMENT == 0 else tensor.clone()


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether the address ranges overlap; empty tensors, and those whose memory torch does not see, have none."""
    (a_start, a_end), (b_start, b_end) = _addresses(a), _addresses(b)
    return a.device == b.device and a_start < b_end and b_start < a_end and min(a_start, b_start) > 0


def _addresses(tensor: Tensor) -> tuple[int, int]:
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    start = tensor.data_ptr()
    return start, start + (elements * tensor.element_size() if tensor.numel() else 0)
