"""Kernels for two operators of bitsandbytes, as somebody else might register them, here for the CPU."""

import math

import torch

calls = []
"""The operators that were called, and how often this package was asked to register them."""


def absent_device():
    raise RuntimeError("this machine has no such device")


def register():
    import bitsandbytes

    calls.append(f"registered for {bitsandbytes.__name__}")
    torch.library.register_kernel("bitsandbytes::dequantize_4bit", "cpu", dequantize_4bit)
    torch.library.register_kernel("bitsandbytes::int8_linear_matmul", "cpu", int8_linear_matmul)


def dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype):
    from bitsandbytes.functional import get_4bit_type

    calls.append("dequantize_4bit")
    n, packed = math.prod(shape), A.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:n]
    values = get_4bit_type(quant_type)[codes.int()] * absmax.repeat_interleave(blocksize)[:n]
    return values.to(dtype).reshape(shape)


def int8_linear_matmul(A, B):
    calls.append("int8_linear_matmul")
    assert A.dim() == 2
    return (A.long() @ B.long().t()).int()
