"""Transformers: from_pretrained, save, reload, generate, dequantize; equal to the real bitsandbytes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from ecosystem import exact, models, tasks
from ecosystem.models import CONFIGS, QUANTIZATIONS, greedy, inputs, logits
from ecosystem.tasks import same_bytes
from ecosystem.upstream import cannot
from packaging.version import Version
from safetensors.torch import load_file

from bnb_core.serialization import unpack_tensor_to_dict

IS_5 = Version(transformers.__version__) >= Version("5")

BOTH = [pytest.mark.parametrize("name", CONFIGS), pytest.mark.parametrize("quantization", QUANTIZATIONS)]


def each_model_and_quantization(test):
    for mark in BOTH:
        test = mark(test)
    return test


def quantized_layers(model):
    return list(exact.quantized_layers(model).values())


@pytest.fixture(scope="module")
def quantized(full_precision):
    """Each model, quantized; made once, not to be changed."""
    made = {}

    def get(name, quantization):
        if (name, quantization) not in made:
            made[name, quantization] = models.load(name, full_precision[name], quantization)
        return made[name, quantization]

    return get


@each_model_and_quantization
def test_every_linear_layer_but_the_head_is_quantized(quantized, name, quantization):
    layers = quantized_layers(quantized(name, quantization))
    kind = Linear8bitLt if quantization == "int8" else Linear4bit
    assert layers and all(isinstance(layer, kind) for layer in layers)
    assert all(not layer.weight.is_floating_point() or layer.weight.bnb_quantized for layer in layers)


@each_model_and_quantization
def test_parameters_and_bytes_are_counted(quantized, full_precision, name, quantization):
    model = quantized(name, quantization)
    assert model.num_parameters() == models.load(name, full_precision[name]).num_parameters()
    layers = quantized_layers(model)
    packed = {layer.weight for layer in layers}
    rest = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if tensor not in packed)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert model.get_memory_footprint() == rest + (weights if quantization == "int8" else weights // 2)


@each_model_and_quantization
def test_a_saved_model_is_the_same_when_reloaded(quantized, tmp_path, name, quantization):
    model = quantized(name, quantization)
    model.save_pretrained(tmp_path)
    reloaded = models.load(name, tmp_path)
    assert len(quantized_layers(reloaded)) == len(quantized_layers(model))
    assert torch.equal(logits(name, reloaded), logits(name, model))
    assert greedy(reloaded) == greedy(model)


@each_model_and_quantization
def test_the_dequantized_model_computes_the_same(full_precision, name, quantization):
    """To the rounding of the activations where they are int8, and of everything where bf16 computes."""
    model = models.load(name, full_precision[name], quantization)
    with models.calls_recorded(models.routers(model)) as calls:
        expected = logits(name, model)
    dense = model.dequantize()
    assert not quantized_layers(dense)
    tolerance = 1e-4 if quantization == "nf4" else 0.05
    exact.follow_routes(dense, calls)
    assert distance(logits(name, dense), expected) <= tolerance


@each_model_and_quantization
def test_each_layer_of_a_running_model_keeps_its_bound(quantized, name, quantization):
    model = quantized(name, quantization)
    checked = set()

    def check(layer_name, layer, arguments, output):
        exact.check_output(layer_name, layer, *arguments, output)
        checked.add(layer_name)

    layers = exact.quantized_layers(model)
    compute_dtype = QUANTIZATIONS[quantization].get("bnb_4bit_compute_dtype")
    assert all(getattr(layer, "compute_dtype", None) == compute_dtype for layer in layers.values())
    hooks = [layer.register_forward_hook(partial(check, layer_name)) for layer_name, layer in layers.items()]
    logits(name, model)
    for hook in hooks:
        hook.remove()
    # The experts of a Mixtral see no token but those that are routed to them.
    assert checked >= {layer_name for layer_name in layers if ".experts." not in layer_name}


@each_model_and_quantization
def test_it_computes_what_the_real_one_does_from_the_same_folder(peer, full_precision, tmp_path, name, quantization):
    _compare_with(peer, name, full_precision[name], tmp_path, quantization, quantization)


@each_model_and_quantization
@pytest.mark.parametrize("saved_by", ["bnb_core", "bitsandbytes"])
def test_saved_models_are_read_by_both(peer, full_precision, tmp_path, name, quantization, saved_by):
    saver = tasks if saved_by == "bnb_core" else peer
    saver.quantize(name, str(full_precision[name]), quantization, str(tmp_path / "model"))
    _compare_with(peer, name, tmp_path / "model", tmp_path, quantization)


# How far logits may be from exactly computed ones, in parts of the largest. Computing in bf16 rounds the weights once;
# logits in bf16 may fall on the other side of a midpoint, by one unit in the last place.
F32_ROUNDING = 1e-5
ROUNDING = {"nf4": F32_ROUNDING, "int8": F32_ROUNDING, "nf4 double bf16": 2**-8, "fp4 bf16 storage": 2**-7}

# The same for the real one: on some CPUs it computes f32 in bf16; it squeezes int8 inputs through f16.
PEER_ROUNDING = 0.02


def _compare_with(peer, name, folder, results, stored_as, quantization=None):
    """At every step logits are the exact ones, to each one's rounding; so are tokens, where that leaves no doubt.

    Rounding may decide what comes after it: the next token, a token's experts, a whole number in int8. So the exact
    model takes the tokens and the experts from the run, and from ours what int8 layers quantize, which is its own to
    rounding. The real one's rounding is so large that whole numbers add little to it.
    """
    for who, library, rounding in (("ours", tasks, ROUNDING[stored_as]), ("theirs", peer, PEER_ROUNDING)):
        tokens = library.run(name, str(folder), str(results / f"{who}.pt"), quantization)
        run = torch.load(results / f"{who}.pt")
        model = models.load(name, folder, quantization)
        exact.compute_exactly(model)
        exact.follow_routes(model, run["calls"])
        if who == "ours":
            exact.follow_int8_inputs(model, run["calls"], rounding)
        assert distance(run["logits"], logits(name, model)) <= rounding, who
        _, steps = models.generate(model, along=tokens)
        assert distance(run["steps"], steps) <= rounding, who
        no_doubt = models.lead(steps) > 2 * rounding
        assert torch.equal(torch.tensor(tokens[-len(steps) :])[no_doubt], steps.argmax(-1)[no_doubt]), who


def distance(actual, expected):
    """The largest difference, in parts of the largest entry."""
    return (actual.double() - expected.double()).abs().max() / expected.double().abs().max()


@pytest.fixture
def save_by_both(peer, full_precision, tmp_path):
    """Quantize a llama with each library; gives the two folders."""

    def save(quantization):
        folders = [tmp_path / "ours", tmp_path / "theirs"]
        for saver, folder in zip((tasks, peer), folders, strict=True):
            saver.quantize("llama", str(full_precision["llama"]), quantization, str(folder))
        return folders

    return save


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_both_save_the_same_entries(save_by_both, quantization):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in save_by_both(quantization))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype, key
        if ".quant_state." in key:
            state, their_state = unpack_tensor_to_dict(value), unpack_tensor_to_dict(theirs[key])
            offset, their_offset = state.pop("nested_offset", 0), their_state.pop("nested_offset", 0)
            assert state == their_state and offset == pytest.approx(their_offset, rel=1e-6), key
            continue
        assert value.shape == theirs[key].shape, key
        alike = next((rule for end, rule in DIFFERENCES.get(quantization, {}).items() if key.endswith(end)), same_bytes)
        assert alike(value, theirs[key]), key


def by_one_code_at_most(ours, theirs):
    return (ours.int() - theirs.int()).abs().max() <= 1


# By the end of its name, how an entry may differ. Everything else is the same to the byte.
DIFFERENCES = {
    "nf4 double bf16": {
        # Scales are quantized less their mean, which the real one adds up in f32; and by a table on a CPU.
        ".weight.absmax": by_one_code_at_most,
        ".weight.nested_absmax": partial(torch.allclose, rtol=1e-6, atol=0.0),
    },
    # Two codes for zero, and ties: below.
    "fp4 bf16 storage": {"_proj.weight": lambda ours, theirs: True},
    # The real one rounds weights to f16 first.
    "int8": {"_proj.weight": by_one_code_at_most, ".SCB": partial(torch.allclose, rtol=2**-11, atol=0.0)},
}


def test_fp4_codes_of_both_are_as_near_to_the_weights(save_by_both, full_precision):
    """They stand for the same values, but for weights in bf16 that lie in the middle of two."""
    models_of_both = [models.load("llama", folder) for folder in save_by_both("fp4 bf16 storage")]
    weights = load_file(full_precision["llama"] / "model.safetensors")
    for name in exact.quantized_layers(models_of_both[0]):
        weight = weights[f"{name}.weight"].bfloat16().float()
        ours, theirs = (exact.dense_weight(model.get_submodule(name)) for model in models_of_both)
        in_the_middle = ((ours + theirs) / 2 - weight).abs() <= 1e-6 * weight.abs()
        assert bool(((ours == theirs) | in_the_middle).all()), name


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, None])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_device_maps(quantized, full_precision, quantization, device_map):
    model = models.load("llama", full_precision["llama"], quantization, device_map=device_map)
    assert {str(parameter.device) for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(logits("llama", model), logits("llama", quantized("llama", quantization)))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_device_map_with_the_disk_leaves_everything_in_full_precision(full_precision, tmp_path, quantization):
    """Transformers quantizes nothing that a map puts on the CPU or the disk, and refuses if that is not asked for."""
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    options = {"device_map": {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}, "offload_folder": tmp_path}
    with pytest.raises(ValueError, match="Some modules are dispatched on the CPU or the disk"):
        models.load("llama", full_precision["llama"], quantization, **options)
    config = models.BitsAndBytesConfig(**QUANTIZATIONS[quantization], llm_int8_enable_fp32_cpu_offload=True)
    model = models.load("llama", full_precision["llama"], quantization, quantization_config=config, **options)
    assert not quantized_layers(model)
    assert all(parameter.is_meta for parameter in model.model.layers[1].parameters())
    # Accelerate maps the file of a layer that is on the disk, wherever its weights lie there.
    full = logits("llama", models.load("llama", full_precision["llama"]))
    assert distance(logits("llama", model), full) <= F32_ROUNDING


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_layers_can_be_left_out(full_precision, quantization):
    options = {**QUANTIZATIONS[quantization], "llm_int8_skip_modules": ["lm_head", "down_proj"]}
    config = models.BitsAndBytesConfig(**options)
    model = models.model_class("llama").from_pretrained(full_precision["llama"], quantization_config=config)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in quantized_layers(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize("quantization", ["nf4 double bf16", "int8"])
def test_a_model_in_bf16(full_precision, quantization):
    model = models.load("llama", full_precision["llama"], quantization, dtype=torch.bfloat16)
    assert model(**inputs("llama")).logits.dtype == torch.bfloat16
    assert len(greedy(model)) == models.PROMPT.numel() + 12


@pytest.mark.parametrize("saved_before", [False, pytest.param(True, marks=cannot("dequantize", condition=IS_5))])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_model_is_dequantized_to_the_dtype_of_its_configuration(full_precision, tmp_path, quantization, saved_before):
    model = models.load("llama", full_precision["llama"], quantization)
    if saved_before:
        model.save_pretrained(tmp_path)
    model.dequantize()
    assert not quantized_layers(model) and model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32


EXPERTS = ("gate_up_proj", "down_proj")


@pytest.mark.skipif(not IS_5, reason="before Transformers 5 experts are linear layers")
def test_fused_experts_are_quantized_by_the_parameter(full_precision):
    """As callers of the real bitsandbytes do it, which leaves them out."""
    model = models.load("mixtral", full_precision["mixtral"], "nf4")
    left_out = model.get_memory_footprint()
    for layer in model.model.layers:
        for name in EXPERTS:
            replace_parameter_4bit(layer.mlp.experts, name, compress_statistics=True)
    assert model.get_memory_footprint() < left_out / 3
    assert greedy(model) == models.answer("mixtral")

    reloaded = models.load("mixtral", full_precision["mixtral"], "nf4")
    for layer, saved in zip(reloaded.model.layers, model.model.layers, strict=True):
        state = saved.mlp.experts.state_dict()
        for name in EXPERTS:
            setattr(layer.mlp.experts, name, torch.nn.Parameter(state[name], requires_grad=False))
            parts = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            replace_parameter_4bit_prequantized(layer.mlp.experts, name, parts, "cpu")
    assert torch.equal(logits("mixtral", reloaded), logits("mixtral", model))
