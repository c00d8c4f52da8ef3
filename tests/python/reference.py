"""A dense Mixture-of-Experts in plain PyTorch, in fp64 on the CPU: every expert computes every token."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "identity": lambda x: x,
}


@dataclasses.dataclass
class Options:
    top_k: int
    activation: str = "gelu_tanh"
    glu: bool = False
    renormalize: bool = True
    limit: float = torch.inf
    offset: float = 0.0


@dataclasses.dataclass
class Result:
    output: Tensor
    balance_loss: Tensor | None
    z_loss: Tensor | None
    load: Tensor
    expert_ids: Tensor
    weights: Tensor


def route(logits: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [T, E], ids and weights [T, top_k]; the largest first, ties to the lowest expert."""
    probabilities = logits.softmax(-1)
    order = torch.sort(-probabilities, dim=-1, stable=True).indices
    ids = order[:, : options.top_k]
    weights = probabilities.gather(1, ids)
    if options.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return probabilities, ids, weights


def feed_forward(x: Tensor, parameters: dict[str, Tensor], prefix: str, expert: int, options: Options) -> Tensor:
    hidden = x @ parameters[prefix + "up_weight"][expert].T
    if prefix + "up_bias" in parameters:
        hidden = hidden + parameters[prefix + "up_bias"][expert]
    act = ACTIVATIONS[options.activation]
    if options.glu:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = act(gate.clamp(max=options.limit)) * (up.clamp(-options.limit, options.limit) + options.offset)
    else:
        hidden = act(hidden.clamp(max=options.limit))
    y = hidden @ parameters[prefix + "down_weight"][expert].T
    return y + parameters[prefix + "down_bias"][expert] if prefix + "down_bias" in parameters else y


def mix(x: Tensor, parameters: dict[str, Tensor], ids: Tensor, weights: Tensor, options: Options) -> Tensor:
    """x [T, h] → [T, h], with all experts' parameters."""
    experts = parameters["experts.up_weight"].shape[0]
    of_expert = torch.zeros(x.shape[0], experts, dtype=x.dtype).scatter(1, ids, weights)
    y = sum(
        (of_expert[:, e : e + 1] * feed_forward(x, parameters, "experts.", e, options) for e in range(experts)),
        torch.zeros_like(x),
    )
    if "shared_expert.up_weight" in parameters:
        y = y + feed_forward(x, parameters, "shared_expert.", 0, options)
    return y


def moe(
    x: Tensor, parameters: dict[str, Tensor], options: Options, routing: tuple[Tensor, Tensor] | None = None
) -> Result:
    tokens = x.reshape(-1, x.shape[-1])
    experts = parameters["experts.up_weight"].shape[0]
    balance_loss = z_loss = None
    if routing is None:
        logits = tokens @ parameters["router.weight"].T
        probabilities, ids, weights = route(logits, options)
    else:
        ids, weights = routing
    load = torch.bincount(ids.flatten(), minlength=experts)
    if routing is None:
        count = max(tokens.shape[0], 1)
        balance_loss = experts * (load.to(x.dtype) / (count * options.top_k) * probabilities.sum(0) / count).sum()
        z_loss = logits.logsumexp(-1).square().sum() / count
    y = mix(tokens, parameters, ids, weights, options)
    return Result(y.reshape(x.shape), balance_loss, z_loss, load, ids, weights)
