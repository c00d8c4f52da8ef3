"""Runs a function on several ranks, each a process of its own, joined by gloo."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "anabranch",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
        "transformers.modeling_utils",
    ]
)
_TIMEOUT = 120


def _rank(
    function: Callable[..., Any], rank: int, size: int, store: str, results: Any, arguments: tuple, together: bool, backend: str
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
        value = function(rank, size, *arguments)
        if together:
            dist.barrier()
        results.put((rank, value, None))
        import anabranch

        anabranch.groups.release_groups()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _next(results: Any, processes: list[Any]) -> tuple[int, Any, str | None]:
    """What the next rank says; AssertionError where one has died or time is up."""
    for _ in range(_TIMEOUT):
        try:
            return results.get(timeout=1)
        except queue.Empty:
            for rank, process in enumerate(processes):
                assert process.exitcode in (None, 0), f"rank {rank} ended with {process.exitcode}"
    raise AssertionError(f"ranks did not end within {_TIMEOUT} s")


def backend_for(device: Any, size: int) -> str:
    """NCCL where each rank has a GPU; else GPU memory travels through the host."""
    import torch

    return "cpu:gloo,cuda:nccl" if device.type == "cuda" and torch.cuda.device_count() >= size else "gloo"


def run_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, together: bool = True, backend: str = "gloo"
) -> list[Any]:
    """function(rank, size, *arguments) on each rank of a fresh world; what each returned, by rank. Results
    travel by pickle: tensors as lists. `together`: ranks wait for each other before they end."""
    results = _context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        store = os.path.join(directory, "store")
        processes = [
            _context.Process(
                target=_rank, args=(function, rank, size, store, results, arguments, together, backend), daemon=True
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            values: list[Any] = [None] * size
            for _ in range(size):
                rank, value, error = _next(results, processes)
                assert error is None, f"rank {rank}:\n{error}"
                values[rank] = value
            for process in processes:
                process.join(_TIMEOUT)
                assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
            return values
        finally:
            for process in processes:
                process.kill()
