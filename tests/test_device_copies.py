"""Copies to a device with streams, on streams that do their work as late as they may."""

from __future__ import annotations

import mmap
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bnb_core.nn import ExpertCache, device_copies
from bnb_core.nn.device_copies import DirectCopies, StagedCopies, copies_to


class Streams:
    """What torch.cuda has of streams: what is given to one is done when somebody waits for it."""

    def __init__(self):
        self.active = None
        self.current = self.Stream("cpu")

    class Stream:
        def __init__(self, device):
            self.device, self.waiting = torch.device(device), []

        def run(self, count=None):
            ready = self.waiting[:count]
            del self.waiting[:count]
            for work in ready:
                work()

        def wait_stream(self, other):
            other.run()

    class Event:
        stream = None

        def record(self, stream):
            self.stream, self.marker = stream, lambda: None
            stream.waiting.append(self.marker)

        def synchronize(self):
            if self.stream is not None and self.marker in self.stream.waiting:
                self.stream.run(self.stream.waiting.index(self.marker) + 1)

    @contextmanager
    def stream(self, stream):
        self.active = stream
        yield
        self.active = None

    def current_stream(self, device):
        return self.current


@pytest.fixture
def streams(monkeypatch):
    streams = Streams()
    streams.recorded = []
    copy_ = torch.Tensor.copy_

    def later(target, source, non_blocking=False):
        if streams.active is None or not non_blocking:
            return copy_(target, source)
        streams.active.waiting.append(lambda: copy_(target, source))
        return target

    monkeypatch.setattr(torch.Tensor, "copy_", later)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *call: streams.recorded.append(call))
    monkeypatch.setattr(device_copies, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    return streams


def test_no_buffer_is_filled_before_it_was_copied_from(streams):
    copies = StagedCopies(torch.device("cpu"), streams)
    sources = [torch.full((8, 1), i, dtype=torch.uint8) for i in range(7)]
    sources += [torch.randn(5, 1).bfloat16(), torch.randn(40, 1)]
    targets = [copies(source) for source in sources]
    # The last two may be under way.
    for target, source in zip(targets[:-2], sources[:-2], strict=True):
        assert torch.equal(target, source)
    copies.arrive(targets)
    for target, source in zip(targets, sources, strict=True):
        assert target.dtype == source.dtype and torch.equal(target, source)
    assert [(id(tensor), stream) for tensor, stream in streams.recorded] == [
        (id(target), streams.current) for target in targets
    ]


def test_a_cache_gives_what_has_arrived(streams):
    cache = ExpertCache(100)
    cache._copies = StagedCopies(cache.device, streams)

    def read(keys, copy):
        return (copy(torch.full((8,), key, dtype=torch.uint8)) for key in keys)

    for i in range(6):
        assert [int(tensor[-1]) for tensor in cache.get([i, 9], read)] == [i, 9]
        cache.read_ahead([i + 1, i + 2], 8, read, [i, 9])
        cache._reading.future.result(timeout=30)
    assert cache.reads_ahead_used == 5 and cache.bytes == 9 * 8


def test_where_there_are_no_streams_copies_are_direct():
    for device in ("cpu", "meta", "mps"):
        assert isinstance(copies_to(torch.device(device)), DirectCopies)
    assert isinstance(copies_to(torch.device("cuda")), StagedCopies)


@pytest.mark.skipif(device_copies._madvise is None, reason="this system has no madvise")
def test_a_mapped_tensor_is_announced_by_whole_pages(tmp_path, monkeypatch):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 64)
    mapped = torch.from_file(str(file), size=16384, dtype=torch.uint8)
    calls, madvise = [], device_copies._madvise

    def record(*call):
        calls.append((*call, madvise(*call)))

    monkeypatch.setattr(device_copies, "_madvise", record)
    for first, last in ((0, 16384), (5000, 5001), (4095, 12289), (7, 7)):
        device_copies.will_need(mapped[first:last])
    # From the page of the first byte to the last one, and nothing for nothing.
    base = mapped.data_ptr()
    pages = [first // mmap.PAGESIZE * mmap.PAGESIZE for first in (0, 5000, 4095)]
    lasts = (16384, 5001, 12289)
    assert [(begin - base, begin - base + size) for begin, size, *_ in calls] == list(zip(pages, lasts, strict=True))
    assert all(call[2:] == (mmap.MADV_WILLNEED, 0) for call in calls)


PROGRAM = """
import torch
import fake_device
from bnb_core.nn import ExpertCache

def read(keys, copy):
    return (copy(torch.full((8,), key, dtype=torch.uint8)) for key in keys)

with torch.inference_mode():
    cache = ExpertCache(100, "fake")
    cache.get([1], read)
    cache.read_ahead([2], 8, read, [1])
    tensors = cache.get([1, 2], read)
    assert all(type(t) is fake_device.FakeDeviceTensor for t in tensors), tensors
    print([int(t.host[-1]) for t in tensors])
"""


def test_another_device_gets_its_tensors():
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120
    )
    assert result.stdout.strip() == "[1, 2]", result.stdout + result.stderr
