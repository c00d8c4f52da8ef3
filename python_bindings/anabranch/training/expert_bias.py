"""Balance without a loss, step by step, over all ranks: the routers' biases follow the load by themselves."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layer.fakes import BIAS_BINS
from ..layer.moe import MoE, MoEOutput
from ..watching.replay import is_recomputing

if TYPE_CHECKING:
    from .gradients import ParallelGroups


class _Following:
    """What one layer's bias has been told since the last step: a load over the group, or a histogram of this rank's."""

    def __init__(self, layer: MoE, rate: float) -> None:
        self.rate = rate
        self.load: Tensor | None = None
        self.handle = layer.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, args: Any, out: MoEOutput) -> None:
        if layer.training and not is_recomputing():
            with torch.no_grad():
                told = out.expert_load if out.bias_histogram is None else out.bias_histogram
                self.load = told.clone() if self.load is None else self.load + told


_following: weakref.WeakKeyDictionary[MoE, _Following] = weakref.WeakKeyDictionary()


def set_expert_bias_rate(model: nn.Module, rate: float) -> None:
    """From here on `finish_gradients` updates the bias of every layer with `expert_bias` (arXiv:2408.15664): by the load of
    all forwards in training mode since the last one, micro-batches alike, over all replicas of the experts. What
    checkpointing runs again is not counted again. DeepSeek-V3 trains with 0.001; 0: no longer. Of layers with
    `expert_bias_update="quantile"` the rate is how much of the new biases is taken: 1 for all.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MoE) and layer.options["expert_bias"]]
    if not layers:
        raise ValueError("set_expert_bias_rate: the model has no layer with expert_bias=True")
    if not 0 <= rate < float("inf"):
        raise ValueError(f"set_expert_bias_rate: rate = {rate}, expected 0 or more")
    for layer in layers:
        if layer in _following:
            _following.pop(layer).handle.remove()
        if rate > 0:
            _following[layer] = _Following(layer, rate)


def update_biases(model: nn.Module, groups: ParallelGroups) -> None:
    """Of the layers that follow their load. Collective over the world, where there are any such layers."""
    for layer in model.modules():
        following = _following.get(layer) if isinstance(layer, MoE) else None
        if following is None or not isinstance(layer, MoE):
            continue
        by_quantile = layer.options["expert_bias_update"] == "quantile"
        load = following.load
        if load is None:
            shape = (layer.options["num_experts"], *([BIAS_BINS] if by_quantile else []))
            load = torch.zeros(shape, device=next(layer.parameters()).device)
        load = load.double()
        others = groups.world if by_quantile else groups.expert_replicas
        if others.size > 1:
            others.on(load.device).all_reduce(load)
        layer.update_expert_bias(load, following.rate)
        following.load = None
