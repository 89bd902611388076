"""What each process of test_accelerate_replicas.py runs: LoRA on a 4-bit Llama, prepared by Accelerate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from ecosystem.upstream import FACE

import bnb_core

if FACE == "process":
    bnb_core.install_as_bitsandbytes()
# Only now: these import what looks for bitsandbytes.
import bitsandbytes
import peft
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

STEPS = 4


def take_fsdp2(accelerator: Accelerator) -> None:
    """Make it what Accelerate makes of its options for FSDP on GPUs; on a CPU it passes over them, and takes DDP."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin


def prepared(accelerator: Accelerator, folder: str, storage: str, seed: int) -> tuple[Any, Any]:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=storage,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return accelerator.prepare(model, bitsandbytes.optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=256))


def losses(accelerator: Accelerator, model: Any, optimizer: Any, first: int = 0) -> list[float]:
    """Of STEPS steps, over all processes."""
    found = []
    for step in range(first, first + STEPS):
        ids = torch.randint(128, (4, 1), generator=torch.Generator().manual_seed(step)) + torch.arange(12)
        ids = (ids % 128).chunk(accelerator.num_processes)[accelerator.process_index]
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(accelerator.reduce(loss.detach(), "mean").item())
    return found


def held_codes(model: Any) -> int:
    """Bytes of packed codes on this process."""
    weights = [p.detach() for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
    return sum(getattr(weight, "_local_tensor", weight).nbytes for weight in weights)


def trained(accelerator: Accelerator, folder: str, storage: str, checkpoint: str) -> dict[str, Any]:
    """Losses before and after a checkpoint, and those of another model and optimizer that load it."""
    model, optimizer = prepared(accelerator, folder, storage, seed=0)
    result = {"type": accelerator.distributed_type.value, "held": held_codes(model)}
    result["losses"] = losses(accelerator, model, optimizer)
    accelerator.save_state(checkpoint)
    result["after"] = losses(accelerator, model, optimizer, first=STEPS)
    accelerator.free_memory()
    model, optimizer = prepared(accelerator, folder, storage, seed=5)
    accelerator.load_state(checkpoint)
    result["resumed"] = losses(accelerator, model, optimizer, first=STEPS)
    result["state"] = sorted({str(state["state1"].dtype) for state in optimizer.optimizer.state.values()})
    accelerator.free_memory()
    return result


def main(folder: str, results: str) -> None:
    accelerator = Accelerator(cpu=True)
    found = {"ddp": trained(accelerator, folder, "uint8", f"{results}.ddp")}
    take_fsdp2(accelerator)
    for storage in ("uint8", "float32"):
        name = f"fsdp2, {storage}"
        found[name] = trained(accelerator, folder, storage, f"{results}.{name}")
    if accelerator.is_main_process:
        Path(results).write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
