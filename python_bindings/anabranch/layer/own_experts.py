"""Experts that are not the core's: a module of one's own, or stacked experts with an activation of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import functional as F
from ..groups import Group


def route(x: Tensor, parts: dict[str, Tensor], options: str, group: str, training: bool, **given: Any) -> tuple[Any, ...]:
    """The layer's router: weights [T, top_k] with their gradients, losses, load, ids and histogram, as the operator has them."""
    weight, noise = parts["weight"], parts.get("noise_weight")
    found = torch.ops.anabranch.router(
        x, weight, noise, parts.get("expert_bias"), given["expert_ids"], given["padding_mask"], options, group, training
    )
    return found[:-1]


def load_of(expert_ids: Tensor, num_experts: int, group: Group, may_skip: bool) -> Tensor:
    """[num_experts] int64 assignments of each expert over all ranks of the group. Collective."""
    kept = expert_ids[expert_ids >= 0] if may_skip else expert_ids
    load = torch.bincount(kept.flatten(), minlength=num_experts).double()
    group.all_reduce(load)
    return load.long()


def through(
    experts: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    num_experts: int,
    group: str,
    may_skip: bool,
) -> Tensor:
    """x [T, h] to the experts' ranks, through `experts(rows [P, h], counts)`, and back: [T, h]. Collective."""
    plan = F.plan(expert_ids, weights, num_experts, group, may_skip)
    rows, values = F.dispatch(x, plan, weights)
    results = experts(F.permute(rows, plan), plan.expert_counts)
    if results.shape != (sum(plan.expert_counts.tolist()), x.shape[1]):
        raise ValueError(f"experts: the results are {tuple(results.shape)}, expected the rows' shape")
    return F.combine(F.unpermute(results, plan, values), plan)[0]


def stacked(parts: dict[str, Tensor], activation: Callable[[Tensor], Tensor], glu: bool, engine: str) -> Callable[..., Tensor]:
    """down(activation(up(x))) with the layer's own weights; glu: activation(gate) · up."""

    def project(rows: Tensor, name: str, counts: Tensor) -> Tensor:
        y = F.grouped_gemm(rows, parts[f"{name}_weight"], counts, engine)
        if f"{name}_bias" not in parts:
            return y
        return y + parts[f"{name}_bias"].repeat_interleave(counts.to(y.device), 0, output_size=y.shape[0])

    def experts(rows: Tensor, counts: Tensor) -> Tensor:
        hidden = project(rows, "up", counts)
        if glu:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activation(gate) * up
        else:
            hidden = activation(hidden)
        return project(hidden, "down", counts)

    return experts


_DIFFERENTIABLE = 8
"""Of the router's outputs the first: weights and losses."""


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, noise, *_ = inputs
    learned = [tensor for tensor in (x, weight, noise) if tensor is not None]
    ctx.has_noise = noise is not None
    ctx.save_for_backward(output[-1], *learned)
    ctx.mark_non_differentiable(*output[_DIFFERENTIABLE:])


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("router: the gradient cannot be differentiated again (create_graph=True)")
    state, *learned = ctx.saved_tensors
    found = torch.ops.anabranch.router_backward(list(gradients[:_DIFFERENTIABLE]), state, learned)
    return (*found, *([] if ctx.has_noise else [None]), *[None] * 7)


torch.library.register_autograd("anabranch::router_forward", _backward, setup_context=_setup)
