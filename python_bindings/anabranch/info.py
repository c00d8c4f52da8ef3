"""What this installation is and finds: `anabranch info`, or `python -m anabranch.info`. No module that `import anabranch`
brings imports this one, which Python would run a second time as the program."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _build
from .discovery import discover_rank
from .engines import grouped_gemm_engines
from .features import devices, transports, with_cuda


def facts() -> dict[str, Any]:
    """For programs to read."""
    kinds = ["cpu", "cuda"] if with_cuda() else ["cpu"]
    info = discover_rank()
    return {
        "version": _build.VERSION,
        "built_against_torch": _build.TORCH_VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": torch.ops.anabranch.describe_build().rstrip().splitlines(),
        "why_no_kernels_for_gpus": _build.WHY_NO_CUDA,
        "devices": devices(),
        "engines": {kind: ["auto", *grouped_gemm_engines(kind)] for kind in kinds},
        "transports": transports(),
        "launcher": {"name": info.launcher, "rank": info.rank, "size": info.size} if info.launcher else None,
    }


def describe() -> str:
    """A report, for people to read."""
    found = facts()
    why, launcher = found["why_no_kernels_for_gpus"], found["launcher"]
    lines = [
        f"anabranch {found['version']}, built against torch {found['built_against_torch']}",
        f"torch {found['torch']}, Python {found['python']}, {found['platform']}",
        *found["libraries"],
        f"no kernels for GPUs: {why}" if why else "built with CUDA kernels",
        f"devices: {', '.join(found['devices'])}",
        *(f"engines on {kind}: {', '.join(names)}" for kind, names in found["engines"].items()),
        f"transports: {', '.join(found['transports'])}",
        f"launcher: {launcher['name']}: rank {launcher['rank']} of {launcher['size']}" if launcher else "launcher: none",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(describe())
