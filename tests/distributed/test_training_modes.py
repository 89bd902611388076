"""Every kind of quantized layer as models train: replicated, in stages, recomputed, moved meanwhile, compiled."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from quantized import Adapted
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.utils.checkpoint import checkpoint
from training import optimizer_for, train

from bnb_core import optim
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Embedding8bit, EmbeddingNF4, Linear8bitLt, LinearFP4, LinearNF4

WIDTH = 64
BASES: dict[str, Callable[[], nn.Module]] = {
    "nf4": lambda: LinearNF4(WIDTH, WIDTH),
    "fp4, plain scales": lambda: LinearFP4(WIDTH, WIDTH, compress_statistics=False),
    "nf4, f32 storage": lambda: LinearNF4(WIDTH, WIDTH, quant_storage=torch.float32),
    "8-bit": lambda: Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False),
    "8-bit with outliers": lambda: Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False, threshold=1.5),
    "8-bit that trains": lambda: Linear8bitLt(WIDTH, WIDTH),
}
bases = pytest.mark.parametrize("base", BASES)


def model_of(base: str, layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    adapted: list[nn.Module] = []
    for _ in range(layers):
        layer = BASES[base]()
        adapted.append(Adapted(layer, WIDTH) if base != "8-bit that trains" else nn.Sequential(layer))
        adapted.append(nn.GELU())
    return nn.Sequential(*adapted[:-1]).to("cpu")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def optimizer_of(model: nn.Module) -> Any:
    return optimizer_for("AdamW8bit", trained(model), lr=1e-2, min_8bit_size=256)


def batch() -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_(True)


def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    forward(batch()).square().mean().backward()
    result = [p.grad.clone() for p in trained(model)]
    model.zero_grad()
    return result


def same_gradients(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        assert bool(a.any())
        same_bits(str(number), b, a)


def _ddp_losses(base: str) -> list[float]:
    model = nn.parallel.DistributedDataParallel(model_of(base))
    return train(model, optimizer_of(model))


def _zero_losses(base: str) -> list[float]:
    model = nn.parallel.DistributedDataParallel(model_of(base))
    settings = {"lr": 1e-2, "weight_decay": 0.01, "min_8bit_size": 256}
    return train(model, ZeroRedundancyOptimizer(trained(model), optim.AdamW8bit, **settings))


@bases
@pytest.mark.parametrize("losses_of", [_ddp_losses, _zero_losses], ids=["ddp", "ddp with zero"])
def test_replicas_train_as_one_process(base: str, losses_of: Callable[[str], list[float]], ranks: Ranks):
    model = model_of(base)
    losses = train(model, optimizer_of(model))
    for of_rank in ranks.run(2, losses_of, base):
        assert of_rank == pytest.approx(losses, abs=2e-3, rel=0)


def _pipelined(base: str) -> tuple[list[Tensor], Tensor]:
    rank, stages = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = model_of(base, layers=4)
    layers = list(model)
    own = nn.Sequential(*layers[rank * len(layers) // stages : (rank + 1) * len(layers) // stages])
    stage = PipelineStage(own, rank, stages, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, target: (y - target).square().mean())
    arguments = {"target": torch.zeros(8, WIDTH), "losses": []} if rank == stages - 1 else {}
    schedule.step(*([batch()] if rank == 0 else []), **arguments)
    return [p.grad for p in trained(own)], torch.stack(arguments["losses"]).mean() if arguments else torch.zeros(())


@bases
def test_pipeline_stages_have_the_gradients_of_one_process(base: str, ranks: Ranks):
    model = model_of(base, layers=4)
    expected = []
    for part in batch().chunk(2):
        (model(part).square().mean() / 2).backward()
    expected = [p.grad for p in trained(model)]
    parts = ranks.run(2, _pipelined, base)
    found = [gradient for of_stage, _ in parts for gradient in of_stage]
    for gradient, value in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-6)


@bases
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_recomputing_gives_the_same_gradients(base: str, reentrant: bool):
    model = model_of(base)
    expected = gradients(model, model)

    def forward(x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return x

    same_gradients(expected, gradients(model, forward))


@bases
def test_accumulated_gradients_are_those_of_the_whole_batch(base: str):
    model = model_of(base)
    expected = gradients(model, model)
    for part in batch().chunk(4):
        (model(part).square().mean() / 4).backward()
    for p, value in zip(trained(model), expected, strict=True):
        # Parts of a batch have outlier columns of their own.
        atol = 0.05 * float(value.abs().max()) if "outliers" in base else 1e-6
        torch.testing.assert_close(p.grad, value, rtol=1e-4, atol=atol)


@bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling_train(base: str, dtype: torch.dtype):
    model, reference = model_of(base), model_of(base)
    optimizer, other = optimizer_of(model), optimizer_of(reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    for _ in range(4):
        with torch.autocast("cpu", dtype=dtype):
            y = model(batch())
            loss = (y - batch().detach().roll(1, -1)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        plain = (reference(batch()) - batch().detach().roll(1, -1)).square().mean()
        plain.backward()
        other.step()
        other.zero_grad()
        assert loss.item() == pytest.approx(plain.item(), rel=2e-2)
    scaler.scale(torch.tensor(float("inf")) * trained(model)[0].sum()).backward()
    before = trained(model)[0].detach().clone()
    scaler.step(optimizer)
    assert not scaler.is_enabled() or torch.equal(before, trained(model)[0])


@bases
def test_layers_compile_whole_and_once_for_all_of_a_kind(base: str):
    torch._dynamo.reset()
    model = model_of(base, layers=4)
    expected = gradients(model, model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = [
            torch.compile(layer, fullgraph=True, backend="aot_eager") for layer in model if type(layer) is not nn.GELU
        ]

        def forward(x: Tensor) -> Tensor:
            for number, layer in enumerate(compiled):
                x = layer(x if number == 0 else torch.nn.functional.gelu(x))
            return x

        forward(batch())
        for _ in range(2):
            for gradient, value in zip(gradients(model, forward), expected, strict=True):
                torch.testing.assert_close(gradient, value, rtol=1e-4, atol=1e-6)


def streamed(model: nn.Sequential, away: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A forward whose weights are in their places only while their layer computes, then something else is."""
    kept = {
        layer: layer.weight.data for layer in model.modules() if hasattr(layer, "quant_state") or hasattr(layer, "SCB")
    }

    def fetch(layer: nn.Module, _: Any) -> None:
        layer.weight.data = kept[layer]

    def release(layer: nn.Module, *_: Any) -> None:
        layer.weight.data = away(kept[layer])

    for layer in kept:
        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(release)

    def forward(x: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    return forward


@pytest.mark.parametrize("base", [base for base in BASES if "trains" not in base])
@pytest.mark.parametrize("away", [torch.zeros_like, lambda codes: codes.flip(0)], ids=["zeros", "other weights"])
def test_weights_that_are_streamed_while_autograd_waits_give_their_own_gradients(base: str, away: Any):
    model = model_of(base)
    expected = gradients(model, model)
    same_gradients(expected, gradients(model, streamed(model, away)))


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_an_8_bit_layer_recomputes_and_goes_to_meta_and_back(threshold: float):
    torch.manual_seed(0)
    layer = Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False, threshold=threshold).to("cpu")
    state_dict = layer.state_dict()
    x = batch()
    layer(x).square().sum().backward()
    expected, x.grad = x.grad, None
    layer = layer.to("meta")
    meta = layer(batch().to("meta"))
    assert meta.is_meta and meta.shape == (8, WIDTH)
    layer.load_state_dict(state_dict, assign=True)
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    same_bits("gradient", x.grad, expected)


