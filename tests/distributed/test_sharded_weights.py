"""Quantized weights under FSDP2 and FSDP1: they shard, keep their bytes and scales, load and save, adapters train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from quantized import LAYERS, STORAGES, adapted_model, one_layer
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from training import optimizer_for, train

from bnb_core.conformance.compare import same_bits
from bnb_core.nn import LinearNF4, Params4bit, load_from_rank_0

layers = pytest.mark.parametrize("layer", LAYERS)
FULL = StateDictOptions(full_state_dict=True)


def _same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for key, value in one.items():
        same_bits(key, other[key], value)


def _sharded(layer: str) -> list[int]:
    plain, x = one_layer(layer)
    expected, state_dict = plain(x), plain.state_dict()
    sharded = fully_shard(copy.deepcopy(plain))
    weight = sharded[0].weight
    assert isinstance(weight, DTensor)
    assert weight.dtype == plain[0].weight.dtype
    for _ in range(2):
        torch.testing.assert_close(sharded(x), expected, rtol=0, atol=0)
    assert list(sharded.state_dict()) == list(state_dict)
    _same_state(state_dict, get_model_state_dict(sharded, options=FULL))
    sharded.to("cpu")
    torch.testing.assert_close(sharded(x), expected, rtol=0, atol=0)
    return [weight.to_local().nbytes, plain[0].weight.nbytes]


@layers
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_quantized_layer_shards_under_fsdp2_and_computes_the_same(layer: str, world_size: int, ranks: Ranks):
    for of_shard, of_whole in ranks.run(world_size, _sharded, layer):
        assert of_shard * world_size == of_whole


def _round_trips(layer: str, folder: str) -> None:
    plain, x = one_layer(layer)
    expected, state_dict = plain(x), plain.state_dict()
    sharded = fully_shard(copy.deepcopy(plain))
    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder)
    full = get_model_state_dict(sharded, options=FULL)
    for way in ("sharded", "checkpoint", "full", "plain", "assigned"):
        other = fully_shard(one_layer(layer, seed=5)[0])
        if way == "sharded":
            set_model_state_dict(other, get_model_state_dict(sharded))
        elif way == "checkpoint":
            loaded = get_model_state_dict(other)
            dcp.load(loaded, checkpoint_id=folder)
            set_model_state_dict(other, loaded)
        elif way == "full":
            set_model_state_dict(other, copy.deepcopy(full), options=FULL)
        elif way == "plain":
            other = one_layer(layer, seed=5)[0]
            other.load_state_dict(full)
        else:
            other.load_state_dict(sharded.state_dict(), assign=True)
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0, msg=way)
        _same_state(state_dict, get_model_state_dict(other, options=FULL))


@layers
def test_sharded_and_full_state_dicts_go_both_ways(layer: str, ranks: Ranks, tmp_path: Path):
    ranks.run(2, _round_trips, layer, str(tmp_path / "checkpoint"))


def _from_rank_0(layer: str, world_size: int) -> None:
    plain, x = one_layer(layer)
    state_dict = plain.state_dict() if torch.distributed.get_rank() == 0 else None
    with torch.device("meta"):
        other = nn.Sequential(LAYERS[layer]())
    load_from_rank_0(other, state_dict, fully_shard)
    assert other[0].weight.to_local().nbytes * world_size == plain[0].weight.nbytes
    torch.testing.assert_close(other(x), plain(x), rtol=0, atol=0)
    _same_state(plain.state_dict(), get_model_state_dict(other, options=FULL))


@layers
def test_rank_0_reads_and_the_others_start_on_meta(layer: str, ranks: Ranks):
    ranks.run(4, _from_rank_0, layer, 4)


def _broadcast_without_scales() -> str:
    plain, _ = one_layer("fp4")
    other = fully_shard(one_layer("fp4", seed=5)[0])
    full = plain.state_dict() if torch.distributed.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    try:
        set_model_state_dict(other, full, options=options)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def test_codes_that_are_sent_without_scales_are_refused(ranks: Ranks):
    _, message = ranks.run(2, _broadcast_without_scales)
    assert "0.weight: has codes without their scales" in message
    assert "load_from_rank_0(model, state_dict)" in message


def _into_shards(layer: str) -> list[str]:
    plain, x = one_layer(layer)
    full = plain.state_dict() if torch.distributed.get_rank() == 0 else None
    other = fully_shard(one_layer(layer, seed=5)[0])
    before, messages = other(x), []
    scales = [key for key in plain.state_dict() if key not in dict(plain.named_parameters())]
    for name, change in {
        "missing": lambda full: {key: value for key, value in full.items() if key != "0.weight"},
        "unexpected": lambda full: {**full, "1.weight": torch.ones(2)},
        "shape": lambda full: {**full, "0.weight": full["0.weight"][:-1]},
        "scales": lambda full: {key: value for key, value in full.items() if key not in scales},
    }.items():
        with pytest.raises(ValueError) as raised:
            load_from_rank_0(other, None if full is None else change(full))
        messages.append(f"{name}: {raised.value}")
        torch.testing.assert_close(other(x), before, rtol=0, atol=0)
    load_from_rank_0(other, full)
    torch.testing.assert_close(other(x), plain(x), rtol=0, atol=0)
    _same_state(plain.state_dict(), get_model_state_dict(other, options=FULL))
    return messages


@layers
def test_rank_0_reads_into_a_model_that_is_sharded(layer: str, ranks: Ranks):
    for missing, unexpected, shape, scales in ranks.run(2, _into_shards, layer):
        assert "missing keys: 0.weight" in missing
        assert "unexpected keys: 1.weight" in unexpected
        assert "0.weight: expected torch." in shape
        assert "0.weight: has codes without their scales" in scales


def _policies(layer: str) -> list[str]:
    plain, x = one_layer(layer)
    expected = plain(x.to(torch.bfloat16) if x.is_floating_point() else x)
    results = []
    for policy in (
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"reshard_after_forward": False},
    ):
        sharded = fully_shard(copy.deepcopy(plain), **policy)
        try:
            result = sharded(x)
        except ValueError as error:
            results.append(str(error))
            continue
        same = torch.equal(result.float(), (expected if "mp_policy" in policy else plain(x)).float())
        results.append("same" if same else "another result")
    return results


@layers
def test_codes_survive_the_policies_or_say_what_helps(layer: str, ranks: Ranks):
    cast = layer in (f"nf4, {torch.float16}", f"nf4, {torch.float32}")
    for mixed_precision, offloaded, kept in ranks.run(2, _policies, layer):
        assert (offloaded, kept) == ("same", "same")
        if cast:
            assert "quant_storage=torch.uint8" in mixed_precision
        else:
            assert mixed_precision == "same"


class RewrittenNaNs(TorchDispatchMode):
    """Every operation on floats gives quiet NaNs of one pattern, as some copies on GPUs do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result

        def rewrite(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point() and not tensor.is_meta:
                nans = torch.ops.aten.isnan(tensor)
                tensor.masked_fill_(nans, float("nan"))
            return tensor

        return tree_map_only(Tensor, rewrite, result)


def _layer_with_nans(storage: torch.dtype) -> LinearNF4:
    """Its bytes are 0xff: NaNs of a pattern that no operation gives, in all floats."""
    layer = LinearNF4(64, 48, quant_storage=storage).to("cpu")
    layer.weight.data.view(torch.uint8).fill_(0xFF)
    layer.weight._tell_module()
    return layer


@pytest.mark.parametrize("storage", STORAGES)
def test_bytes_survive_copies_that_rewrite_nans(storage: torch.dtype):
    layer = _layer_with_nans(storage)
    state_dict = layer.state_dict()
    with RewrittenNaNs():
        copies = [copy.deepcopy(layer), LinearNF4(64, 48, quant_storage=storage).to("cpu")]
        copies[1].load_state_dict(state_dict)
        copies += [copy.deepcopy(layer).to(torch.float16), layer.to("meta").to_empty(device="cpu")]
        copies[3].load_state_dict(state_dict)
    for copied in copies:
        assert copied.weight.dtype == storage
        assert bool((copied.weight.data.view(torch.uint8) == 0xFF).all())


def _rewriting_gather(storage: torch.dtype) -> str:
    model = nn.Sequential(_layer_with_nans(storage))
    fully_shard(model)

    def rewrite(module: nn.Module, *_: Any) -> None:
        weight = module.weight
        if weight.is_floating_point():
            weight.data.masked_fill_(weight.data.isnan(), float("nan"))

    model[0].register_forward_pre_hook(rewrite)
    try:
        model(torch.randn(2, 64))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("storage", STORAGES)
def test_a_gather_that_rewrites_nans_is_found(storage: torch.dtype, ranks: Ranks):
    for message in ranks.run(2, _rewriting_gather, storage):
        if storage == torch.uint8:
            assert message == "no error"
        else:
            assert "a copy that rewrites NaNs" in message
            assert "quant_storage=torch.uint8" in message


def _qlora_losses(kind: str, wrapper: str, settings: dict[str, Any]) -> list[float]:
    model: nn.Module = adapted_model(kind, **settings)
    if wrapper == "fsdp2":
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    elif wrapper == "fsdp2 with offload":
        fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif wrapper == "fsdp1":
        model = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_for(
        "AdamW8bit", [p for p in model.parameters() if p.requires_grad], lr=1e-2, min_8bit_size=256
    )
    return train(model, optimizer, steps=6)


CASES = [("4bit", wrapper, {}) for wrapper in ("fsdp2", "fsdp2 with offload", "ddp")]
CASES += [("8bit", wrapper, {}) for wrapper in ("fsdp2", "fsdp2 with offload", "ddp")]
CASES += [("4bit", "fsdp2", {"quant_storage": torch.bfloat16})]
CASES += [
    ("4bit", wrapper, {"quant_storage": torch.float32}) for wrapper in ("fsdp2", "fsdp1")
]  # FSDP1 takes one dtype


@pytest.mark.parametrize(("kind", "wrapper", "settings"), CASES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_adapters_train_as_in_one_process(kind: str, wrapper: str, settings: Any, world_size: int, ranks: Ranks):
    losses = _qlora_losses(kind, "", settings)
    assert losses[-1] < losses[0]
    settings = {**settings, "compute_dtype": torch.float32} if kind == "4bit" else settings
    for of_rank in ranks.run(world_size, _qlora_losses, kind, wrapper, settings):
        assert of_rank == pytest.approx(losses, abs=2e-3, rel=0)


def _state_after_sharding() -> None:
    model, _ = one_layer("fp4")
    state = model[0].weight.quant_state
    fully_shard(model)
    model.state_dict()
    assert model[0].quant_state is state
    assert model[0].weight.quant_state is state
    model.unshard()
    from bnb_core.nn.linear4bit import fix_4bit_weight_quant_state_from_module

    fix_4bit_weight_quant_state_from_module(model[0])
    assert isinstance(model[0].weight, Params4bit)
    assert model[0].weight.quant_state is state


def test_the_quant_state_is_found_after_sharding(ranks: Ranks):
    ranks.run(2, _state_after_sharding)
