"""What the library was built with, and the devices it finds."""

from __future__ import annotations

import torch

from .engines import grouped_gemm_engines


def with_cuda() -> bool:
    """Whether the library was built with its CUDA kernels."""
    return bool(grouped_gemm_engines("cuda"))


def transports() -> list[str]:
    """What tensors can travel by between ranks, beside torch.distributed's process groups."""
    lines = torch.ops.anabranch.describe_build().splitlines()
    built = [name for name in ("MPI", "NCCL") if any(line.startswith(name) and "not built" not in line for line in lines)]
    return ["self", "process_group (gloo, nccl)", "store", *(name.lower() for name in built)]


def devices() -> list[str]:
    """Names of the CPU and the GPUs that a layer can live on."""
    found = [f"cpu ({torch.get_num_threads()} threads)"]
    if with_cuda() and torch.cuda.is_available():
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return found
