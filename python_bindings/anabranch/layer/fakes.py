"""Shapes and types of the operators' results, for torch.compile, export and meta tensors."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from .. import _library  # noqa: F401
from .plan import PlanTensors
from .wrappers import refuse_active_ddp


def _gate_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _on_one_device(**tensors: Tensor | None) -> None:
    """Meta tensors among others would have results made up that nothing fills."""
    kinds = {name: tensor.device.type for name, tensor in tensors.items() if tensor is not None}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"tensors must be on one device: {', '.join(f'{n} on {k}' for n, k in kinds.items())}")


BIAS_BINS = 1000
"""The core's kBiasBins."""


@torch.library.register_fake("anabranch::moe")
def _moe(x: Tensor, parameters: list[Tensor], expert_ids, weights, padding_mask, may_skip, options, group, training, losses, probe):
    _on_one_device(x=x, parameters=parameters[-1], expert_ids=expert_ids, weights=weights, padding_mask=padding_mask)
    refuse_active_ddp()
    of_router = _gate_type(parameters[-1].dtype)

    def loss(exists: bool) -> Tensor:
        return x.new_empty(() if exists else (0,), dtype=of_router)

    routed = weights is None
    summed = routed and losses
    given = json.loads(options)
    noisy = summed and given.get("gate") == "noisy_top_k"
    coefficients = {name: given.get(f"{name}_coefficient", 0) > 0 for name in ("balance", "sequence_balance", "z")}
    means = summed and given.get("global_balance_coefficient", 0) > 0
    experts = given["num_experts"]
    width = given["top_k"] if given.get("gate") != "expert_choice" or not training else experts
    if expert_ids is not None and given.get("gate") == "expert_choice":
        width = expert_ids.shape[-1]
    chosen = (x.numel() // x.shape[-1], width) if routed else (0,)
    counted = routed and training and given.get("expert_bias_update") == "quantile"
    return (
        x.new_empty(x.shape),
        loss(summed),
        loss(summed),
        loss(noisy),
        loss(noisy),
        loss(summed and coefficients["sequence_balance"]),
        loss(summed and any(coefficients.values())),
        x.new_empty((experts if means else 0,), dtype=of_router),
        x.new_empty((experts,), dtype=torch.int64),
        x.new_empty(chosen, dtype=torch.int64),
        x.new_empty(chosen, dtype=of_router),
        x.new_empty((experts, BIAS_BINS) if counted else (0,), dtype=torch.int64),
    )


@torch.library.register_fake("anabranch::moe_forward")
def _moe_forward(x, parameters, *of_layer_and_needs_gradient):
    state = torch.empty((1,), dtype=torch.uint8, device="cpu")
    return (*_moe(x, parameters, *of_layer_and_needs_gradient[:-1]), state)


@torch.library.register_fake("anabranch::router_forward")
def _router_forward(x, weight, noise_weight, expert_bias, expert_ids, padding_mask, options, group, training, needs_gradient):
    nothing = x.new_empty((0, 0, 0))  # of the layer's type, in the place of experts
    found = _moe(x, [weight, nothing], expert_ids, None, padding_mask, False, options, group, training, True, None)
    _, *losses, load, ids, weights, histogram = found
    return (weights, *losses, load, ids, histogram, torch.empty((1,), dtype=torch.uint8, device="cpu"))


@torch.library.register_fake("anabranch::router_backward")
def _router_backward(gradients, state, inputs):
    return [each.new_empty(each.shape) for each in inputs]


@torch.library.register_fake("anabranch::load_of_step")
def _load_of_step(before, own, training, replicas):
    return own.new_empty(own.shape)


@torch.library.register_fake("anabranch::moe_backward")
def _moe_backward(gradients, state, probe, inputs, read):
    return [each.new_empty(each.shape) for each in inputs]


@torch.library.register_fake("anabranch::route_forward")
def _route_forward(logits, top_k, renormalize, needs_gradient):
    tokens, experts = logits.shape
    return (
        logits.new_empty((tokens, top_k)),
        logits.new_empty((experts,)),
        logits.new_empty(()),
        logits.new_empty((tokens, top_k), dtype=torch.int64),
        logits.new_empty((experts,), dtype=torch.int64),
        torch.empty((1,), dtype=torch.uint8, device="cpu"),
    )


@torch.library.register_fake("anabranch::route_backward")
def _route_backward(gradients, state, logits):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("anabranch::plan")
def _plan(expert_ids, weights, num_experts, group, may_skip=False):
    """What reaches this rank is known when the ranks have told each other."""
    _on_one_device(expert_ids=expert_ids, weights=weights)
    rank, ranks, _ = torch.ops.anabranch.describe_group(group)
    local = num_experts // ranks + (rank < num_experts % ranks)
    tokens, top_k = expert_ids.shape
    context = torch.library.get_ctx()
    sent, row_offsets, assignments = (context.new_dynamic_size(min=least) for least in (0, 1, 0))

    def on_host(size):
        return torch.empty((size,), dtype=torch.int64, device="cpu")

    def indices(size):
        return expert_ids.new_empty((size,), dtype=torch.int64)

    return [
        *PlanTensors(
            send_rows=on_host(ranks),
            receive_rows=on_host(ranks),
            send_assignments=on_host(ranks),
            receive_assignments=on_host(ranks),
            expert_counts=on_host(local),
            send_tokens=indices(sent),
            token_offsets=indices(tokens + 1),
            token_rows=indices(sent),
            send_order=indices(tokens * top_k),
            received_order=indices(assignments),
            assignment_rows=indices(assignments),
            row_offsets=indices(row_offsets),
            row_assignments=indices(assignments),
        )
    ]


def _rows(plan: list[Tensor]) -> int:
    return PlanTensors(*plan).row_offsets.shape[0] - 1


def _assignments(plan: list[Tensor]) -> int:
    return PlanTensors(*plan).assignment_rows.shape[0]


@torch.library.register_fake("anabranch::dispatch")
def _dispatch(rows, values, plan, top_k, num_experts, group):
    _on_one_device(rows=rows, values=values, plan=PlanTensors(*plan).send_tokens)
    found = rows.new_empty((_rows(plan), rows.shape[1]))
    return found, rows.new_empty((0,)) if values is None else values.new_empty((_assignments(plan),))


@torch.library.register_fake("anabranch::combine")
def _combine(rows, values, plan, top_k, num_experts, group):
    _on_one_device(rows=rows, values=values, plan=PlanTensors(*plan).send_tokens)
    tokens = PlanTensors(*plan).token_offsets.shape[0] - 1
    found = rows.new_empty((tokens, rows.shape[1]))
    return found, rows.new_empty((0,)) if values is None else values.new_empty((tokens, top_k))


@torch.library.register_fake("anabranch::permute")
def _permute(rows, plan):
    _on_one_device(rows=rows, plan=PlanTensors(*plan).send_tokens)
    return rows.new_empty((_assignments(plan), rows.shape[1]))


@torch.library.register_fake("anabranch::unpermute")
def _unpermute(assignments, weights, plan):
    _on_one_device(assignments=assignments, weights=weights, plan=PlanTensors(*plan).send_tokens)
    return assignments.new_empty((_rows(plan), assignments.shape[1]))


@torch.library.register_fake("anabranch::grouped_gemm")
def _grouped_gemm(x, weight, counts, engine):
    _on_one_device(x=x, weight=weight)
    return x.new_empty((x.shape[0], weight.shape[1]))


@torch.library.register_fake("anabranch::grouped_gemm_dgrad")
def _grouped_gemm_dgrad(dy, weight, counts, engine):
    return dy.new_empty((dy.shape[0], weight.shape[2]))


@torch.library.register_fake("anabranch::grouped_gemm_wgrad")
def _grouped_gemm_wgrad(dy, x, counts, engine):
    return x.new_empty((counts.shape[0], dy.shape[1], x.shape[1]))


@torch.library.register_fake("anabranch::orthogonalize")
def _orthogonalize(matrices, iterations):
    return matrices.new_empty(matrices.shape)
