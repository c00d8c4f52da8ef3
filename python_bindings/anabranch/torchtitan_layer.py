"""Models of torchtitan over anabranch layers: its router, balance and shared experts, our experts and exchange."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.models.common import moe as torchtitan

from .groups import as_group
from .layer.held import first_expert
from .layer.moe import MoE


class RoutedExperts(torchtitan.RoutedExperts):
    """In the place of torchtitan's token dispatcher and grouped experts, whatever their kind. Collective."""

    def __init__(self, theirs: Any, group: object, dtensor: bool) -> None:
        nn.Module.__init__(self)
        weights = theirs.inner_experts
        gate, up, down = (_checked(name, getattr(weights, name)) for name in ("w1_EFD", "w3_EFD", "w2_EDF"))
        num_experts, inner, hidden = gate.shape
        self.inner_experts = MoE(
            hidden, inner, num_experts, top_k=1, activation="silu", glu=True, router=False, seed=0, group=group,
            dtensor=dtensor, device="meta", dtype=gate.dtype,
        ).to_empty(device=gate.device)  # fmt: skip
        self.inner_experts.__dict__["num_experts"] = num_experts  # what torchtitan asks of it
        experts = self.inner_experts.get_submodule("experts")
        first = first_expert(num_experts, self.inner_experts.group)
        with torch.no_grad():
            tensors = experts.tensors()  # type: ignore[operator]
            own = slice(first, first + tensors["up_weight"].shape[0])
            if gate.device.type != "meta":
                tensors["up_weight"].copy_(torch.cat([gate[own], up[own]], dim=1))
                tensors["down_weight"].copy_(down[own])

    def forward(self, x_BLD: Tensor, topk_scores_BLK: Tensor, topk_expert_ids_BLK: Tensor, counts: Tensor) -> Tensor:
        """[B, L, h], scores and ids [B, L, top_k] → [B, L, h]."""
        if isinstance(x_BLD, DTensor):
            raise ValueError("x is a DTensor: the experts' layer takes each rank's own tokens, without tensor parallelism")
        routing = topk_expert_ids_BLK.flatten(0, 1), topk_scores_BLK.flatten(0, 1)
        return self.inner_experts(x_BLD, routing=routing).output

    def parallelize(self, parallel_dims: Any) -> None:
        """The experts lie over their group already."""


def swap_experts(model: Any, group: object = None, dtensor: bool = False) -> Any:
    """Swaps what torchtitan's MoE layers send tokens by and compute experts with; returns the model, which keeps its
    routers, biases for balance and shared experts. In place; each rank keeps its experts.

    Args:
        model: built and initialised, the same on every rank, or on the meta device; before `parallelize` and FSDP.
        group: the expert-parallel group, as mesh["ep"]. Collective over it.
        dtensor: see `MoE`.

    ValueError for a model without such layers, and for weights that are sharded.
    """
    found = [module for module in model.modules() if isinstance(module, torchtitan.MoE)]
    if not found:
        raise ValueError(f"the model, a {type(model).__name__}, has no MoE of torchtitan")
    for module in found:
        if type(module.routed_experts.inner_experts) is not torchtitan.GroupedExperts:
            kind = type(module.routed_experts.inner_experts).__name__
            raise ValueError(f"the experts are {kind}, expected GroupedExperts, which compute down(silu(gate) · up)")
    ranks = group if dtensor else as_group(group)
    for module in found:
        module.routed_experts = RoutedExperts(module.routed_experts, ranks, dtensor)
    return model


def _checked(name: str, weight: Any) -> Tensor:
    if type(weight) is not nn.Parameter:
        raise ValueError(f"{name} is a {type(weight).__name__}, expected a plain parameter: swap before parallelize and FSDP")
    return weight
