"""anabranch: expert-parallel Mixture-of-Experts layers for PyTorch.

Over the same C++ core as the C++ library: no padding, no dropped token, the same answer at any number
of ranks.
"""

from __future__ import annotations

from . import _library  # noqa: F401  first: it says what does not fit
from . import functional
from ._build import VERSION as __version__
from ._loading import from_pretrained
from .checkpoint import load_checkpoint, save_checkpoint
from .discovery import RankInfo, discover_rank
from .engines import grouped_gemm_engines
from .gradient_reducer import GradientReducer
from .gradients import (
    ParallelGroups,
    clip_gradient_norm,
    expert_parameters,
    finish_gradients,
    ignore_expert_parameters,
    make_parallel_groups,
)
from .groups import Group, as_group, hierarchical
from .huggingface import convert
from .memory import MemoryPlan, plan_memory
from .moe import MoE, MoEOutput, check
from .muon import Muon
from .plots import plot_load
from .stats import LayerStats, imbalance

__all__ = [
    "GradientReducer",
    "Group",
    "LayerStats",
    "MemoryPlan",
    "MoE",
    "MoEOutput",
    "Muon",
    "ParallelGroups",
    "RankInfo",
    "__version__",
    "as_group",
    "check",
    "clip_gradient_norm",
    "convert",
    "discover_rank",
    "expert_parameters",
    "finish_gradients",
    "from_pretrained",
    "functional",
    "grouped_gemm_engines",
    "hierarchical",
    "ignore_expert_parameters",
    "imbalance",
    "load_checkpoint",
    "make_parallel_groups",
    "plan_memory",
    "plot_load",
    "save_checkpoint",
]
