"""What this installation is and finds: `python -m anabranch.info`."""

from __future__ import annotations

import platform

import torch

from . import _build
from .discovery import discover_rank
from .engines import grouped_gemm_engines


def with_cuda() -> bool:
    """Whether the library was built with its CUDA kernels."""
    return bool(grouped_gemm_engines("cuda"))


def transports() -> list[str]:
    """What tensors can travel by between ranks, beside torch.distributed's process groups."""
    lines = torch.ops.anabranch.describe_build().splitlines()
    built = [name for name in ("MPI", "NCCL") if any(line.startswith(f"{name}: ") and "not built" not in line for line in lines)]
    return ["self", "process_group (gloo, nccl)", "store", *(name.lower() for name in built)]


def devices() -> list[str]:
    """Names of the CPU and the GPUs that a layer can live on."""
    found = [f"cpu ({torch.get_num_threads()} threads)"]
    if with_cuda() and torch.cuda.is_available():
        found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return found


def describe() -> str:
    """A report, for people to read."""
    kinds = ["cpu", "cuda"] if with_cuda() else ["cpu"]
    info = discover_rank()
    launcher = f"{info.launcher}: rank {info.rank} of {info.size}" if info.launcher else "none"
    lines = [
        f"anabranch {_build.VERSION}, built against torch {_build.TORCH_VERSION}",
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.platform()}",
        torch.ops.anabranch.describe_build().rstrip(),
        f"devices: {', '.join(devices())}",
        *(f"engines on {kind}: auto, {', '.join(grouped_gemm_engines(kind))}" for kind in kinds),
        f"transports: {', '.join(transports())}",
        f"launcher: {launcher}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
