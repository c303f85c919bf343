"""Processes for the tests of several ranks: started once, then given one function after the other.

Each process is a rank of a group of all of them, and the first 1, 2, 4, ... of them are groups too. A
function that a test runs is called on each rank of a group as ``function(group, *arguments)``; what it
returns comes back, and what it raises is raised in the test.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback


def _serve(rank, ranks, backend, store, pipe):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    groups, size = {}, 1
    while size <= ranks:
        groups[size] = dist.new_group(range(size))
        size *= 2
    while True:
        task = pipe.recv()
        if task is None:
            break
        size, function, arguments = task
        try:
            with torch.inference_mode():
                pipe.send((True, function(groups[size], *arguments)))
        except Exception as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


class World:
    """Processes that wait for work."""

    def __init__(self, ranks, backend="gloo"):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch.distributed", "flashprefill", "flashprefill.distributed"]
        )
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            arguments = (rank, ranks, backend, f"{self._folder.name}/store", there)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def outcomes(self, size, function, *arguments, timeout=120):
        """What each rank's call returned or raised: (True, result) or (False, (type, message, trace))."""
        for pipe in self._pipes[:size]:
            pipe.send((size, function, arguments))
        found = []
        for rank, pipe in enumerate(self._pipes[:size]):
            assert pipe.poll(timeout), f"rank {rank} does not answer"
            found.append(pipe.recv())
        return found

    def run(self, size, function, *arguments):
        """What each rank's call returned."""
        outcomes = self.outcomes(size, function, *arguments)
        for rank, (fine, what) in enumerate(outcomes):
            assert fine, f"rank {rank}: {what[2]}"
        return [what for _, what in outcomes]

    def close(self):
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()
