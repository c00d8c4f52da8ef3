"""What this installation is and finds: `python -m anabranch.info`. No other module imports this one, which Python
would run a second time as the program."""

from __future__ import annotations

import platform

import torch

from . import _build
from .discovery import discover_rank
from .engines import grouped_gemm_engines
from .features import devices, transports, with_cuda


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
