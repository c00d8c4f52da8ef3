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
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else whoever has asked for GPUs cannot be forked from
_preloaded = [
    "torch",
    "anabranch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "transformers.modeling_utils",
]
_context.set_forkserver_preload(_preloaded)
_TIMEOUT = 120
BY_PROGRAM = "by program"
"""In a backend's place: the function makes the process group."""


def preload(*names: str) -> None:
    """Has the server that ranks are forked from import these as well: called where a file of tests is read."""
    _preloaded.extend(names)
    _context.set_forkserver_preload(_preloaded)


def _rank(
    function: Callable[..., Any], rank: int, size: int, store: str, results: Any, arguments: tuple, together: bool, backend: str
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if "nccl" in backend:
            torch.cuda.set_device(rank)
        if backend != BY_PROGRAM:
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
        value = function(rank, size, *arguments)
        if together and dist.is_initialized():
            dist.barrier()
        results.put((rank, value, None))
        import anabranch

        anabranch.groups.release_groups()
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def as_torchrun(rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple) -> Any:
    """With the variables that torchrun sets, of an agent whose store is at `port`."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    agent = {"MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}
    agent |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ |= agent | {name: str(value) for name, value in own.items()}
    return function(rank, size, *arguments)


def run_as_torchrun(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """As run_ranks, but it is `function` that makes the process group, as under torchrun: without the time in which each rank
    imports torch."""
    import torch.distributed as dist

    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return run_ranks(size, as_torchrun, agent.port, function, arguments, together=False, backend=BY_PROGRAM)


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
