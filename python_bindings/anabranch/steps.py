"""Before an optimizer's step: whether the gradients of experts are finished, and every rank's own."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .layer.spread import rows_of

REFUSE = True
"""Whether a step with experts' gradients that `finish_gradients` has not finished is a RuntimeError. False for
programs that finish them otherwise."""

_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hooks: list[Any] = []


def watch(layer: nn.Module) -> None:
    """For a layer whose experts are spread over several ranks; the first one has the hook installed."""
    _layers.add(layer)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))


def is_watched(layer: nn.Module) -> bool:
    return layer in _layers


def refuse_slices(optimizer: Optimizer) -> None:
    """For optimizers that take a matrix as a whole: ValueError where a rank has slices of one."""
    for layer in list(_layers):
        in_slices = layer.options["placement"] != "blocks" and layer.get_extra_state()[:, 2].gt(1).any()  # type: ignore
        if in_slices and _held_by(optimizer, list(layer.get_submodule("experts").parameters())):
            raise ValueError(f"{type(optimizer).__name__} of experts in slices: it takes a matrix as a whole, expected AdamW")


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not REFUSE or torch.compiler.is_compiling():
        return
    experts = [p for layer in list(_layers) for p in layer.get_submodule("experts").parameters()]
    _refuse_partition(optimizer, experts)
    trained = {id(p): rows_of(p.grad) for p in experts if type(p.grad) in (Tensor, DTensor)}  # type: ignore[arg-type]
    if torch.ops.anabranch.gradients_are_finished(list(trained.values())):
        return
    held = [trained[id(p)] for p in _held_by(optimizer, experts) if id(p) in trained]
    unfinished = [gradient for gradient in held if not torch.ops.anabranch.gradients_are_finished([gradient])]
    if any(bool(gradient.any()) for gradient in unfinished):  # torch's state_dict helpers make a step with zeros
        raise RuntimeError(
            "the optimizer's step would use gradients of experts that are not those of the mean of the ranks' losses: "
            "call anabranch.finish_gradients(model) after the last backward and before the step, and change what it "
            "has finished in place. (anabranch.steps.REFUSE = False if the program finishes them otherwise.)"
        )


def _held_by(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in parameters if id(p) in held]


def _refuse_partition(optimizer: Optimizer, experts: list[nn.Parameter]) -> None:
    """ZeroRedundancyOptimizer steps each parameter on one rank and sends it to the others."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer) and _held_by(optimizer, experts):
        raise RuntimeError(
            "ZeroRedundancyOptimizer would overwrite each rank's experts with another's: give it the other parameters, "
            "and those of anabranch.expert_parameters(model) to an optimizer of their own"
        )
