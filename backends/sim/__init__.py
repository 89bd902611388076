"""What runs where its machine is not at hand: GPUs' kernels on a CPU, and instruction sets that this CPU lacks."""
