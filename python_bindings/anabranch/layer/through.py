"""The way of a step's tokens through a layer, by the core's operator or by experts of one's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import own_experts
from .wrappers import refuse_active_ddp

if TYPE_CHECKING:
    from .moe import MoE


class MoEOutput(NamedTuple):
    """What a layer returns; in an evaluation without losses, see `MoE.evaluation_losses`."""

    output: Tensor
    """The input's shape and type."""
    balance_loss: Tensor | None
    """[] E · Σ_e f_e · P_e over the group's whole batch, 1 in perfect balance; None with routing from outside."""
    z_loss: Tensor | None
    """[] mean_t logsumexp(logits[t])² over the group's whole batch; None with routing from outside."""
    expert_load: Tensor
    """[num_experts] int64: assignments of each expert over all ranks of the group; in an evaluation of this rank's tokens."""
    importance_loss: Tensor | None = None
    """[] squared coefficient of variation of the experts' sums of weights; None but for the noisy gate."""
    load_loss: Tensor | None = None
    """[] the same of their smooth load (arXiv:1701.06538, eq. 11); None but for the noisy gate."""
    sequence_balance_loss: Tensor | None = None
    """[] mean over the group's sequences of each one's balance loss; None without `sequence_balance_coefficient`."""
    auxiliary_loss: Tensor | None = None
    """[] Σ of the losses that have a coefficient, times it; None where none has."""
    expert_ids: Tensor | None = None
    """[T, top_k] int64: where this rank's tokens went, in row-major order; −1 for none."""
    expert_weights: Tensor | None = None
    """[T, top_k] with what weights; without a gradient, but for a routing from outside."""
    mean_probabilities: Tensor | None = None
    """[num_experts] P_e over the group's whole batch, differentiable; None without `global_balance_coefficient`."""
    global_balance_loss: Tensor | None = None
    """[] E · Σ_e F_e · P_e with F_e the share of all assignments since the step began; None without its coefficient."""
    bias_histogram: Tensor | None = None
    """[num_experts, 1000] int64 of this rank's tokens: what their experts' biases would have had to be, between the least
    bias − 1 and the largest + 1; None but in training with `expert_bias_update="quantile"`."""


class Given(NamedTuple):
    """Where tokens go, as far as that is not the router's choice; see `MoE.forward`."""

    expert_ids: Tensor | None
    weights: Tensor | None
    padding_mask: Tensor | None
    may_skip: bool


class Through:
    """The way of a step's rows through a layer, when the experts' parameters are known."""

    def __init__(self, layer: MoE, parts: dict[str, dict[str, Tensor]], given: Given) -> None:
        self.layer = layer
        self.given = given
        self._parts = parts

    @property
    def routing(self) -> tuple[Tensor, Tensor] | None:
        """From outside, ids and weights; None: the layer's own router's."""
        ids, weights = self.given.expert_ids, self.given.weights
        return None if ids is None or weights is None else (ids, weights)

    def __call__(self, x: Tensor, experts: dict[str, Tensor]) -> MoEOutput:
        layer, given, options = self.layer, self.given, self.layer._options
        if not layer.has_router and given.expert_ids is not None:
            options = f'{{"top_k": {given.expert_ids.shape[-1]}, {layer._other_options[1:]}'
        if not torch.compiler.is_compiling():
            refuse_active_ddp()
        if layer._own_experts or layer._own_activation is not None:
            return self._output_of(self._by_own_experts(x, experts, options))
        parameters = layer._parameter_list({**self._parts, "experts": experts}, x)
        if x.device.type != parameters[-1].device.type:
            raise ValueError(f"x is on {x.device}, the layer on {parameters[-1].device}")
        losses = layer.training or layer.evaluation_losses or layer.options["receive_capacity"] > 0
        return self._output_of(
            torch.ops.anabranch.moe(
                x, parameters, *given, options, layer._group, layer.training, losses, layer._probe.tensor
            )
        )

    def _output_of(self, found: tuple[Any, ...]) -> MoEOutput:
        """Of what the operator returns, in which losses that there are not are empty."""
        layer = self.layer
        output, *losses, load, ids, weights, histogram = found
        losses = [None if loss is None or loss.numel() == 0 else loss for loss in losses]
        balance, z, importance, of_load, of_sequences, auxiliary, means = losses
        of_step = None
        if means is not None:
            of_step = self._global_balance(means, load)
            loss = layer.options["global_balance_coefficient"] * of_step
            auxiliary = loss if auxiliary is None else auxiliary + loss
        if self.given.weights is not None:
            ids, weights = self.given.expert_ids, self.given.weights
        if auxiliary is not None and layer.options["attach_losses"] and layer.training:
            output = torch.ops.anabranch.attach_loss(output, auxiliary, layer.attached_loss_scale)
        histogram = None if histogram is None or histogram.numel() == 0 else histogram
        more = (means, of_step, histogram)
        return MoEOutput(output, balance, z, load, importance, of_load, of_sequences, auxiliary, ids, weights, *more)

    def _global_balance(self, means: Tensor, load: Tensor) -> Tensor:
        layer = self.layer
        if layer._step_load is None:
            layer._step_load = torch.zeros_like(load)
        of_step = torch.ops.anabranch.load_of_step(layer._step_load, load, layer.training, layer._replicas_group)
        return torch.ops.anabranch.global_balance_loss(means, of_step)

    def _by_own_experts(self, x: Tensor, parameters: dict[str, Tensor], options: str) -> tuple[Any, ...]:
        """What the operator returns, by experts or an activation that the core does not know."""
        layer, own = self.layer, self.layer.options
        expert_ids, weights, padding_mask, may_skip = self.given
        losses: list[Any] = [None] * 7
        histogram = None
        if weights is None:
            chance = own["gate"] in ("gshard", "expert_choice")  # a token has fewer experts, or more
            may_skip = expert_ids is not None or padding_mask is not None or chance
            given = {"expert_ids": expert_ids, "padding_mask": padding_mask}
            routed = own_experts.route(x, self._parts["router"], options, layer._group, layer.training, **given)
            weights, *losses, load, expert_ids, histogram = routed
        else:
            assert expert_ids is not None
            load = own_experts.load_of(expert_ids, own["num_experts"], layer.group, may_skip)
            weights = weights.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        rows = x.reshape(-1, x.shape[-1])
        if own["latent_size"]:
            rows = nn.functional.linear(rows, self._parts[""]["latent_down"])
        if layer._own_activation is None:
            experts: Any = layer.get_submodule("experts")
        else:
            experts = own_experts.stacked(parameters, layer._own_activation, own["glu"], own["engine"])
        output = own_experts.through(experts, rows, expert_ids, weights, own["num_experts"], layer._group, may_skip)
        if own["latent_size"]:
            output = nn.functional.linear(output, self._parts[""]["latent_up"])
        return (output.view(x.shape), *losses, load, expert_ids, weights.detach(), histogram)


def checked_routing(routing: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if not isinstance(routing, (tuple, list)) or len(routing) != 2 or not all(isinstance(r, Tensor) for r in routing):
        raise TypeError(f"routing is {routing!r:.80}, expected a pair of tensors, expert ids and weights [T, top_k]")
    if routing[0].dim() != 2:
        raise ValueError(f"routing: expert ids are {tuple(routing[0].shape)}, expected [T, top_k]")
    return routing[0], routing[1]
