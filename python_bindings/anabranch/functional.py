"""The stages of a layer as functions with autograd, for layers of other kinds.

T tokens and W ranks; R rows reach this rank, each token at most once; P of their assignments belong to its
experts. A layer of one's own::

    expert_ids, weights, *_ = F.route(x.float() @ gate.T, top_k=2)
    plan = F.plan(expert_ids, weights, num_experts, group)
    rows, values = F.dispatch(x, plan, weights)              # [R, h], [P]
    hidden = F.grouped_gemm(F.permute(rows, plan), up, plan.expert_counts)
    results = F.grouped_gemm(hidden.relu(), down, plan.expert_counts)
    y, _ = F.combine(F.unpermute(results, plan, values), plan)  # [T, h]

plan, dispatch and combine are collective, and so are their backwards: every rank of the group takes part.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .groups import as_group
from .layer import fakes  # noqa: F401
from .layer.plan import PlanTensors

__all__ = [
    "Plan",
    "PlanTensors",
    "RouteResult",
    "combine",
    "dispatch",
    "grouped_gemm",
    "permute",
    "plan",
    "route",
    "unpermute",
]


class RouteResult(NamedTuple):
    """Where tokens go."""

    expert_ids: Tensor
    """[T, top_k] int64, largest probability first; ties go to the lowest expert."""
    weights: Tensor
    """[T, top_k], differentiable."""
    counts: Tensor
    """[E] int64: assignments of each expert on this rank."""
    probability_sum: Tensor
    """[E]: Σ_t softmax(logits)[t, e], differentiable."""
    squared_logsumexp_sum: Tensor
    """[]: Σ_t logsumexp(logits[t])², differentiable."""


class Plan(NamedTuple):
    """Who sends which rows to whom; made once, used in both directions."""

    tensors: PlanTensors
    top_k: int
    num_experts: int
    group: str

    @property
    def expert_counts(self) -> Tensor:
        """[experts of this rank] int64 in host memory: assignments of each, Σ = P."""
        return self.tensors.expert_counts


def route(logits: Tensor, top_k: int, renormalize: bool = True) -> RouteResult:
    """Softmax and top-k of logits [T, E], fp32 or fp64."""
    weights, probability_sum, squared_logsumexp_sum, expert_ids, counts = torch.ops.anabranch.route(logits, top_k, renormalize)
    return RouteResult(expert_ids, weights, counts, probability_sum, squared_logsumexp_sum)


def plan(expert_ids: Tensor, weights: Tensor, num_experts: int, group: object = None, may_skip: bool = False) -> Plan:
    """Plans the exchange of this rank's T tokens for `expert_ids` [T, top_k] int64, distinct within a token, and
    `weights` [T, top_k] fp32 or fp64. `may_skip`, the same on all ranks: an id of −1 is no assignment. The host waits
    for the counts here. Collective; a routing that is not valid on any rank is an error on all."""
    name = group if isinstance(group, str) else _name_of(group, expert_ids.device)
    tensors = torch.ops.anabranch.plan(expert_ids, weights.detach(), num_experts, name, may_skip)
    return Plan(PlanTensors(*tensors), expert_ids.shape[1], num_experts, name)


def _name_of(group: object, device: torch.device) -> str:
    return as_group(group).on(device).name


# What torch.compiler.assume_constant_result sets. Its call imports the whole compiler, for a second.
_name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def dispatch(rows: Tensor, plan: Plan, values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Sends rows [T, h], and a value of each assignment [T, top_k], to the experts: [R, h] and [P]. Collective."""
    found, of_assignments = torch.ops.anabranch.dispatch(rows, values, *_arguments(plan))
    return found, None if values is None else of_assignments


def combine(rows: Tensor, plan: Plan, values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Sends rows [R, h], and values [P], back: [T, h], the rows of a token summed, and [T, top_k]. The adjoint
    of dispatch. Collective."""
    found, of_slots = torch.ops.anabranch.combine(rows, values, *_arguments(plan))
    return found, None if values is None else of_slots


def permute(rows: Tensor, plan: Plan) -> Tensor:
    """Received rows [R, h] into expert-major order [P, h]: a row for each assignment."""
    return torch.ops.anabranch.permute(rows, plan.tensors)


def unpermute(assignments: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Expert-major rows [P, h] into received rows [R, h], each the sum of its assignments', weighted by `weights`
    [P] where given. Without weights the adjoint of permute."""
    return torch.ops.anabranch.unpermute(assignments, weights, plan.tensors)


def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor, engine: str = "auto") -> Tensor:
    """Each expert's own rows times its own weight: x [P, k], weight [experts, n, k] → [P, n].

    Expert e has the `counts[e]` rows after those of experts 0..e−1; counts are int64 in host memory, may be 0,
    and sum to P. Accumulates in fp32 (fp64).
    """
    return torch.ops.anabranch.grouped_gemm(x, weight, counts, engine)


