"""Muon for matrices, a rank's experts in one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .. import _library  # noqa: F401
from ..steps import refuse_slices


def _of_this_rank(tensor: Tensor) -> Tensor:
    """Whole matrices: of experts that are a DTensor, those that are here."""
    if not isinstance(tensor, DTensor):
        return tensor
    if any(isinstance(place, Shard) and place.dim >= tensor.ndim - 2 for place in tensor.placements):
        raise ValueError(f"Muon needs whole matrices, got a DTensor of {tuple(tensor.shape)} placed {tensor.placements}")
    return tensor.to_local()


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is orthogonalized before it becomes a step (Jordan 2024, Nesterov's).

    Of a parameter [.., m, n] the last two dimensions are a matrix, so each expert's weight is one of its own,
    whichever rank holds it: equal at any number of ranks. For the matrices of hidden layers alone; embedding,
    head, norms and biases belong to AdamW. The step is 0.2 · √max(m, n) times the orthogonalized momentum,
    as large as AdamW's usually is: both take one learning rate. The gradients are to be finished before. ::

        matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name]
        optimizer = anabranch.Muon(matrices, lr=1e-3)

    parts: a parameter is so many matrices one below the other (2: gate and up of a GLU), by group.
    Parameters of 16 bits are updated in fp32 and rounded; their momentum is of fp32.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        iterations: int = 5,
        parts: int = 1,
    ) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0 or iterations < 1:
            raise ValueError(
                "Muon needs lr >= 0, 0 <= momentum < 1, weight_decay >= 0 and iterations >= 1, "
                f"got {lr}, {momentum}, {weight_decay} and {iterations}"
            )
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, iterations=iterations, parts=parts)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            if parameter.ndim < 2 or group["parts"] < 1 or parameter.shape[-2] % group["parts"]:
                raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is not {group['parts']} matrices")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        refuse_slices(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        value = _of_this_rank(parameter)
        wide = torch.float64 if value.dtype == torch.float64 else torch.float32
        gradient = _of_this_rank(grad).to(wide)
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=wide)
        momentum = _of_this_rank(state["momentum_buffer"])
        momentum.mul_(group["momentum"]).add_(gradient)
        direction = gradient + momentum * group["momentum"]
        matrices = direction.reshape(-1, direction.shape[-2] // group["parts"], direction.shape[-1])
        step = torch.ops.anabranch.orthogonalize(matrices, group["iterations"]).view(direction.shape)
        rate = group["lr"] * 0.2 * math.sqrt(max(matrices.shape[-2:]))
        kept = value.to(wide) * (1 - group["lr"] * group["weight_decay"])
        value.copy_(kept - rate * step)
