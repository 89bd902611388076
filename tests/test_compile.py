"""Every primitive is a well-formed torch operator, and what is built on them compiles without a graph break."""

from __future__ import annotations

import pytest
import torch
from optimizers import build
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from bnb_core import functional as F
from bnb_core import optim, primitives
from bnb_core.autograd import int8_linear
from bnb_core.conformance.suite.errors import valid_arguments
from bnb_core.nn import Linear8bitLt, LinearNF4
from bnb_core.primitive import Primitive
from bnb_core.records import Weight4bit

PRIMITIVES = [value for value in vars(primitives).values() if isinstance(value, Primitive)]


def _flat_arguments(primitive):
    """Those of its operator."""
    arguments = valid_arguments(primitive.name)
    return tuple(arguments[name] for name in primitive.names)


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.name)
def test_operator_is_well_formed(primitive):
    """Schema, fake result and autograd registration agree with what the kernel does."""
    torch.library.opcheck(primitive.op, _flat_arguments(primitive))


@pytest.mark.parametrize("primitive", PRIMITIVES, ids=lambda primitive: primitive.name)
def test_operator_and_direct_call_give_the_same(primitive):
    direct = primitive(*primitive.structured(_flat_arguments(primitive)))
    dispatched = primitive.op(*_flat_arguments(primitive))
    torch.testing.assert_close(direct, dispatched, rtol=0, atol=0, equal_nan=True)


def test_meta_tensors_get_shapes_without_a_kernel():
    packed, absmax = primitives.quantize_4bit(torch.empty(40, 64, device="meta"), 64, "nf4", torch.uint8)
    assert packed.shape == (1280, 1) and absmax.shape == (40,) and packed.is_meta


def test_tracing_records_the_operator():
    traced = torch.jit.trace(lambda x: primitives.quantize_4bit(x, 64, "nf4", torch.uint8)[0], torch.randn(128))
    fresh = torch.randn(128)
    assert torch.equal(traced(fresh), primitives.quantize_4bit(fresh, 64, "nf4", torch.uint8)[0])


def test_out_is_filled_under_compile():
    def dequantize(packed, absmax, out):
        return primitives.dequantize_4bit(Weight4bit(packed, (128,), absmax, 64, "nf4"), torch.float32, out=out)

    packed, absmax = primitives.quantize_4bit(torch.randn(128), 64, "nf4", torch.uint8)
    out, expected = torch.zeros(128), torch.zeros(128)
    torch.compile(dequantize, fullgraph=True, backend="aot_eager")(packed, absmax, out)
    dequantize(packed, absmax, expected)
    assert torch.equal(out, expected)


FUNCTIONS = {
    "quantize_4bit": lambda x: F.dequantize_4bit(*F.quantize_4bit(x, quant_type="nf4")),
    "double quantization": lambda x: F.dequantize_4bit(*F.quantize_4bit(x, compress_statistics=True)),
    "quantize_blockwise": lambda x: F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=64)),
    "nested blockwise": lambda x: F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=64, nested=True)),
    "int8": lambda x: F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(x)[:2]),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_compile(function):
    torch._dynamo.reset()
    x = torch.randn(8, 64)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))


def _model():
    layers = LinearNF4(64, 48), nn.ReLU(), Linear8bitLt(48, 8, has_fp16_weights=False, threshold=2.0)
    return nn.Sequential(*layers).to("cpu")


def test_one_graph_serves_every_batch_size():
    torch._dynamo.reset()
    model = _model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 7, 40):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), model(x))


