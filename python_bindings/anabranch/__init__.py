"""anabranch: expert-parallel Mixture-of-Experts layers for PyTorch.

Over the same C++ core as the C++ library: no padding, no dropped token, the same answer at any number
of ranks.
"""

from __future__ import annotations

from . import _library  # noqa: F401  first: it says what does not fit
from . import functional
from ._build import VERSION as __version__
from .discovery import RankInfo, discover_rank
from .engines import grouped_gemm_engines
from .groups import Group, as_group, hierarchical
from .huggingface import convert
from .huggingface.loading import from_pretrained
from .huggingface.upcycling import upcycle
from .layer.moe import MoE, MoEOutput, check, run
from .layer.stats import LayerStats, imbalance
from .memory import MemoryPlan, plan_memory
from .training.checkpoint import load_checkpoint, save_checkpoint
from .training.expert_bias import set_expert_bias_rate
from .training.expert_mover import ExpertMover, ExpertMoves
from .training.gradient_reducer import GradientReducer
from .training.gradients import (
    ParallelGroups,
    clip_gradient_norm,
    expert_parameters,
    finish_gradients,
    ignore_expert_parameters,
    make_parallel_groups,
)
from .training.muon import Muon
from .training.step_ends import set_expert_replicas
from .watching.metrics import RouterMetrics, log_to_tensorboard, log_to_trainer, log_to_wandb
from .watching.plots import plot_load
from .watching.replay import RoutingRecord, record_routing, replay_routing, trace_routing

__all__ = [
    "ExpertMover",
    "ExpertMoves",
    "GradientReducer",
    "Group",
    "LayerStats",
    "MemoryPlan",
    "MoE",
    "MoEOutput",
    "Muon",
    "ParallelGroups",
    "RankInfo",
    "RouterMetrics",
    "RoutingRecord",
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
    "log_to_tensorboard",
    "log_to_trainer",
    "log_to_wandb",
    "make_parallel_groups",
    "plan_memory",
    "plot_load",
    "record_routing",
    "replay_routing",
    "run",
    "save_checkpoint",
    "set_expert_bias_rate",
    "set_expert_replicas",
    "trace_routing",
    "upcycle",
]
