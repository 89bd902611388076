"""What only callers of bitsandbytes ask for: the values and the gradients that it gives."""

from __future__ import annotations

import gc
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from optimizers import parameter, take_steps
from torch import nn

import bnb_core
from bnb_core import functional as F
from bnb_core import optim, registry
from bnb_core.compat import (
    autograd_functions,
    backends,
    backends_utils,
    cextension,
    consts,
    cuda_specs,
    nn_modules,
    utils,
)
from bnb_core.compat.autograd_functions import GlobalOutlierPooler, MatMul4Bit, MatMul8bitFp, MatMul8bitLt
from bnb_core.conformance.compare import same_bits
from bnb_core.nn import Linear4bit
from bnb_core.optim.ademamix import _ReferenceAdEMAMix
from bnb_core.optim.optimizer import MockArgs, Optimizer8bit
from bnb_core.paged import GlobalPageManager

LINUX = sys.platform == "linux"


@pytest.mark.parametrize("schedule", [{}, {"t_alpha": 5, "t_beta3": 3}], ids=["constant", "scheduled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ademamix_in_plain_torch_agrees_with_the_kernels(dtype, schedule, backend):
    start = parameter(60, 70).detach().to(dtype)
    p, expected = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "betas": (0.9, 0.99, 0.999), "alpha": 4.0, "eps": 1e-6, "weight_decay": 0.1, **schedule}
    reference, optimizer = _ReferenceAdEMAMix([p], **settings), optim.AdEMAMix32bit([expected], **settings)
    take_steps(reference, last=8)
    take_steps(optimizer, last=8)
    torch.testing.assert_close(p, expected)
    torch.testing.assert_close(reference.state[p]["m1_m2"], optimizer.state[expected]["state1"])
    torch.testing.assert_close(reference.state[p]["nu"], optimizer.state[expected]["state2"])
    assert reference.param_groups[0]["step"] == 8


def test_ademamix_in_plain_torch_takes_any_floating_dtype_and_refuses_what_the_other_does():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = _ReferenceAdEMAMix([p])
    take_steps(optimizer)
    assert optimizer.state[p]["nu"].dtype == torch.float64 and optimizer.step(lambda: 7) == 7
    for arguments in ({"betas": (0.9, 0.999)}, {"t_alpha": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            _ReferenceAdEMAMix([p], **arguments)


def test_the_base_of_optimizers_takes_its_arguments_in_their_places():
    class Adam(Optimizer8bit):
        optimizer_name = "adam"

    defaults = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = Adam([parameter(4)], defaults, 8, True)
    assert optimizer.args.optim_bits == 8 and optimizer.is_paged
    assert optimizer.page_mng is GlobalPageManager.get_instance()
    assert optimizer._FSDP_WRAPPED_QUANT_STATE_KEY == "__bnb_optimizer_quant_state__"
    assert vars(MockArgs({"optim_bits": 8})) == {"optim_bits": 8}


def test_paged_tensors_are_listed_while_they_are_in_use(paged_folder):
    manager = GlobalPageManager.get_instance()
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalPageManager()
    manager.initialize()
    first, second = F.get_paged(3, 4), F.get_paged(5, dtype=torch.uint8)
    assert [tensor.shape for tensor in manager.paged_tensors] == [(3, 4), (5,)]
    manager.prefetch_all()
    manager.prefetch_all(to_cpu=True)
    del first
    gc.collect()
    (left,) = manager.paged_tensors
    assert left is second and left.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_elementwise_functions(paged_folder, dtype, paged):
    A = F.get_paged(3, 4, dtype=dtype, device="cpu") if paged else torch.empty(3, 4, dtype=dtype)
    F.fill(A, 7)
    assert A.dtype == dtype and (A == 7).all()
    F._mul(A, torch.full_like(A, 3))
    assert (A == 21).all()
    F.elementwise_func("arange", A, None, 0)
    assert A.flatten().tolist() == list(range(12))
    with pytest.raises(ValueError, match=r"func_name: .* fill"):
        F.elementwise_func("sqrt", A, None, 0)
    with pytest.raises(ValueError, match="B: "):
        F.elementwise_func("_mul", A, None, 0)


@pytest.mark.parametrize(
    "a, b, transposed, shape",
    [
        ((3, 4), (4, 5), (False, False), (3, 5)),
        ((3, 4), (5, 4), (False, True), (3, 5)),
        ((4, 3), (4, 5), (True, False), (3, 5)),
        ((4, 3), (5, 4), (True, True), (3, 5)),
        ((2, 3, 4), (2, 4, 5), (False, False), (2, 3, 5)),
        ((2, 7, 3), (2, 7, 5), (True, False), (2, 3, 5)),
        ((2, 3, 4), (5, 4), (False, True), (2, 3, 5)),
        ((0, 4), (4, 5), (False, False), (0, 5)),
    ],
)
def test_the_shape_of_a_product(a, b, transposed, shape):
    A, B = torch.ones(a, dtype=torch.int8), torch.ones(b, dtype=torch.int8)
    assert F.check_matmul(A, B, None, *transposed) == shape
    assert F.check_matmul(A.float(), B.float(), torch.empty(shape), *transposed, torch.float32) == shape
    with pytest.raises(ValueError, match="out: "):
        F.check_matmul(A, B, torch.empty(9, 9, 9), *transposed)
    with pytest.raises(TypeError, match=r"A: expected torch\.int8"):
        F.check_matmul(A.float(), B, None, *transposed)
    with pytest.raises(ValueError, match="B: shape"):
        F.check_matmul(A, torch.ones(9, 9, dtype=torch.int8), None, *transposed)


def test_constants():
    assert F.C == 127.0 and torch.device("cuda:0") == F.FIRST_CUDA_DEVICE
    assert torch.equal(F.name2qmap["dynamic"], F.create_dynamic_map())
    assert Path(bnb_core.__file__).parent == consts.PACKAGE_DIR and consts.DYNAMIC_LIBRARY_SUFFIX.startswith(".")
    assert {key: code.tolist() for key, code in backends_utils.CODE.items()} == {
        quant_type: F.get_4bit_type(quant_type).tolist() for quant_type in ("nf4", "fp4")
    }
    assert backends() == registry.backends()
    assert cextension.get_native_library() is cextension.lib is F.lib
    assert isinstance(cextension.lib, cextension.BNBNativeLibrary)


@pytest.mark.skipif(not LINUX, reason="there is no /proc/cpuinfo")
def test_whether_the_cpu_has_bf16(monkeypatch):
    expected = "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    assert F.has_avx512bf16() is expected
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert F.has_avx512bf16() is nn_modules.has_avx512bf16() is expected


@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_in_the_layout_for_cpus_multiplies_with_plain_scales(nested):
    packed, state = F.quantize_4bit(torch.randn(64, 128), compress_statistics=nested, quant_type="nf4")
    converted, plain = F._convert_weight_packed_for_cpu(packed, state)
    x = torch.randn(1, 128)
    assert not plain.nested and plain.absmax.dtype == torch.float32 and state.nested == nested
    same_bits("y", F.gemv_4bit(x, converted, state=plain), F.gemv_4bit(x, packed, state=state))
    back, state_back = F._convert_weight_packed_for_cpu_inverse(converted, plain)
    same_bits("values", F.dequantize_4bit(back, state_back), F.dequantize_4bit(packed, state))


def _operands(dtype):
    A, bias = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True), torch.randn(48, dtype=dtype, requires_grad=True)
    return A, bias, torch.randn(2, 3, 48, dtype=dtype)


def _same_gradients(y, expected, inputs, dY):
    same_bits("y", y.detach(), expected.detach())
    gradients = torch.autograd.grad(y, inputs, dY, retain_graph=True)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, inputs, dY), strict=True):
        same_bits("gradient", gradient, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_matmul_4bit_as_an_autograd_function(nested, dtype):
    A, bias, dY = _operands(dtype)
    packed, state = F.quantize_4bit(torch.randn(48, 64), compress_statistics=nested, quant_type="nf4")
    y = MatMul4Bit.apply(A, packed.t(), None, bias, state)
    _same_gradients(y, bnb_core.matmul_4bit(A, packed.t(), state, bias=bias), [A, bias], dY)
    (without,) = torch.autograd.grad(MatMul4Bit.apply(A, packed.t(), None, None, state).sum(), A)
    assert without.shape == A.shape
    out = torch.empty(2, 3, 48, dtype=dtype)
    with torch.no_grad():
        same_bits("out", out, MatMul4Bit.apply(A, packed.t(), out, bias, state))


def test_an_autograd_function_is_differentiated_twice():
    A, bias, _ = _operands(torch.float32)
    packed, state = F.quantize_4bit(torch.randn(48, 64), quant_type="nf4")
    dY = torch.randn(2, 3, 48, requires_grad=True)
    (dA,) = torch.autograd.grad(MatMul4Bit.apply(A, packed.t(), None, bias, state), A, dY, create_graph=True)
    (second,) = torch.autograd.grad(dA, dY, torch.ones_like(dA))
    torch.testing.assert_close(second, torch.ones(2, 3, 64) @ F.dequantize_4bit(packed, state).t())


def test_who_derives_from_an_autograd_function_has_its_gradient():
    class Doubled(MatMul4Bit):
        @staticmethod
        def backward(ctx, grad_output):
            dA, *others = MatMul4Bit.backward(ctx, grad_output)
            return 2 * dA, *others

    A, bias, dY = _operands(torch.float32)
    packed, state = F.quantize_4bit(torch.randn(48, 64), quant_type="nf4")
    (dA,) = torch.autograd.grad(Doubled.apply(A, packed.t(), None, bias, state), A, dY)
    (expected,) = torch.autograd.grad(bnb_core.matmul_4bit(A, packed.t(), state, bias=bias), A, dY)
    same_bits("dA", dA, 2 * expected)


def _int8_state(weight, **attributes):
    state = bnb_core.MatmulLtState()
    state.CB, state.SCB, _ = F.int8_vectorwise_quant(weight)
    state.has_fp16_weights = False
    for name, value in attributes.items():
        setattr(state, name, value)
    return state


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_matmul_as_an_autograd_function(threshold):
    A, bias, dY = _operands(torch.float32)
    state = _int8_state(torch.randn(48, 64), threshold=threshold)
    y = MatMul8bitLt.apply(A, state.CB, None, bias, state)
    _same_gradients(y, bnb_core.matmul(A, state.CB, state=state, bias=bias), [A, bias], dY)
    trained = torch.randn(48, 64, requires_grad=True)
    y = MatMul8bitLt.apply(A, trained, None, bias)
    _same_gradients(y, bnb_core.matmul(A, trained, bias=bias), [A, trained, bias], dY)


def test_an_int8_weight_is_multiplied_without_rounding_the_input():
    A, bias, dY = _operands(torch.float32)
    state = _int8_state(torch.randn(48, 64))
    values = F.int8_vectorwise_dequant(state.CB, state.SCB)
    y = MatMul8bitFp.apply(A, state.CB, None, bias, state)
    _same_gradients(y, nn.functional.linear(A, values, bias), [A, bias], dY)
    trained = torch.randn(48, 64, requires_grad=True)
    rounded = F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(trained.detach())[:2]).requires_grad_()
    y = MatMul8bitFp.apply(A, trained, None, bias)
    same_bits("y", y.detach(), nn.functional.linear(A, rounded, bias).detach())
    (dW,) = torch.autograd.grad(y, trained, dY)
    torch.testing.assert_close(dW, torch.einsum("abn,abk->nk", dY, A.detach()))