def test_compiled_gradient_checkpointing_gives_the_same_gradients():
    torch._dynamo.reset()
    model, x = _model(), torch.randn(3, 64, requires_grad=True)
    recomputing = torch.compile(
        lambda x: checkpoint(model, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    (got,) = torch.autograd.grad(recomputing(x).square().sum(), x)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_compiled_modes_give_the_same(context):
    torch._dynamo.reset()
    model, x = _model(), torch.randn(3, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with context():
        assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW32bit", "LAMB8bit", "AdEMAMix8bit", "Lion8bit", "SGD32bit"])
def test_a_compiled_training_step_trains_as_the_eager_one_does_and_is_compiled_once(name):
    """The optimizer's own step is left out of the graph."""
    torch._dynamo.reset()
    x = torch.randn(8, 64)
    counter = CompileCounterWithBackend("aot_eager")

    def losses(backend):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        optimizer = build(name, model.parameters(), min_8bit_size=64)

        def step():
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step = step if backend is None else torch.compile(step, backend=backend)
        return [step().item() for _ in range(5)]

    assert losses(counter) == losses(None)
    assert counter.frame_count <= 2, "compiled anew at later steps"


def test_a_step_is_no_part_of_a_cuda_graph(monkeypatch):
    """It would repeat the step count of its capture."""
    weight = nn.Parameter(torch.ones(64))
    weight.grad = torch.ones(64)
    optimizer = optim.AdamW8bit([weight])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"AdamW8bit.step: a CUDA graph would repeat it"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(64)) and not optimizer.state


def _trained(name, backend, change=lambda optimizer, step: None, **settings):
    """The parameters and counts after steps of which only the optimizer's is compiled, and the compilations by step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    settings = {"lr": torch.tensor(0.01), **settings}
    optimizer = build(name, model.parameters(), min_8bit_size=64, capturable=True, **settings)
    counter = CompileCounterWithBackend(backend or "eager")
    step = (
        optimizer.step if backend is None else torch.compile(lambda: optimizer.step(), backend=counter, fullgraph=True)
    )
    x, compilations = torch.randn(8, 64), []
    for number in range(6):
        change(optimizer, number)
        model(x).square().mean().backward()
        step()
        optimizer.zero_grad()
        compilations.append(counter.frame_count)
    counts = [state["step"] for state in optimizer.state_dict()["state"].values()]
    return [p.detach() for p in model.parameters()], counts, compilations


def _halve(optimizer, step):
    optimizer.param_groups[0]["lr"].mul_(0.5)


CAPTURABLE = [
    *(("AdamW8bit", backend) for backend in ("eager", "aot_eager", "inductor")),
    *(
        (name, "aot_eager")
        for name in ("PagedAdam32bit", "LAMB8bit", "AdEMAMix8bit", "Lion8bit", "SGD8bit", "LARS32bit")
    ),
]


@pytest.mark.parametrize(("name", "backend"), CAPTURABLE)
def test_a_capturable_step_is_compiled_whole_and_once(name, backend):
    """With a learning rate that changes in place."""
    expected, counts, _ = _trained(name, None, _halve)
    got, compiled_counts, compilations = _trained(name, backend, _halve)
    assert all(map(torch.equal, got, expected)) and compiled_counts == counts == [6] * 4
    assert compilations[0] > 0 and compilations[-1] == compilations[0], "compiled anew at later steps"


def test_sgd_without_momentum_is_compiled_whole():
    expected, counts, _ = _trained("SGD8bit", None, momentum=0)
    got, compiled_counts, _ = _trained("SGD8bit", "aot_eager", momentum=0)
    assert all(map(torch.equal, got, expected)) and compiled_counts == counts == [6] * 4


def _change_group(optimizer, step):
    optimizer.param_groups[0].update(lr=0.01 / (step + 1), weight_decay=0.1 * (step // 3))


def _replace_tensor(optimizer, step):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01 / (step + 1))


def _override(optimizer, step):
    first = optimizer.param_groups[0]["params"][0]
    optim.GlobalOptimManager.get_instance().override_config(first, "lr", 0.1 if step % 2 else torch.tensor(0.2))


@pytest.mark.parametrize("change", [_change_group, _replace_tensor, _override])
def test_a_compiled_step_follows_changed_settings(change):
    try:
        (expected, *_), (got, *_) = (_trained("AdamW8bit", backend, change) for backend in (None, "eager"))
    finally:
        optim.GlobalOptimManager.get_instance().initialize()
    assert all(map(torch.equal, got, expected))


def test_a_compiled_step_refuses_what_an_eager_one_does():
    weight = nn.Parameter(torch.ones(64))
    weight.grad = torch.ones(64)
    optimizer = optim.AdamW8bit([weight], capturable=True)
    optimizer.param_groups[0]["eps"] = -1.0
    with pytest.raises(Exception, match="eps: expected a number"):
        torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    assert torch.equal(weight, torch.ones(64))


def test_a_training_step_with_a_capturable_optimizer_is_compiled_once():
    """In two parts, before and after backward(), each of which torch may begin anew once."""
    torch._dynamo.reset()

    def losses(backend):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), torch.randn(8, 64)
        optimizer = build("AdamW8bit", model.parameters(), min_8bit_size=64, capturable=True, lr=torch.tensor(0.01))

        def step():
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step = step if backend is None else torch.compile(step, backend=backend)
        return [step().item() for _ in range(6)]

    counter = CompileCounterWithBackend("aot_eager")
    expected = losses(None)
    assert losses(counter) == expected
    assert counter.frame_count <= 4, "compiled anew at later steps"


def test_outliers_that_change_from_call_to_call_are_of_one_graph():
    """How many columns have some is known to the device alone: neither the graph nor its shapes depend on it."""
    torch._dynamo.reset()
    layer = Linear8bitLt(48, 8, has_fp16_weights=False, threshold=6.0).to("cpu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for columns in ([], [3], [0, 7, 11, 47]):
        x, dy = torch.randn(5, 48).clamp(-5, 5), torch.randn(5, 8)
        x[1, columns] = 20.0
        eager_x, compiled_x = (x.clone().requires_grad_() for _ in range(2))
        expected, got = layer(eager_x), compiled(compiled_x)
        assert torch.equal(got, expected), columns
        expected.backward(dy)
        got.backward(dy)
        assert torch.equal(compiled_x.grad, eager_x.grad), columns
    assert counter.frame_count == 1


@torch.no_grad()
def test_the_host_reads_nothing_of_a_layer_with_outliers():
    """Fake tensors have no values, and raise where somebody asks for one: what a CUDA graph cannot hold."""
    CB, SCB, _ = primitives.int8_vectorwise_quant(torch.randn(8, 48), 0.0)
    x = torch.randn(5, 48)
    x[1, 3] = 20.0

    def layer(x, CB, SCB):
        return int8_linear(x, CB, SCB, None, 6.0)

    graph = make_fx(layer, tracing_mode="fake")(x, CB, SCB)
    called = [str(node.target) for node in graph.graph.nodes if "." in str(node.target)]
    assert called == ["bnb_core.int8_vectorwise_quant.default", "bnb_core.int8_mixed_scaled_mm.default"]
    assert torch.equal(graph(x, CB, SCB), layer(x, CB, SCB))
