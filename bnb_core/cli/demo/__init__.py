"""`bnb-core demo`: train a small language model, quantize it, compare, and fine-tune it with QLoRA."""
