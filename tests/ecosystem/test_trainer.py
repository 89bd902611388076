"""Transformers' Trainer with every optimizer that it takes from bitsandbytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
from ecosystem import models
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

# Trainer's name: the class, whether the state is 8-bit, whether it is paged.
OPTIMIZERS = {
    "adamw_bnb_8bit": ("AdamW", True, False),
    "adamw_8bit": ("AdamW", True, False),
    "paged_adamw_32bit": ("AdamW", False, True),
    "paged_adamw_8bit": ("AdamW", True, True),
    "lion_32bit": ("Lion", False, False),
    "lion_8bit": ("Lion", True, False),
    "paged_lion_32bit": ("Lion", False, True),
    "paged_lion_8bit": ("Lion", True, True),
    "rmsprop_bnb": ("RMSprop", False, False),
    "rmsprop_bnb_8bit": ("RMSprop", True, False),
    "rmsprop_bnb_32bit": ("RMSprop", False, False),
    "ademamix": ("AdEMAMix", False, False),
    "ademamix_8bit": ("AdEMAMix", True, False),
    "paged_ademamix_32bit": ("AdEMAMix", False, True),
    "paged_ademamix_8bit": ("AdEMAMix", True, True),
}

# 64 times 64 elements: large enough for 8-bit state.
QUANTIZED = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def dataset() -> list[dict[str, torch.Tensor]]:
    rows = (torch.arange(32).view(-1, 1) * 4 + torch.arange(16)) % models.VOCABULARY
    return [{"input_ids": row, "labels": row} for row in rows]


def make_trainer(folder: Any, optimizer: str, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = models.model_class("llama").from_config(models.CONFIGS["llama"]())
    arguments = TrainingArguments(
        output_dir=str(folder), optim=optimizer, use_cpu=True, max_steps=8, per_device_train_batch_size=8,
        learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=1, report_to=[], disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=dataset())


def state_of(trainer: Trainer, parameter: str) -> dict[str, Any]:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return optimizer.state[dict(trainer.model.named_parameters())[parameter]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_trains_with_the_state_that_the_name_says(tmp_path, optimizer):
    trainer = make_trainer(tmp_path, optimizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    kind, is_8bit, is_paged = OPTIMIZERS[optimizer]
    used = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(used, getattr(bitsandbytes.optim, kind)) and used.is_paged == is_paged
    assert state_of(trainer, QUANTIZED)["state1"].dtype == (torch.uint8 if is_8bit else torch.float32)


@pytest.mark.parametrize("optimizer", [name for name, (_, is_8bit, _) in OPTIMIZERS.items() if is_8bit])
def test_embeddings_keep_32_bit_state(tmp_path, optimizer):
    """Trainer asks for this where it sees "bitsandbytes" in the name of the optimizer's class."""
    trainer = make_trainer(tmp_path, optimizer)
    trainer.train()
    assert state_of(trainer, EMBEDDING)["state1"].dtype == torch.float32


def test_the_table_holds_every_name_that_trainer_takes_from_bitsandbytes(tmp_path):
    ours = set()
    for name in OptimizerNames:
        try:
            kind, _ = Trainer.get_optimizer_cls_and_kwargs(make_trainer(tmp_path, name).args)
        except (ImportError, ValueError):
            continue
        if "bitsandbytes" in str(kind):
            ours.add(name.value)
    assert ours == set(OPTIMIZERS)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path, optimizer):
    whole = make_trainer(tmp_path / "whole", optimizer)
    whole.train()
    first = make_trainer(tmp_path / "parts", optimizer, save_strategy="steps", save_steps=4)
    first.train()
    resumed = make_trainer(tmp_path / "parts", optimizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, dict(resumed.model.named_parameters())[name]), name