def _arguments(plan: Plan) -> tuple[PlanTensors, int, int, str]:
    return plan.tensors, plan.top_k, plan.num_experts, plan.group


# Autograd: adjoints of each other.


def _route_setup(ctx, inputs, output):
    ctx.save_for_backward(output[5], inputs[0])
    ctx.mark_non_differentiable(*output[3:])


def _refuse_double_backward(name):
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name}: the gradient cannot be differentiated again (create_graph=True)")


def _route_backward(ctx, dweights, dprobability_sum, dsquared_logsumexp_sum, *_):
    _refuse_double_backward("route")
    state, logits = ctx.saved_tensors
    gradients = [dweights, dprobability_sum, dsquared_logsumexp_sum]
    return torch.ops.anabranch.route_backward(gradients, state, logits), None, None, None


def _exchange_setup(ctx, inputs, output):
    _, values, plan, ctx.top_k, ctx.num_experts, ctx.group = inputs
    ctx.with_values = values is not None
    ctx.save_for_backward(*plan)


def _adjoint_of_exchange(operator):
    def backward(ctx, drows, dvalues):
        plan = list(ctx.saved_tensors)
        values = dvalues if ctx.with_values else None
        dinput, dinput_values = operator(drows, values, plan, ctx.top_k, ctx.num_experts, ctx.group)
        return dinput, dinput_values if ctx.with_values else None, [None] * len(plan), None, None, None

    return backward


def _permute_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1])


def _permute_backward(ctx, drows):
    plan = list(ctx.saved_tensors)
    return torch.ops.anabranch.unpermute(drows, None, plan), [None] * len(plan)


def _unpermute_setup(ctx, inputs, output):
    assignments, weights, plan = inputs
    ctx.with_weights = weights is not None
    ctx.save_for_backward(*([assignments, weights] if ctx.with_weights else []), *plan)


def _unpermute_backward(ctx, drows):
    if not ctx.with_weights:
        plan = list(ctx.saved_tensors)
        return torch.ops.anabranch.permute(drows, plan), None, [None] * len(plan)
    assignments, weights, *plan = ctx.saved_tensors
    of_assignments = torch.ops.anabranch.permute(drows, plan)
    dweights = (of_assignments.to(weights.dtype) * assignments.to(weights.dtype)).sum(-1)
    dassignments = (of_assignments.to(weights.dtype) * weights.unsqueeze(-1)).to(assignments.dtype)
    return dassignments, dweights, [None] * len(plan)


def _gemm_setup(ctx, inputs, output):
    x, weight, counts, ctx.engine = inputs
    ctx.save_for_backward(x, weight, counts)


def _gemm_backward(ctx, dy):
    _refuse_double_backward("grouped_gemm")
    x, weight, counts = ctx.saved_tensors
    operators = torch.ops.anabranch
    dx = operators.grouped_gemm_dgrad(dy, weight, counts, ctx.engine) if ctx.needs_input_grad[0] else None
    dweight = operators.grouped_gemm_wgrad(dy, x, counts, ctx.engine) if ctx.needs_input_grad[1] else None
    return dx, dweight, None, None


def _register(name, backward, setup):
    torch.library.register_autograd(f"anabranch::{name}", backward, setup_context=setup)


_register("route_forward", _route_backward, _route_setup)
_register("dispatch", _adjoint_of_exchange(torch.ops.anabranch.combine), _exchange_setup)
_register("combine", _adjoint_of_exchange(torch.ops.anabranch.dispatch), _exchange_setup)
_register("permute", _permute_backward, _permute_setup)
_register("unpermute", _unpermute_backward, _unpermute_setup)
_register("grouped_gemm", _gemm_backward, _gemm_setup)
