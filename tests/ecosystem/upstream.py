"""What the libraries above cannot do with bitsandbytes, real or not; docs/migration.md lists the same reasons."""

REASONS = {
    "AdaLoRA": "PEFT has no merging of AdaLoRA into quantized weights",
    "IA3": "PEFT refuses to merge IA3 into quantized weights",
    "RandLoRA, 4-bit": "PEFT rebuilds the merged weight of RandLoRA without asking for its quantization",
    "RandLoRA, 8-bit": "PEFT's forward of RandLoRA on 8-bit weights is not the product that it merges",
    "dequantize": "Transformers takes the dtype from the configuration as text, which a tensor does not convert to",
}
