"""What routers do, under the names that dashboards know, and alarms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layer.moe import MoE, MoEOutput
from .replay import is_recomputing

LOSSES = {
    "moe/load_balancing_loss": "balance_loss",
    "moe/seq_load_balancing_loss": "sequence_balance_loss",
    "moe/global_load_balancing_loss": "global_balance_loss",
    "moe/z_loss": "z_loss",
    "moe/importance_loss": "importance_loss",
    "moe/load_loss": "load_loss",
}
"""By metric: the field of MoEOutput."""


class RouterMetrics:
    """Collects from every layer of a model what its forwards return, from when it is made until `close`.

    `read` gives the means since the last `read`, over forwards in training mode, micro-batches alike, as a dictionary
    of numbers: each metric as its mean over layers, and as `name/layer_N` of each, N the layer's place in the model:

    ==============================  =====================================================================
    moe/load_balancing_loss         `balance_loss`: 1 in perfect balance
    moe/seq_load_balancing_loss     `sequence_balance_loss`
    moe/z_loss                      `z_loss`
    moe/importance_loss, load_loss  the noisy gate's
    moe/cv                          coefficient of variation of the experts' load: 0 in perfect balance
    moe/max_load                    the fullest expert's load over the mean
    moe/entropy                     of the load, over log E: 1 in perfect balance
    ==============================  =====================================================================

    What it collects stays on the device, and costs no wait; `read` waits. What checkpointing runs again is not counted
    again. Losses and load are those of the layer's group: the same on each of its ranks.

    Args:
        alarm: called with a text where something is wrong; by default a warning. An expert is dead that has had no
            token in `dead_after` consecutive `read`s; a router has collapsed whose entropy is below `collapsed_below`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alarm: Callable[[str], None] | None = None,
        dead_after: int = 100,
        collapsed_below: float = 0.5,
    ) -> None:
        self._names = [name for name, layer in model.named_modules() if isinstance(layer, MoE)]
        if not self._names:
            raise ValueError("RouterMetrics: the model has no layer of anabranch")
        self._alarm = alarm or (lambda text: warnings.warn(text, stacklevel=4))
        self._dead_after, self._collapsed_below = dead_after, collapsed_below
        self._sums: list[dict[str, Tensor]] = [{} for _ in self._names]
        self._forwards = [0] * len(self._names)
        self._idle: list[Tensor | None] = [None] * len(self._names)
        self._told: set[tuple[int, int]] = set()
        layers = [model.get_submodule(name) for name in self._names]
        self._handles = [
            layer.register_forward_hook(lambda layer, args, out, place=place: self._keep(place, layer, out))
            for place, layer in enumerate(layers)
        ]

    def close(self) -> None:
        """Collects no more."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, place: int, layer: nn.Module, out: MoEOutput) -> None:
        if not layer.training or is_recomputing():
            return
        with torch.no_grad():
            sums = self._sums[place]
            found = {name: getattr(out, field) for name, field in LOSSES.items()} | {"load": out.expert_load}
            for name, value in found.items():
                if value is not None:
                    # Not in place: a graph may hold the tensor.
                    sums[name] = sums[name] + value.detach() if name in sums else value.detach().clone()
            self._forwards[place] += 1

    def read(self) -> dict[str, float]:
        """The metrics since the last call; empty where nothing has run."""
        metrics: dict[str, list[tuple[int, float]]] = {}
        for place, sums in enumerate(self._sums):
            if not self._forwards[place]:
                continue
            load = sums.pop("load").double().cpu()
            found = {name: total.item() / self._forwards[place] for name, total in sums.items()} | _of_load(load)
            self._watch(place, load, found["moe/entropy"])
            for name, value in found.items():
                metrics.setdefault(name, []).append((place, value))
        self._sums = [{} for _ in self._names]
        self._forwards = [0] * len(self._names)
        result = {name: sum(value for _, value in of_layers) / len(of_layers) for name, of_layers in metrics.items()}
        for name, of_layers in metrics.items():
            result |= {f"{name}/layer_{place}": value for place, value in of_layers}
        return result

    def _watch(self, place: int, load: Tensor, entropy: float) -> None:
        if not load.sum() > 0:
            return
        idle = self._idle[place]
        idle = torch.where(load > 0, 0, 1 if idle is None else idle + 1)
        self._idle[place] = idle
        for expert in idle.eq(self._dead_after).nonzero().flatten().tolist():
            self._alarm(f"{self._names[place]}: expert {expert} is dead: no token in {self._dead_after} reads")
        collapsed = (place, -1)
        if entropy < self._collapsed_below and collapsed not in self._told:
            self._told.add(collapsed)
            fullest = int(load.argmax())
            self._alarm(
                f"{self._names[place]}: the router has collapsed: its load's entropy is {entropy:.2f} of that of balance, "
                f"expert {fullest} has {load[fullest] / load.sum():.0%} of all assignments"
            )
        elif entropy >= self._collapsed_below:
            self._told.discard(collapsed)


def _of_load(load: Tensor) -> dict[str, float]:
    """Of [E] fp64, on the host."""
    mean = load.mean()
    if not mean > 0:
        return {"moe/cv": 0.0, "moe/max_load": 1.0, "moe/entropy": 1.0}
    share = load / load.sum()
    entropy = -(share * share.clamp_min(1e-300).log()).sum().item()
    return {
        "moe/cv": (load.std(correction=0) / mean).item(),
        "moe/max_load": (load.max() / mean).item(),
        "moe/entropy": entropy / math.log(len(load)) if len(load) > 1 else 1.0,
    }


def log_to_tensorboard(metrics: RouterMetrics, writer: Any, step: int) -> None:
    """Writes what `metrics.read()` gives to a `torch.utils.tensorboard.SummaryWriter`."""
    for name, value in metrics.read().items():
        writer.add_scalar(name, value, step)


def log_to_wandb(metrics: RouterMetrics, run: Any, step: int | None = None) -> None:
    """Gives what `metrics.read()` gives to a run of Weights & Biases, or the `wandb` module itself."""
    run.log(metrics.read(), step=step)


def log_to_trainer(trainer: Any, **options: Any) -> RouterMetrics:
    """Has transformers' Trainer log the metrics with its loss: to its history and to all that it reports to.

    Args:
        options: of `RouterMetrics`.
    """
    metrics, log = RouterMetrics(trainer.model, **options), trainer.log

    def with_metrics(logs: dict[str, float], *more: Any, **others: Any) -> None:
        log({**logs, **metrics.read()} if "loss" in logs else logs, *more, **others)

    trainer.log = with_metrics
    return metrics
