"""The engines of the grouped GEMM."""

from __future__ import annotations

import torch

from . import _library  # noqa: F401


def grouped_gemm_engines(device: torch.device | str = "cpu") -> list[str]:
    """Names of the engines that run on a device, for `MoE(engine=...)`; besides them "auto" and "deterministic"."""
    return list(torch.ops.anabranch.grouped_gemm_engines(torch.device(device)))