@bases
def test_no_step_keeps_memory(base: str):
    model = model_of(base)
    optimizer = optimizer_of(model)

    def step() -> int:
        model(batch()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    for _ in range(3):
        step()
    counts = [step() for _ in range(2)]
    assert len(set(counts)) == 1


@pytest.mark.parametrize("kind", [EmbeddingNF4, Embedding8bit])
def test_embeddings_are_recomputed_compiled_and_cast(kind: Callable[..., nn.Module]):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(kind(48, WIDTH), nn.Linear(WIDTH, 8)).to("cpu")
    tokens = torch.arange(48)
    expected = model(tokens)
    torch.testing.assert_close(checkpoint(model, tokens, use_reentrant=False), expected, rtol=0, atol=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(tokens).float(), expected, rtol=0.05, atol=0.05)


def _checkpointed_under_fsdp2(base: str) -> list[float]:
    model = model_of(base)
    for layer in model:
        layer_forward = layer.forward
        layer.forward = lambda x, run=layer_forward: checkpoint(run, x, use_reentrant=False)
        fully_shard(layer)
    fully_shard(model)
    return train(model, optimizer_of(model))


@pytest.mark.parametrize("base", ["nf4", "8-bit"])
def test_recomputing_under_fsdp2_trains_as_one_process(base: str, ranks: Ranks):
    model = model_of(base)
    losses = train(model, optimizer_of(model))
    for of_rank in ranks.run(2, _checkpointed_under_fsdp2, base):
        assert of_rank == pytest.approx(losses, abs=2e-3, rel=0)
