"""Experts in files compute what they do in memory, and take no more of it than they are allowed."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bnb_core.nn import ExpertCache, Experts4bit, offload_experts

EXPERTS, HIDDEN, INTERMEDIATE = 6, 128, 128
OF_ONE_EXPERT = HIDDEN * INTERMEDIATE * 3 // 2


def model(**options):
    return nn.ModuleDict({"experts": Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE, **options).to("cpu")})


def saved(module, folder):
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, folder / "experts.safetensors")
    return folder


def inputs(tokens=9, top_k=2):
    index = torch.rand(tokens, EXPERTS).argsort(dim=1)[:, :top_k].contiguous()
    return torch.randn(tokens, HIDDEN), index, torch.rand(tokens, top_k)


@pytest.mark.parametrize(
    "options",
    [{}, {"compress_statistics": False}, {"bias": True, "transposed": True}, {"blocksize": 128}, {"has_gate": False}],
    ids=str,
)
@pytest.mark.parametrize("limit", [1, OF_ONE_EXPERT, 3 * OF_ONE_EXPERT, 10**9])
@pytest.mark.parametrize("tokens", [0, 1, 9])
def test_the_result_is_the_same_to_the_bit(tmp_path, options, limit, tokens):
    in_memory = model(**options)
    in_files = copy.deepcopy(in_memory)
    offload_experts(in_files, saved(in_memory, tmp_path), limit)
    for _ in range(2):
        arguments = inputs(tokens)
        assert torch.equal(in_files["experts"](*arguments), in_memory["experts"](*arguments))


def test_a_model_on_meta_will_do(tmp_path):
    in_memory = model()
    with torch.device("meta"):
        fresh = nn.ModuleDict({"experts": Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE)})
    offload_experts(fresh, saved(in_memory, tmp_path), 10**9)
    arguments = inputs()
    assert torch.equal(fresh["experts"](*arguments), in_memory["experts"](*arguments))


def test_the_inputs_gradient_is_the_same(tmp_path):
    in_memory = model()
    in_files = copy.deepcopy(in_memory)
    offload_experts(in_files, saved(in_memory, tmp_path), OF_ONE_EXPERT)
    hidden, index, weights = inputs()
    gradients = []
    for m in (in_memory, in_files):
        x = hidden.clone().requires_grad_()
        m["experts"](x, index, weights).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_the_cache_keeps_within_its_bytes_what_was_used_last(tmp_path):
    in_files = model()
    cache = offload_experts(in_files, saved(in_files, tmp_path), 3 * OF_ONE_EXPERT)
    hidden, weights = torch.randn(1, HIDDEN), torch.ones(1, 1)
    for expert in (0, 1, 2, 0, 3, 0, 1):
        in_files["experts"](hidden, torch.tensor([[expert]]), weights)
        assert cache.bytes <= cache.limit
    # 3 puts 1 out, and 1 puts 2 out; 0 stays. Each use is of two projections.
    assert (cache.hits, cache.misses) == (2 * 2, 2 * 5)


REFUSED = {
    "no experts": ("^model:", lambda folder: offload_experts(nn.ModuleDict({"a": nn.Linear(2, 2)}), folder, 1)),
    "no file": ("^path:", lambda folder: offload_experts(model(), folder / "nowhere", 1)),
    "other names": ("^other.gate_up_proj.weight:", lambda folder: offload_experts(
        nn.ModuleDict({"other": Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE)}), folder, 1)),
    "another shape": ("^experts.gate_up_proj.weight: expected shape", lambda folder: offload_experts(
        nn.ModuleDict({"experts": Experts4bit(EXPERTS, HIDDEN, 64)}), folder, 1)),
    "no bytes": ("^limit:", lambda folder: ExpertCache(0)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(tmp_path, case):
    error, call = case
    saved(model(), tmp_path)
    with pytest.raises(ValueError, match=error):
        call(tmp_path)


class Layers(nn.Module):
    """Two layers of experts one after the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Experts4bit(EXPERTS, HIDDEN, INTERMEDIATE) for _ in range(2))

    def forward(self, hidden, index, weights, between=lambda: None):
        for layer in self.layers:
            hidden = layer(hidden, index, weights)
            between()
        return hidden


def reading_ends(cache):
    if cache._reading is not None:
        cache._reading.future.result(timeout=30)


@pytest.mark.parametrize("read_ahead", [True, False])
@pytest.mark.parametrize("limit", [1, OF_ONE_EXPERT, 3 * OF_ONE_EXPERT, 10 * OF_ONE_EXPERT, 10**9])
def test_reading_ahead_changes_no_bit_and_keeps_to_the_limit(tmp_path, limit, read_ahead):
    in_memory = Layers().to("cpu")
    in_files = copy.deepcopy(in_memory)
    cache = offload_experts(in_files, saved(in_memory, tmp_path), limit, read_ahead=read_ahead)

    def within_the_limit():
        assert cache.bytes <= cache.limit

    for tokens in (9, 1, 1, 3, 1):
        arguments = inputs(tokens)
        assert torch.equal(in_files(*arguments, within_the_limit), in_memory(*arguments))
        assert read_ahead or cache.reads_ahead == 0


def test_the_second_projection_of_the_same_experts_is_read_ahead(tmp_path):
    def activation(x):
        reading_ends(cache)
        return nn.functional.silu(x)

    in_files = model(act_fn=activation)
    cache = offload_experts(in_files, saved(in_files, tmp_path), 10**9)
    index = torch.tensor([[4, 1]])
    in_files["experts"](torch.randn(1, HIDDEN), index, torch.ones(1, 2))
    assert (cache.reads_ahead, cache.reads_ahead_used, cache.misses) == (2, 2, 4)


def test_the_next_layer_is_guessed_from_its_previous_batch(tmp_path):
    in_files = Layers().to("cpu")
    # Room for one layer: each has left when its turn comes again.
    cache = offload_experts(in_files, saved(in_files, tmp_path), 2 * OF_ONE_EXPERT)
    arguments = torch.randn(1, HIDDEN), torch.tensor([[4, 1]]), torch.ones(1, 2)
    in_files(*arguments, lambda: reading_ends(cache))
    before = cache.reads_ahead_used
    in_files(*arguments, lambda: reading_ends(cache))
    assert cache.reads_ahead_used - before >= 2
    assert cache.misses == 16


def test_a_file_that_is_gone_is_named_and_comes_back(tmp_path):
    in_memory = model()
    in_files = copy.deepcopy(in_memory)
    offload_experts(in_files, saved(in_memory, tmp_path), 1)
    arguments = inputs()
    file = tmp_path / "experts.safetensors"
    file.rename(tmp_path / "away")
    with pytest.raises(OSError, match=r"^experts.gate_up_proj.weight: cannot be read from .*experts.safetensors"):
        in_files["experts"](*arguments)
    (tmp_path / "away").rename(file)
    assert torch.equal(in_files["experts"](*arguments), in_memory["experts"](*arguments))


def test_a_copy_of_the_model_reads_for_itself(tmp_path):
    in_memory = model()
    in_files = copy.deepcopy(in_memory)
    cache = offload_experts(in_files, saved(in_memory, tmp_path), 10**9)
    copied = copy.deepcopy(in_files)
    arguments = inputs()
    assert torch.equal(copied["experts"](*arguments), in_memory["experts"](*arguments))
    assert cache.misses == 0
