"""What layers keep of a step over all ranks, and what ends it: `finish_gradients`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..layer.moe import MoE
from .expert_bias import update_biases

if TYPE_CHECKING:
    from .gradients import ParallelGroups


def set_expert_replicas(model: nn.Module, groups: ParallelGroups) -> None:
    """From here on the global balance losses of the model's layers (`global_balance_coefficient`) are over the replicas of
    their experts as well, that is over all ranks; a forward in training is then collective over these.

    Args:
        groups: see `make_parallel_groups`.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    if not layers:
        raise ValueError("set_expert_replicas: the model has no layer of anabranch")
    for layer in layers:
        layer._replicas = groups.expert_replicas
        layer._join_device()


def end_step(model: nn.Module, groups: ParallelGroups) -> None:
    """Biases that follow the load are updated; layers forget what they kept for global balance losses. Collective."""
    update_biases(model, groups)
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer._step_load = None
