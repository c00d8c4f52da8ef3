"""Experts that move between steps, so that the ranks have equal loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layer.moe import MoE


@dataclass
class ExpertMoves:
    """What has been moved since a mover was made."""

    experts: int = 0
    """That have gone to another place, of all ranks."""
    choices: int = 0
    """Times at which moves were looked for."""


class ExpertMover:
    """Places experts anew by their loads: after every `interval` steps those of each layer are swapped between ranks, of
    one node first, each rank holding as many as before, and their weights and optimizer states go where they are to
    lie. Training is what it would have been within rounding; `save_checkpoint` keeps experts by their numbers. For
    layers with `placement="movable"` or lists of whole experts. ::

        mover = anabranch.ExpertMover(model, optimizer, interval=1000)
        ...
        optimizer.step()
        optimizer.zero_grad()
        mover.after_step([out.expert_load for out in outs])

    Args:
        model: whose `MoE` layers' experts move; each layer within its own group.
        optimizer: torch's, or None. What it keeps of a parameter in the parameter's shape moves along.
        interval: steps between choices.
        least_gain: what moves must take off the fullest rank's load, else all stay where they are.
        node: of this rank, whose experts rather move within: an NVLink domain. "": what the launcher says.
        beside: other tensors in an expert parameter's shape that go with it, such as fp32 masters; their states in
            `optimizer` move as well.

    Making one and `after_step` are collective.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        interval: int = 1000,
        least_gain: float = 0.05,
        node: str = "",
        beside: Callable[[nn.Parameter], Iterable[Tensor]] = lambda parameter: (),
    ) -> None:
        if interval < 1:
            raise ValueError(f"ExpertMover: interval = {interval}, expected at least 1")
        if not 0 <= least_gain < 1:
            raise ValueError(f"ExpertMover: least_gain = {least_gain}, expected 0 ≤ least_gain < 1")
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        for layer in self.layers:
            if layer.options["placement"] in ("blocks", "sliced"):
                raise ValueError(
                    f"ExpertMover: a layer's placement is {layer.options['placement']!r}, expected movable or lists of "
                    "whole experts"
                )
        self.optimizer, self.interval, self.least_gain, self.beside = optimizer, interval, least_gain, beside
        self.moves = ExpertMoves()
        self._nodes = [torch.ops.anabranch.nodes_of_ranks(layer.group.name, node) for layer in self.layers]
        self._steps = 0
        self._loads: list[Tensor] | None = None

    def after_step(self, loads: Sequence[Tensor]) -> bool:
        """After each step, when gradients have been dropped, and before the next forward. `loads`: each layer's
        `out.expert_load` [E], in the order of `model.modules()`, in data parallelism summed over the replicas of the
        experts. The host waits for the device after every `interval` steps alone. Whether anything was moved, alike
        on all ranks."""
        if len(loads) != len(self.layers):
            raise ValueError(f"ExpertMover: loads of {len(loads)} layers, expected {len(self.layers)}")
        before = self._loads
        self._loads = [load.clone() if before is None else before[i].add_(load) for i, load in enumerate(loads)]
        self._steps += 1
        if self._steps % self.interval:
            return False
        sums, self._loads = self._loads, None
        self.moves.choices += 1
        moved = [self._move(*each) for each in zip(self.layers, sums, self._nodes)]
        self.moves.experts += sum(moved)
        return any(moved)

    def _move(self, layer: MoE, load: Tensor, nodes: list[int]) -> int:
        to = torch.ops.anabranch.moved_placement(layer._options, load.tolist(), nodes, self.least_gain)
        tensors = [tensor for p in layer.get_submodule("experts").parameters() for tensor in self._of(p)]
        moved = torch.ops.anabranch.move_experts(layer._options, to, tensors, layer._group)
        if moved:
            layer._place(to)
        return moved

    def _of(self, parameter: nn.Parameter) -> list[Tensor]:
        """The parameter, and what has a row for each of its experts."""
        if parameter.grad is not None:
            raise ValueError("ExpertMover: an expert has a gradient, expected zero_grad() before after_step()")
        found = [parameter.detach(), *(tensor.detach() for tensor in self.beside(parameter))]
        for key in (parameter, *self.beside(parameter)):
            state = self.optimizer.state.get(key, {}) if self.optimizer is not None else {}
            values = (state[name] for name in sorted(state))
            found += [value for value in values if isinstance(value, Tensor) and value.shape == parameter.shape]
        return found
