"""The API over a backend: what people have been bitten by elsewhere, and its relatives."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnb_core import autograd, functional, optim
from bnb_core.checks import QUANT_TYPES
from bnb_core.codebooks import create_dynamic_map
from bnb_core.conformance import oracle
from bnb_core.conformance.case import Case, Context, Failure
from bnb_core.conformance.compare import matmul_bound, same_bits, within
from bnb_core.conformance.values import DTYPES, LAYOUTS, dtype_name
from bnb_core.nn import Embedding4bit, Linear4bit, Linear8bitLt

INPUT_SHAPES: dict[str, tuple[int, ...]] = {
    "1-D": (),
    "one row": (1,),
    "2-D": (5,),
    "many rows": (70,),
    "3-D": (2, 3),
    "4-D": (2, 1, 3),
    "no rows": (0,),
}
# (in_features, out_features)
LAYERS = {"even": (128, 64), "K no multiple of the block": (100, 33), "K odd": (67, 18), "K below a block": (9, 5)}


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise Failure(sentence)


def _raises(error: type[Exception], argument: str, call: Callable[[], Any]) -> None:
    """The call must fail with this error, which begins with the argument's name."""
    try:
        call()
    except error as raised:
        _require(str(raised).startswith(argument), f"the error should begin with {argument!r}, it says: {raised}")
        return
    raise Failure(f"{argument}: a bad value was accepted")


def _randn(context: Context, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=context.generator(name)).to(dtype)


def _linear4bit(
    context: Context, dtype: torch.dtype = torch.float32, layer: str = "even", nested: bool = True
) -> Linear4bit:
    """A quantized layer with random weight and bias, which computes in the dtype."""
    K, N = LAYERS[layer]
    module = Linear4bit(K, N, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested)
    with torch.no_grad():
        module.weight.copy_(_randn(context, f"weight,{layer}", N, K))
        module.bias.copy_(_randn(context, f"bias,{layer}", N))
    return module.to(context.device)


def _dense_weight(module: Linear4bit) -> np.ndarray:
    return functional.dequantize_4bit(module.weight.data, module.weight.quant_state).double().cpu().numpy()


def _check_linear4bit(context: Context, layer: str, shape: str, dtype: torch.dtype, layout: str) -> None:
    """Forward and backward against f64."""
    module = _linear4bit(context, dtype, layer)
    size = (*INPUT_SHAPES[shape], LAYERS[layer][0])
    cpu = _randn(context, f"x,{layer},{shape}", *size, dtype=dtype)
    x = context.move(LAYOUTS[layout](cpu)).requires_grad_()
    y = module(x)
    _require(y.dtype == dtype, f"the output has {y.dtype}, the input {dtype}")
    dY = _randn(context, "dY", *y.shape, dtype=dtype)
    y.backward(dY.to(context.device))
    w, b = _dense_weight(module), module.bias.detach().to(dtype).double().cpu().numpy()
    a, g = cpu.double().numpy(), dY.double().numpy()
    expected = a @ w.T + b
    bound = matmul_bound(dtype, w.shape[1], np.abs(a) @ np.abs(w).T + np.abs(b), expected)
    within("y", y.detach().double().cpu().numpy(), expected, bound)
    # The gradient may take the weight rounded to the dtype, as the forward may.
    slack = 4 * matmul_bound(dtype, w.shape[0], np.abs(g) @ np.abs(w), g @ w)
    within("dx", x.grad.double().cpu().numpy(), g @ w, slack)  # type: ignore[union-attr]


def _wrong_inner_dimension(context: Context) -> None:
    module = _linear4bit(context)
    for size in (127, 129, 64, 0):
        x = torch.ones(3, size, device=context.device)
        _raises(ValueError, "A:", partial(module, x))


def _short_absmax(context: Context) -> None:
    packed, state = functional.quantize_4bit(context.move(_randn(context, "short", 64, 64)))
    state.absmax = state.absmax[:-1]
    _raises(ValueError, "absmax:", lambda: functional.dequantize_4bit(packed, state))
    x = torch.ones(2, 64, device=context.device)
    _raises(ValueError, "absmax:", lambda: autograd.matmul_4bit(x, packed.t(), state))
    codes, state8 = functional.quantize_blockwise(context.move(_randn(context, "short", 600)), blocksize=64)
    state8.absmax = state8.absmax[:-1]
    _raises(ValueError, "absmax:", lambda: functional.dequantize_blockwise(codes, state8))


