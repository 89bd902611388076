"""TRL: QLoRA with SFTTrainer, from a 4-bit model to a merged one."""

from __future__ import annotations

import datasets
import tokenizers
import torch
from ecosystem import models
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words are numbers, and stand for themselves."""
    vocabulary = {str(number): number for number in range(models.VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", pad_token="0")


def make_dataset() -> datasets.Dataset:
    """Counting in threes, which the model has not learnt."""
    rows = (torch.arange(32).view(-1, 1) * 4 + torch.arange(0, 48, 3)) % models.VOCABULARY
    return datasets.Dataset.from_dict({"text": [" ".join(map(str, row)) for row in rows.tolist()]})


def test_qlora(full_precision, tmp_path):
    model = models.load("llama", full_precision["llama"], "nf4 double bf16")
    packed = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    arguments = SFTConfig(
        output_dir=str(tmp_path), optim="paged_adamw_8bit", use_cpu=True, bf16=False, max_steps=60, logging_steps=1,
        per_device_train_batch_size=8, learning_rate=2e-2, gradient_checkpointing=True, max_length=32, report_to=[],
        save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model, arguments, train_dataset=make_dataset(), processing_class=make_tokenizer(), peft_config=adapter
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    trained = trainer.model.eval()
    layer = trained.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, packed), "the 4-bit weight does not train"
    merged = trained.merge_and_unload()
    rows = torch.arange(1, 40, 3).view(1, -1)
    assert merged(input_ids=rows, labels=rows).loss < losses[0]
