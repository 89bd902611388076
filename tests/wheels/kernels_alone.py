"""Loads a kernel module of a wheel without torch or numpy, and has it compute: run by each Python on the machine.

    python kernels_alone.py MODULE.so

torch's tensors are stood in for by what the module asks of a tensor in Python.
"""

import ctypes
import importlib.machinery
import importlib.util
import sys


class Tensor:
    """A row of elements in memory of its own."""

    def __init__(self, values, element, dtype):
        self.memory = (element * len(values))(*values)
        self.dtype = dtype

    def data_ptr(self):
        return ctypes.addressof(self.memory)

    def numel(self):
        return len(self.memory)

    def dim(self):
        return 1

    def size(self, dimension):
        return len(self.memory)


def main(path):
    loader = importlib.machinery.ExtensionFileLoader("_kernels", path)
    spec = importlib.util.spec_from_file_location("_kernels", path, loader=loader)
    kernels = importlib.util.module_from_spec(spec)
    loader.exec_module(kernels)

    floats = lambda values: Tensor(values, ctypes.c_float, "torch.float32")  # noqa: E731
    codes = [*range(0, 256, 5), 255]
    code = floats([(i - 128) / 128 for i in range(256)])
    absmax = floats([2.0, 0.5])
    out = floats([7.0] * len(codes))
    packed = Tensor(codes, ctypes.c_uint8, "torch.uint8")
    expected = [(each - 128) / 128 * (2.0 if i < 32 else 0.5) for i, each in enumerate(codes)]
    for level in kernels.isas_available():
        kernels.set_isa(level)
        kernels.dequantize_blockwise(packed, absmax, code, 32, out, 0)
        assert list(out.memory) == expected, level

    levels = [*kernels.isas_available()]
    for call, arguments, error in [
        (kernels.set_isa, ("none",), ValueError),
        (kernels.set_isa, (), TypeError),
        (kernels.set_isa, (1,), TypeError),
        (kernels.set_openmp, ("/nowhere.so",), RuntimeError),
    ]:
        try:
            call(*arguments)
        except error:
            continue
        raise AssertionError((call, arguments))
    assert kernels.isa() == levels[-1] and kernels.openmp_path() is None
    print(sys.version_info[:2], *levels)
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        print("without the interpreter's lock")


main(sys.argv[1])
