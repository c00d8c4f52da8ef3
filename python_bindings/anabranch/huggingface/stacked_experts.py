"""Stacked experts of transformers' models: what they compute and how their weights lie, in the layer's words."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..layer.activations import ACTIVATIONS, activation_name


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a family's weights lie. The layer's are [E, out, in], rows of the gate before those of up."""

    glu: bool
    bias: bool
    transposed: bool
    """[E, in, out]."""
    interleaved: bool
    """Rows of gate and up alternate."""

    @property
    def names(self) -> dict[str, str]:
        """Of the family's tensors, and of the layer's for those of this rank."""
        weights = {"gate_up_proj" if self.glu else "up_proj": "up", "down_proj": "down"}
        found = {theirs: f"{ours}_weight" for theirs, ours in weights.items()}
        if self.bias:
            found |= {f"{theirs}_bias": f"{ours}_bias" for theirs, ours in weights.items()}
        return found

    def to_layer(self, name: str, values: Tensor) -> Tensor:
        """A tensor of the family's, by its name there, as the layer has it."""
        if self.transposed and values.dim() == 3:
            values = values.transpose(1, 2)
        if self.interleaved and name.startswith("gate_up"):
            values = torch.cat([values[:, ::2], values[:, 1::2]], dim=1)
        return values

    def to_family(self, name: str, values: Tensor) -> Tensor:
        """The way back."""
        if self.interleaved and name.startswith("gate_up"):
            values = torch.stack(values.chunk(2, dim=1), dim=2).flatten(1, 2)
        if self.transposed and values.dim() == 3:
            values = values.transpose(1, 2)
        return values.contiguous()


def recognised(name: str, experts: Any, ranks: int = 1) -> tuple[Layout, dict[str, Any]]:
    """The layout of a module of stacked experts, and what it computes as arguments of `MoE`.

    Known by transformers' interface for them, use_experts_implementation: down(activation(gate) · up), both within
    limits and with an offset where the family has them, or down(activation(up)), weighted by the routing in the end. ValueError, with the module's name and the reason,
    for experts that compute something else, or whose weights are no plain parameters, nor DTensors with rows on `ranks`.
    """
    from transformers.integrations import moe

    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"{name}: the experts, {type(experts).__name__}, {reason}; convert cannot swap them")

    gating = getattr(type(experts), "_apply_gate", None)
    glu = bool(getattr(experts, "has_gate", hasattr(experts, "gate_up_proj")))
    if gating is None or not hasattr(experts, "is_transposed"):
        refuse("do not follow transformers' interface for experts (use_experts_implementation)")
    if getattr(experts, "has_post_expert_norm", False):
        refuse("have a norm behind each expert")
    layout = Layout(
        glu, bool(experts.has_bias), bool(experts.is_transposed), glu and not getattr(experts, "is_concatenated", True)
    )
    if glu and gating is not moe._default_apply_gate:
        computed = _gating_of(experts, layout)
        if computed is None:
            refuse("have a gating of their own (_apply_gate) instead of activation(gate) · up")
    else:
        activation = activation_name(experts.act_fn)
        if activation is None:
            refuse(f"have the activation {experts.act_fn!r}, expected one of {', '.join(ACTIVATIONS)}")
        computed = {"activation": activation}
    for weight in layout.names:
        _check_parameter(f"{name}.{weight}", getattr(experts, weight, None), ranks)
    return layout, computed


def _gating_of(experts: Any, layout: Layout) -> dict[str, Any] | None:
    """What an `_apply_gate` of the family's own computes, by its values; None: nothing that a layer computes."""
    limit = float(getattr(experts, "limit", None) or getattr(experts, "swiglu_limit", None) or 0.0)
    reach = torch.linspace(-2 * (limit or 3), 2 * (limit or 3), 41, dtype=torch.float64)
    gate, up = (values.reshape(1, -1) for values in torch.meshgrid(reach, reach, indexing="ij"))
    together = torch.stack([gate, up], -1).flatten(1) if layout.interleaved else torch.cat([gate, up], -1)
    try:
        with torch.no_grad():
            values = experts._apply_gate(together)
    except (TypeError, RuntimeError):  # it takes more than gate and up, or other sizes
        return None
    for name, activation in ACTIVATIONS.items():
        for offset in (0.0, 1.0):
            for most in {0.0, limit}:
                bound = most or torch.inf
                ours = activation(gate.clamp(max=bound)) * (up.clamp(-bound, bound) + offset)
                if torch.allclose(values.double(), ours, rtol=1e-6, atol=1e-6):
                    return {"activation": name, "activation_limit": most, "glu_offset": offset}
    return None


def _check_parameter(name: str, weight: Any, ranks: int) -> None:
    is_spread = isinstance(weight, DTensor) and weight.placements == (Shard(0),) and weight.device_mesh.size() == ranks
    if type(weight) is not nn.Parameter and not is_spread:
        raise ValueError(
            f"{name} is a {type(weight).__name__}, expected a plain parameter: quantized, adapted or sharded models "
            "cannot be converted. Convert first, then adapt"
        )
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        raise ValueError(f"{name} has hooks, which are for all experts. Convert first, then hook the layer's parameters")