def test_outliers_of_layers_of_the_first_width_are_pooled():
    pooler = GlobalOutlierPooler.get_instance()
    assert autograd_functions.GlobalOutlierPooler.get_instance() is pooler
    pooler.initialize()
    assert pooler.get_current_outlier_idx().dtype == torch.int64 and pooler.get_current_outlier_idx().numel() == 0
    for columns, width in (([5, 3], 64), ([9], 128), ([7, 3], 64)):
        pooler.add_outliers(torch.tensor(columns), width)
    assert pooler.get_current_outlier_idx().tolist() == [3, 5, 7] and pooler.model_dim == 64
    pooler.initialize()
    assert pooler.outliers == set() and pooler.model_dim is None


@pytest.mark.parametrize(
    "cuda, hip, version, text",
    [("12.8", None, (12, 8), "128"), (None, "6.4.43482-0f2d60242", (6, 4), "64"), (None, None, None, None)],
)
def test_facts_about_gpus(monkeypatch, cuda, hip, version, text):
    capabilities = [(9, 0), (7, 0), (8, 6)]
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: version is not None)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    monkeypatch.setattr(cextension, "HIP_ENVIRONMENT", hip is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if version is None else 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    properties = SimpleNamespace(gcnArchName="gfx90a:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert cuda_specs.get_cuda_version_tuple() == version and cuda_specs.get_cuda_version_string() == text
    assert cuda_specs.get_rocm_gpu_arch() == ("unknown" if hip is None else "gfx90a") == cextension.ROCM_GPU_ARCH
    assert ("ROCm" if hip else "CUDA" if cuda else "CPU") == cextension.BNB_BACKEND
    if version is None:
        assert cuda_specs.get_compute_capabilities() == [] and cuda_specs.get_cuda_specs() is None
        return
    assert cuda_specs.get_compute_capabilities() == sorted(capabilities)
    assert cuda_specs.get_cuda_specs() == cuda_specs.CUDASpecs((9, 0), text, version)
    assert cuda_specs.CUDASpecs((7, 5), text, version).has_imma
    assert cuda_specs.CUDASpecs((7, 0), text, version).has_imma is (hip is not None)


def test_the_hook_before_an_8bit_weight_is_loaded_takes_its_format():
    def rearranged(**entries):
        state_dict = {f"layer.{key}": value for key, value in entries.items()}
        nn_modules.maybe_rearrange_weight(state_dict, "layer.", {}, True, [], [], [])
        return sorted(state_dict)

    weight, row = torch.ones(2, 2, dtype=torch.int8), torch.tensor(0, dtype=torch.uint8)
    assert rearranged(weight=weight, SCB=row, weight_format=row) == ["layer.SCB", "layer.weight"]
    assert rearranged(weight=weight, weight_format="row") == ["layer.weight"]
    assert rearranged(weight_format=row) == ["layer.weight_format"]
    for other, name in ((2, "col_turing"), (9, "9")):
        with pytest.raises(ValueError, match=rf"layer\.weight_format: expected row, got {name}"):
            rearranged(weight=weight, weight_format=torch.tensor(other, dtype=torch.uint8))


def test_a_hook_of_ones_own_traces_outliers():
    tracer, layer = utils.OutlierTracer.get_instance(), nn.Linear(4, 4)
    try:
        for _ in range(2):
            utils.outlier_hook(layer, (torch.ones(1, 4),))
        assert tracer.hvalues == [tracer.get_hvalue(layer.weight)] == [layer.weight.data_ptr()]
        assert [found.tolist() for found in tracer.outliers] == [[]] and not tracer.initialized
    finally:
        tracer.remove()


def test_what_a_command_writes():
    program = "import sys; print('one two'); sys.stderr.write('three'); sys.exit(4)"
    assert utils.execute_and_return(f'{sys.executable} -c "{program}"') == ("one two", "three")


def test_the_layers_log_where_callers_look(caplog):
    with caplog.at_level("WARNING", nn_modules.logger.name):
        Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")(torch.ones(2, 64, dtype=torch.bfloat16))
    (record,) = caplog.records
    assert record.name.startswith(f"{nn_modules.logger.name}.")


def test_the_settings_of_an_optimizer_are_pickled():
    args = pickle.loads(pickle.dumps(optim.Adam8bit([parameter(4)]).args))
    assert isinstance(args, MockArgs) and args.min_8bit_size == 4096


def test_the_state_of_an_int8_product_takes_its_fields_and_knows_those_of_older_releases():
    weight = torch.ones(2, 3, dtype=torch.int8)
    state = bnb_core.MatmulLtState(True, weight, idx=torch.ones(1))
    assert state.force_no_igemmlt and state.CB is weight and state.idx is not None and state.threshold == 0.0
    assert bnb_core.MatmulLtState() == bnb_core.MatmulLtState() and not state.has_accumulated_gradients
    assert state.CxB is None
    for name in ("CxBt", "formatB", "_tile_indices"):
        with pytest.warns(FutureWarning, match=name):
            assert getattr(state, name) is None
    state.formatB = "row"
    assert state.formatB == "row" and not hasattr(state, "colorB")


@pytest.mark.parametrize("cls", [bnb_core.nn.Embedding, bnb_core.nn.StableEmbedding])
def test_embeddings_take_their_arguments_in_their_places(cls):
    weight = torch.randn(5, 4)
    layer = cls(5, 4, 1, 0.5, 1.0, True, False, weight, "cpu")
    assert (layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq) == (1, 0.5, 1.0, True)
    assert torch.equal(layer.weight, weight) and layer.weight.requires_grad
    assert cls(5, 4, device="meta", dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert not cls.from_pretrained(weight).weight.requires_grad
