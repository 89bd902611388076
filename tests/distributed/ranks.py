"""Processes that stand for the ranks of a job: started once, they run functions of test files in groups of any size."""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 180.0
"""Seconds for one function; ranks that wait for each other without end are killed then."""


class Ranks:
    """At most ``most`` processes on this machine, with gloo between them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function gives on each rank. It stands at the top of its file, and may use torch.distributed.

        Raises:
            AssertionError: it raised an error on a rank, or took too long; the processes are started anew then.
        """
        assert world_size <= self.most
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(world_size):
                source = function.__code__.co_filename
                call = source, function.__name__, arguments
                message = rank, world_size, str(Path(folder) / "store"), call
                self._pipes[rank].send_bytes(pickle.dumps(message))
            return self._results(world_size)

    def _results(self, world_size: int) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < world_size:
            waiting = {self._pipes[rank]: rank for rank in range(world_size) if rank not in results}
            ready = wait(list(waiting), TIMEOUT)
            if not ready:
                self.stop()
                raise AssertionError(f"ranks {sorted(waiting.values())} have not ended after {TIMEOUT:g} seconds")
            for pipe in ready:
                rank = waiting[pipe]
                try:
                    failed, results[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    failed, results[rank] = True, "the process ended"
                if failed:
                    self.stop()
                    raise AssertionError(f"rank {rank} of {world_size}: {results[rank]}")
        return [results[rank] for rank in range(world_size)]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for _ in range(self.most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, sys.path), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def _serve(pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    loaded: dict[str, Any] = {}
    while True:
        try:
            rank, world_size, store, (source, name, arguments) = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionError):
            return
        try:
            torch.manual_seed(0)
            if source not in loaded:
                spec = importlib.util.spec_from_file_location(f"on_rank_{Path(source).stem}", source)
                assert spec is not None and spec.loader is not None
                loaded[source] = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = loaded[source]
                spec.loader.exec_module(loaded[source])
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
            )
            try:
                result = getattr(loaded[source], name)(*arguments)
            finally:
                torch.distributed.destroy_process_group()
            pipe.send_bytes(pickle.dumps((False, result)))
        except BaseException:
            pipe.send_bytes(pickle.dumps((True, traceback.format_exc())))
