"""What an ExpertCache holds while a thread reads ahead, and what becomes of the thread."""

from __future__ import annotations

import copy
import gc
import os
import signal
import threading
import warnings

import pytest
import torch

from bnb_core.nn import ExpertCache

SIZE = 8


def value(key):
    return torch.full((SIZE,), key, dtype=torch.uint8)


def read(keys, copy):
    return (copy(value(key)) for key in keys)


def unread(keys, copy):
    raise AssertionError(f"{keys} should have been there")


def reading_ends(cache):
    """Wait for all that the thread has been told to read."""
    if cache._reading is not None:
        cache._reading.future.result(timeout=30)


def filled(limit, *keys):
    cache = ExpertCache(limit * SIZE)
    for key in keys:
        cache.get([key], read)
    return cache


def read_ahead(cache, keys, needed=()):
    cache.read_ahead(keys, SIZE, read, needed)
    assert cache.bytes <= cache.limit
    reading_ends(cache)


def lie_there(cache, *keys):
    assert [int(tensor[0]) for tensor in cache.get(keys, unread)] == list(keys)


def test_what_was_read_ahead_is_there_and_counted():
    cache = filled(4, 0)
    read_ahead(cache, [1, 2, 0])
    lie_there(cache, 2, 0)
    assert (cache.reads_ahead, cache.reads_ahead_used) == (2, 1)
    assert (cache.hits, cache.misses) == (1, 2)
    lie_there(cache, 2)
    assert (cache.hits, cache.misses, cache.reads_ahead_used) == (2, 2, 1)


def test_what_is_needed_stays_and_the_limit_holds():
    cache = filled(4, 0, 1, 2, 3)
    read_ahead(cache, [4, 5, 6, 7, 2], needed=[0])
    assert cache.bytes == cache.limit
    lie_there(cache, 0, 2, 4, 5)


def test_nothing_is_read_where_there_is_no_room():
    cache = filled(2, 0, 1)
    read_ahead(cache, [2], needed=[0, 1])
    assert cache.reads_ahead == 0
    lie_there(cache, 0, 1)
    tiny = ExpertCache(1)
    read_ahead(tiny, [0])
    assert [int(tensor[0]) for tensor in tiny.get([0], read)] == [0]
    assert (tiny.bytes, tiny.reads_ahead) == (0, 0)


def test_what_nobody_asked_for_leaves_first():
    cache = filled(4, 0, 1)
    read_ahead(cache, [8, 9])
    cache.get([2, 3], read)
    lie_there(cache, 0, 1, 2, 3)


def test_a_key_that_is_being_read_is_waited_for_and_the_rest_is_read_at_once():
    begun, go_on = threading.Event(), threading.Event()

    def slowly(keys, copy):
        for key in keys:
            begun.set()
            assert go_on.wait(30)
            yield copy(value(key))

    cache = ExpertCache(4 * SIZE)
    cache.read_ahead([0, 1, 2], SIZE, slowly, ())
    assert begun.wait(30)
    read_here = []

    def read_the_rest(keys, copy):
        read_here.extend(keys)
        return read(keys, copy)

    threading.Timer(0.05, go_on.set).start()
    assert [int(tensor[0]) for tensor in cache.get([0, 1, 2], read_the_rest)] == [0, 1, 2]
    assert 0 not in read_here and sorted([*read_here, *range(cache.reads_ahead)]) == [0, 1, 2]
    assert cache.bytes == 3 * SIZE


def test_an_error_of_the_thread_is_raised_where_its_key_is_wanted():
    def failing(keys, copy):
        for key in keys:
            if key == 1:
                raise OSError("expert 1 is not there")
            yield copy(value(key))

    for wanted, raises in (([1], True), ([0, 1], True), ([0], False), ([5], False)):
        cache = ExpertCache(4 * SIZE)
        cache.read_ahead([0, 1, 2], SIZE, failing, ())
        reading_ends(cache)
        if raises:
            with pytest.raises(OSError, match="expert 1 is not there"):
                cache.get(wanted, unread)
        assert [int(tensor[0]) for tensor in cache.get(wanted, read)] == wanted
        assert cache.bytes == SIZE * len({0, *wanted})


def test_an_interrupt_leaves_the_cache_whole():
    def interrupted(keys, copy):
        yield copy(value(keys[0]))
        raise KeyboardInterrupt

    cache = filled(4, 0)
    read_ahead(cache, [1])
    with pytest.raises(KeyboardInterrupt):
        cache.get([2, 3], interrupted)
    assert cache.bytes == 3 * SIZE
    lie_there(cache, 0, 1, 2)
    assert int(cache.get([3], read)[0][0]) == 3


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("bnb_core reads experts ahead")]


def test_the_thread_ends_with_the_cache():
    gc.collect()
    before = set(readers())
    begun, go_on, done = threading.Event(), threading.Event(), []

    def slowly(keys, copy):
        for key in keys:
            begun.set()
            assert go_on.wait(30)
            done.append(key)
            yield copy(value(key))

    cache = ExpertCache(8 * SIZE)
    cache.read_ahead(range(8), SIZE, slowly, ())
    assert begun.wait(30)
    (thread,) = set(readers()) - before
    del cache
    go_on.set()
    thread.join(30)
    assert not thread.is_alive()
    assert done == [0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_reads_for_itself():
    begun, go_on = threading.Event(), threading.Event()

    def slowly(keys, copy):
        begun.set()
        assert go_on.wait(30)
        yield from read(keys, copy)

    cache = filled(4, 0)
    cache.read_ahead([1], SIZE, slowly, ())
    assert begun.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(30)
        correct = [int(tensor[0]) for tensor in cache.get([0, 1], read)] == [0, 1]
        read_ahead(cache, [2])
        lie_there(cache, 0, 1, 2)
        os._exit(0 if correct and cache.reads_ahead == 1 else 1)
    go_on.set()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    lie_there(cache, 1)


def test_a_copy_is_empty_and_reads_for_itself():
    cache = filled(4, 0, 1)
    copied = copy.deepcopy(cache)
    assert (copied.limit, copied.device, copied.bytes) == (cache.limit, cache.device, 0)
    read_ahead(copied, [0])
    lie_there(copied, 0)


def test_threads_may_call_at_once():
    cache, errors = ExpertCache(3 * SIZE), []

    def use(first):
        try:
            for i in range(200):
                keys = [(first + i) % 7, (first + 2 * i + 3) % 7 + 7]
                assert [int(tensor[0]) for tensor in cache.get(keys, read)] == keys
                cache.read_ahead([(first + i + 1) % 7], SIZE, read, keys)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    cache.get([0], read)
    assert cache.bytes == sum(tensor.nbytes for tensor in cache._kept.values()) <= cache.limit