def _state_bits(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def _same_state(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    _require(before.keys() == after.keys(), f"the keys were {list(before)}, they are {list(after)}")
    for key, value in before.items():
        same_bits(key, after[key].cpu(), value.cpu())


def _forward_leaves_state(context: Context, dtype: torch.dtype) -> None:
    """A forward, in any mode, and a move change nothing of what is saved, nor what backward computes."""
    for module in (_linear4bit(context, dtype), _linear8bit(context)):
        before = _state_bits(module)
        x = _randn(context, "state", 4, 128, dtype=dtype).to(context.device)
        module.eval()
        with torch.no_grad():
            first = module(x)
        _same_state(before, _state_bits(module))
        module.train()
        trained = x.clone().requires_grad_()
        module(trained).sum().backward()
        module.to(context.device).to(torch.bfloat16).to(torch.float32)
        after = _state_bits(module)
        _same_state({k: v for k, v in before.items() if k != "bias"}, {k: v for k, v in after.items() if k != "bias"})
        module.bias.data = before["bias"].to(context.device)
        same_bits("a later forward", module(x).detach().cpu(), first.cpu())


def _saved_module_is_restored(context: Context) -> None:
    builders: list[Callable[[], nn.Module]] = [
        *(
            partial(Linear4bit, 128, 64, quant_type=name, compress_statistics=nested)
            for name, nested in product(QUANT_TYPES, (True, False))
        ),
        lambda: Linear8bitLt(128, 64, has_fp16_weights=False),
        lambda: Embedding4bit(30, 64),
    ]
    for build in builders:
        module, fresh = build().to(context.device), build()
        state = copy.deepcopy(module.state_dict())
        fresh.load_state_dict(state, strict=True)
        _same_state(state, _state_bits(fresh.to(context.device)))


def _special_values(context: Context, quant_type: str) -> None:
    """NaN stays NaN and keeps to its block; zero stays zero; a subnormal block is zero; infinity is not a number."""
    A = _randn(context, "special", 6 * 64)
    A[10], A[70], A[140] = float("nan"), float("inf"), 0.0
    A[192:256] = 0.0
    A[256:320] = 1e-40
    got = functional.dequantize_4bit(*functional.quantize_4bit(context.move(A), quant_type=quant_type)).cpu()
    _require(bool(got[:128].isnan().all()), "a block with a NaN or an infinity came back as numbers")
    _require(bool((got[192:320] == 0).all()), "a zero or subnormal block came back as something else")
    _require(
        bool(got[128:192].isfinite().all()) and bool(got[320:].isfinite().all()), "a neighbouring block was touched"
    )
    _require(float(got[140]) == 0, "a zero came back as something else")


def _linear8bit(context: Context, threshold: float = 6.0) -> Linear8bitLt:
    module = Linear8bitLt(128, 64, has_fp16_weights=False, threshold=threshold)
    with torch.no_grad():
        module.weight.copy_(_randn(context, "weight8", 64, 128))
        module.bias.copy_(_randn(context, "bias8", 64))
    return module.to(context.device)


def _beyond_f16(context: Context) -> None:
    """Values above 65504 are inputs like others where the dtype has them."""
    for dtype in (torch.float32, torch.bfloat16):
        x = _randn(context, "beyond", 3, 128) * 1e6
        for threshold in (0.0, 6.0):
            module = _linear8bit(context, threshold)
            y = module(x.to(dtype).to(context.device)).detach().double().cpu().numpy()
            scales = module.weight.SCB.double().cpu()[:, None]  # type: ignore[union-attr]
            w = (module.weight.data.double().cpu() * scales / 127).numpy()
            a = x.to(dtype).double().numpy()
            magnitude = np.abs(a).max(axis=1, keepdims=True) * np.abs(w).sum(axis=1)
            within(f"y, threshold {threshold}", y, a @ w.T, 0.02 * magnitude + 10)


def _outputs_into_given(context: Context) -> None:
    """``out=`` is written and returned, whatever its strides; a wrong one is refused."""
    A = context.move(_randn(context, "out", 40, 64))
    packed, state = functional.quantize_4bit(A)
    out, absmax = torch.empty_like(packed), torch.empty_like(state.absmax)
    got, _ = functional.quantize_4bit(A, absmax=absmax, out=out)
    _require(got.data_ptr() == out.data_ptr(), "out was not returned")
    same_bits("packed", out.cpu(), packed.cpu())
    same_bits("absmax", absmax.cpu(), state.absmax.cpu())
    dense = functional.dequantize_4bit(packed, state)
    strided = torch.zeros(40, 128, device=context.device)[:, ::2]
    functional.dequantize_4bit(packed, state, out=strided)
    same_bits("dequantized", strided.cpu(), dense.cpu())
    x = context.move(_randn(context, "row", 1, 64))
    y, given = functional.gemv_4bit(x, packed, state=state), torch.empty(1, 40, device=context.device)
    functional.gemv_4bit(x, packed, out=given, state=state)
    same_bits("gemv", given.cpu(), y.cpu())
    _raises(ValueError, "out:", lambda: functional.gemv_4bit(x, packed, out=given[:, :-1], state=state))
    _raises(TypeError, "out:", lambda: functional.gemv_4bit(x, packed, out=given.half(), state=state))


def _ranks(context: Context) -> None:
    """Tensors of any rank come back in their shape."""
    for shape in ((), (1,), (7,), (3, 5), (2, 3, 4), (2, 3, 4, 5), (0,), (0, 4)):
        A = context.move(torch.ones(shape))
        same_bits("4-bit", functional.dequantize_4bit(*functional.quantize_4bit(A, quant_type="nf4")).cpu(), A.cpu())
        same_bits("8-bit", functional.dequantize_blockwise(*functional.quantize_blockwise(A)).cpu(), A.cpu())


def _edited_codebook(context: Context) -> None:
    """A codebook that was edited changes what is computed with it, and nothing else."""
    A = context.move(torch.linspace(-1, 1, 512))
    before, state = functional.quantize_blockwise(A, blocksize=64)
    state.code.mul_(2)  # type: ignore[union-attr]
    doubled = functional.dequantize_blockwise(before, state)
    again, fresh = functional.quantize_blockwise(A, blocksize=64)
    same_bits("codes after an edit", again.cpu(), before.cpu())
    same_bits("dequantized", doubled.cpu(), 2 * functional.dequantize_blockwise(again, fresh).cpu())
    same_bits("the default map", fresh.code.cpu(), create_dynamic_map())  # type: ignore[union-attr]


def _f32_stays_f32(context: Context) -> None:
    """Large terms that cancel: one rounding to bf16 on the way would leave nothing right."""
    module = _linear4bit(context, nested=False)
    x = _randn(context, "cancel", 9, 128) + torch.where(torch.arange(128) % 2 == 0, 1000.0, -1000.0)
    for rows in (x[:1], x):
        w, a = _dense_weight(module), rows.double().numpy()
        bias = module.bias.detach().double().cpu().numpy()
        expected = a @ w.T + bias
        bound = matmul_bound(torch.float32, 128, np.abs(a) @ np.abs(w).T + np.abs(bias), expected)
        within("y", module(rows.to(context.device)).detach().double().cpu().numpy(), expected, bound)


def _quantized_layouts(context: Context) -> None:
    """A transposed or misaligned weight is quantized like its contiguous copy."""
    weight = _randn(context, "layouts", 48, 80)
    for build in (functional.quantize_4bit, functional.quantize_blockwise):
        codes, state = build(context.move(weight))
        for name, layout in LAYOUTS.items():
            other, other_state = build(context.move(layout(weight)))
            same_bits(f"codes, {name}", other.cpu(), codes.cpu())
            same_bits(f"absmax, {name}", other_state.absmax.cpu(), state.absmax.cpu())


def _transposed_weight(context: Context) -> None:
    """``weight.t()`` of the packed weight dequantizes to the transpose of what it stands for."""
    A = context.move(_randn(context, "transpose", 32, 64))
    packed, state = functional.quantize_4bit(A, quant_type="nf4")
    dense = functional.dequantize_4bit(packed, state)
    same_bits("transpose", functional.dequantize_4bit(packed.t(), state).cpu(), dense.t().contiguous().cpu())


def _orientation_of_matmul(context: Context, N: int, K: int) -> None:
    """matmul_4bit multiplies by W^T for W of its state's shape, whatever the packed weight's own."""
    packed, state = functional.quantize_4bit(context.move(_randn(context, "weight", N, K)), quant_type="nf4")
    dense = functional.dequantize_4bit(packed, state).double().cpu()
    x, z = _randn(context, "x", 3, K), _randn(context, "z", 3, N)
    rough = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-3)
    for B in (packed, packed.t(), packed.view(-1), packed.view(2, -1)):
        y = autograd.matmul_4bit(context.move(x), B, state)
        rough(y.double().cpu(), x.double() @ dense.t())
        if N == K:
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = autograd.matmul_4bit(context.move(z), B, state)
        rough(y.double().cpu(), z.double() @ dense)
        if [warning.category for warning in caught] != [DeprecationWarning]:
            raise Failure(f"expected one DeprecationWarning, got {[str(warning.message) for warning in caught]}")
    columns = context.move(_randn(context, "neither", 3, N + K))
    _raises(ValueError, "A:", lambda: autograd.matmul_4bit(columns, packed, state))
    _raises(ValueError, "quant_state:", lambda: autograd.matmul_4bit(columns, packed, None))  # type: ignore[arg-type]


def _blocks_of_any_size(context: Context, blocksize: int) -> None:
    """8-bit codes and scales by their definition, for block sizes that no primitive takes, and back."""
    A = _randn(context, f"blocks of {blocksize}", 3, 7, 500)
    flat = A.view(-1)
    flat[20], flat[4200], flat[9000:9300] = float("nan"), float("-inf"), 0.0
    code = create_dynamic_map()
    with np.errstate(all="ignore"):
        expected, scales = oracle.quantize_blockwise(flat.numpy(), code.numpy(), blocksize)
        values = oracle.dequantize(expected, scales, code.numpy(), blocksize)
    codes, state = functional.quantize_blockwise(context.move(A), blocksize=blocksize)
    same_bits("codes", codes.cpu(), torch.from_numpy(expected).view(A.shape))
    same_bits("absmax", state.absmax.cpu(), torch.from_numpy(scales))
    same_bits("values", functional.dequantize_blockwise(codes, state).cpu(), torch.from_numpy(values).view(A.shape))
    state = functional.QuantState.from_dict(state.as_dict(), context.device)
    same_bits("read back", functional.dequantize_blockwise(codes, state).cpu().view(-1), torch.from_numpy(values))


def _strided_parameter_steps(context: Context, optimizer: str) -> None:
    """A parameter that is not contiguous takes the same step as its contiguous copy."""
    start, gradient = _randn(context, "start", 80, 60), _randn(context, "gradient", 80, 60)
    results = []
    for layout in ("contiguous", "transposed", "strided"):
        p = nn.Parameter(context.move(LAYOUTS[layout](start)))
        step = getattr(optim, optimizer)([p], lr=0.01)
        for _ in range(2):
            p.grad = gradient.to(context.device)
            step.step()
        results.append(p.detach().cpu().contiguous())
    for result in results[1:]:
        same_bits("p", result, results[0])


def _small_second_moment(context: Context) -> None:
    """Beside a gradient 10^4 times larger, a small one's second moment is not lost: its step stays of size lr."""
    gradient = torch.full((4096,), 1e-4)
    gradient[::256] = 1.0
    p = nn.Parameter(torch.zeros(4096, device=context.device))
    p.grad = gradient.to(context.device)
    optim.Adam8bit([p], lr=0.01).step()
    largest = float(p.detach().abs().max())
    _require(largest < 0.011, f"the first step of lr 0.01 moved a parameter by {largest}")
    optimizer = optim.Adam8bit([p], lr=0.01)
    for _ in range(3):
        p.grad = gradient.to(context.device)
        optimizer.step()
    moved = float(p.detach().abs().max())
    _require(moved < 0.1, f"four steps of lr 0.01 moved a parameter by {moved}")


def _simple_cases() -> dict[str, Callable[[Context], None]]:
    return {
        "a wrong inner dimension is refused": _wrong_inner_dimension,
        "a short absmax is refused": _short_absmax,
        "a saved module is restored": _saved_module_is_restored,
        "values beyond f16 in int8": _beyond_f16,
        "out is written": _outputs_into_given,
        "tensors of any rank": _ranks,
        "an edited codebook": _edited_codebook,
        "f32 stays f32": _f32_stays_f32,
        "weights of any layout": _quantized_layouts,
        "a transposed weight": _transposed_weight,
        "a small second moment": _small_second_moment,
        **{
            f"blocks of {size}": partial(_blocks_of_any_size, blocksize=size) for size in (1, 3, 100, 4097, 8192, 16384)
        },
        **{
            f"matmul_4bit takes W from its state,{name}": partial(_orientation_of_matmul, N=N, K=K)
            for name, N, K in (("square", 64, 64), ("wide", 32, 64), ("tall", 96, 32))
        },
        **{f"special values,{name}": partial(_special_values, quant_type=name) for name in QUANT_TYPES},
        **{
            f"a strided parameter,{name}": partial(_strided_parameter_steps, optimizer=name)
            for name in ("Adam", "Adam8bit", "Lion8bit", "AdEMAMix8bit")
        },
    }


def cases() -> Iterator[Case]:
    for name, run in _simple_cases().items():
        yield Case("", name, run)
    for dtype in DTYPES:
        traits = {"dtype": dtype_name(dtype)}
        unchanged = partial(_forward_leaves_state, dtype=dtype)
        yield Case("", f"a forward leaves the state,{traits['dtype']}", unchanged, traits)
        for layer in LAYERS:
            for shape in INPUT_SHAPES:
                check = partial(_check_linear4bit, layer=layer, shape=shape, dtype=dtype, layout="contiguous")
                yield Case("", f"linear4bit,{layer},{shape},{traits['dtype']}", check, {**traits, "shape": shape})
        for layout in LAYOUTS:
            check = partial(_check_linear4bit, layer="even", shape="2-D", dtype=dtype, layout=layout)
            yield Case("", f"linear4bit,{layout},{traits['dtype']}", check, {**traits, "layout": layout})


REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {}
