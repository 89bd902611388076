"""Every number the demo runs with, in one place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes chosen so that the whole demo takes five to seven minutes on two cores."""

    steps: int = 900
    seed: int = 0
    device: str = "cpu"
    backend: str | None = None

    context: int = 128
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1

    width: int = 256
    layers: int = 4
    heads: int = 4

    evaluation_windows: int = 256
    generated_tokens: int = 128
    temperature: float = 0.7
    prompt: str = "def read_file(path):\n"

    lora_rank: int = 16
    lora_scale: float = 2.0
    lora_learning_rate: float = 2e-3

    @property
    def fine_tuning_steps(self) -> int:
        """Steps of each LoRA run: a fifth of the training, at least one."""
        return max(1, self.steps // 5)
