"""Paged memory on a CPU: tensors in mapped files that have no name, and clear errors where they cannot be had.

And the optimizers that keep their state there.
"""

import copy
import ctypes
import errno
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from optimizers import assert_same_state, parameter, take_steps
from torch import nn

from bnb_core import optim, paged


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_tensor_is_zero_writable_and_shaped(paged_folder):
    tensor = paged.paged_tensor((3, 5), torch.float32, "cpu")
    assert tensor.is_paged and tensor.shape == (3, 5) and not tensor.any()
    tensor.fill_(2.0)
    assert tensor.sum() == 30
    assert paged.paged_tensor((0,), torch.uint8, "cpu").is_paged
    assert paged.paged_tensor((), torch.uint8, "cpu").shape == ()


def test_memory_lies_in_a_file_of_the_folder(paged_folder):
    tensor = paged.paged_tensor((100_000,), torch.float32, "cpu")
    with open("/proc/self/maps") as file:
        mapped = [line for line in file if str(paged_folder) in line]
    begin, end = (int(address, 16) for address in mapped[0].split()[0].split("-"))
    assert begin <= tensor.data_ptr() < end and "(deleted)" in mapped[0]


def test_pages_written_back_leave_ram_and_return(paged_folder):
    """The kernel may take the pages of the state, as it does when memory is short, without losing them."""
    size = 32 << 20
    tensor = paged.paged_tensor((size,), torch.uint8, "cpu").fill_(7)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(tensor.data_ptr())
    synchronously, drop = 4, 4  # MS_SYNC, MADV_DONTNEED
    filled = resident_bytes()
    assert libc.msync(address, ctypes.c_size_t(size), synchronously) == 0
    assert libc.madvise(address, ctypes.c_size_t(size), drop) == 0
    assert filled - resident_bytes() > size // 2
    assert (tensor == 7).all()


def test_no_file_is_left_in_the_folder(paged_folder):
    tensor = paged.paged_tensor((1000,), torch.float32, "cpu")
    assert tensor.is_paged and os.listdir(paged_folder) == []


def test_killed_process_leaves_no_file_and_frees_its_space(paged_folder):
    program = (
        "import sys, torch\nfrom bnb_core.paged import paged_tensor\n"
        "tensor = paged_tensor((64 << 20,), torch.uint8, 'cpu').fill_(1)\n"
        "print('ready', flush=True)\nsys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    assert os.listdir(paged_folder) == []
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdin.close()
    process.stdout.close()
    assert os.listdir(paged_folder) == []


def test_full_disk_is_a_clear_error(paged_folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=rf"400000 bytes .*{paged_folder}.*bytes free.*BNB_PAGED_DIR") as caught:
        paged.paged_tensor((100_000,), torch.float32, "cpu")
    assert caught.value.errno == errno.ENOSPC and os.listdir(paged_folder) == []


def test_more_than_the_disk_has_is_a_clear_error(paged_folder):
    with pytest.raises(OSError, match="BNB_PAGED_DIR"):
        paged.paged_tensor((1 << 60,), torch.uint8, "cpu")
    assert os.listdir(paged_folder) == []


def test_missing_folder_is_a_clear_error(paged_folder, monkeypatch):
    monkeypatch.setenv(paged.FOLDER_VARIABLE, str(paged_folder / "missing"))
    with pytest.raises(FileNotFoundError, match=r"missing .*BNB_PAGED_DIR"):
        paged.paged_tensor((10,), torch.float32, "cpu")


def test_other_devices_are_an_error():
    with pytest.raises(ValueError, match="device: no backend has paged memory on meta"):
        paged.paged_tensor((10,), torch.float32, "meta")


class TestPaged:
    def test_steps_like_unpaged_state(self, paged_folder, backend):
        p, expected = parameter(400, 300), parameter(400, 300)
        optimizer, expected_optimizer = optim.PagedAdamW8bit([p]), optim.AdamW8bit([expected])
        take_steps(optimizer)
        take_steps(expected_optimizer)
        assert torch.equal(p, expected)
        assert_same_state(optimizer.state[p], expected_optimizer.state[expected])
        assert optimizer.state[p]["state1"].is_paged and optimizer.state[p]["state2"].is_paged

    def test_small_state_is_not_paged(self):
        optimizer = optim.PagedAdamW([parameter(300, 300)])
        take_steps(optimizer, last=1)
        (state,) = optimizer.state.values()
        assert not hasattr(state["state1"], "is_paged")

    @pytest.mark.parametrize("duplicate", ["load", "load and move later", "deepcopy", "pickle"])
    def test_copied_state_is_paged_again(self, paged_folder, duplicate):
        optimizer = optim.PagedAdamW([parameter(400, 300)])
        take_steps(optimizer)
        if duplicate == "deepcopy":
            twin = copy.deepcopy(optimizer)
        elif duplicate == "pickle":
            twin = pickle.loads(pickle.dumps(optimizer))
        else:
            twin = optim.PagedAdamW([nn.Parameter(optimizer.param_groups[0]["params"][0].detach().clone())])
            twin.load_state_dict(optimizer.state_dict(), move_to_device=duplicate == "load")
        take_steps(optimizer, 3, 4)
        take_steps(twin, 3, 4)
        ((p, state),), ((twin_p, twin_state),) = optimizer.state.items(), twin.state.items()
        assert torch.equal(twin_p, p)
        assert_same_state(twin_state, state)
        assert twin_state["state1"].is_paged
        assert twin_state["state1"].data_ptr() != state["state1"].data_ptr()


def test_the_state_of_a_forked_child_is_its_own(paged_folder):
    p = parameter(400, 300)
    optimizer = optim.PagedAdam([p])
    take_steps(optimizer)
    before = {key: optimizer.state[p][key].clone() for key in ("state1", "state2")}
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a forked process has none of the threads that GNU's OpenMP waits for
        take_steps(optimizer, 3, 5)
        own = all(optimizer.state[p][key].page_process == os.getpid() for key in before)
        os._exit(0 if own and optimizer.state[p]["step"] == 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for key, value in before.items():
        assert torch.equal(optimizer.state[p][key], value)
