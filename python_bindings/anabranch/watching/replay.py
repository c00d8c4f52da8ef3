"""Routing that is recorded and taken again: train with the experts that a rollout chose, and see who went where."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from typing import IO, Any

import torch
from torch import Tensor, nn

from ..layer.moe import MoE, MoEOutput

OWN_CHOICE = -2
"""In the first place of a token's ids: the router chooses for it."""


@dataclasses.dataclass
class RoutingRecord:
    """The experts of each layer's forwards, in their order; of this rank's tokens."""

    expert_ids: dict[str, list[Tensor]]
    """By the layer's name in the model: [T, top_k] int64 of each forward."""

    def to(self, device: torch.device | str) -> RoutingRecord:
        """On another device: a record of many forwards is kept on the host."""
        return RoutingRecord({name: [ids.to(device) for ids in all_ids] for name, all_ids in self.expert_ids.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """For `load`, in another process: one file a rank."""
        torch.save(self.to("cpu").expert_ids, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingRecord:
        """What `save` wrote."""
        return cls(torch.load(path, weights_only=True))


def layers_of(model: nn.Module) -> dict[str, MoE]:
    """The layers of a model by their names, those with a router of their own."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MoE) and layer.has_router}


def is_recomputing() -> bool:
    """Whether this forward is run again by a backward, as checkpointing does."""
    return torch._C._current_graph_task_id() != -1


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Keeps the experts of every forward of the model's layers while it lasts. What checkpointing runs again is
    not kept again; nor is a forward with routing from outside."""
    layers = layers_of(model)
    record = RoutingRecord({name: [] for name in layers})

    def keep(name: str, out: MoEOutput) -> None:
        if out.expert_ids is not None and not is_recomputing():
            record.expert_ids[name].append(out.expert_ids)

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(lambda layer, args, out, name=name: keep(name, out))
            hooks.callback(handle.remove)
        yield record


class _Replay:
    """What one layer is given, forward after forward; what backward runs again gets its own again, in order."""

    def __init__(self, name: str, expert_ids: list[Tensor], mask: Tensor | None) -> None:
        self.name, self.expert_ids, self.mask = name, expert_ids, mask
        self.forwards = self.recomputed = 0

    def next(self, layer: MoE) -> Tensor:
        again = is_recomputing()
        place = self.recomputed if again else self.forwards
        if place >= len(self.expert_ids):
            raise RuntimeError(f"replay_routing: {self.name} has run {place + 1} times, the record has {place} forwards")
        if again:
            self.recomputed += 1
        else:
            self.forwards += 1
        ids = self.expert_ids[place].to(next(layer.parameters()).device)
        if self.mask is None:
            return ids
        return ids.masked_fill(~self.mask.reshape(-1, 1).to(ids.device), OWN_CHOICE)


@contextlib.contextmanager
def replay_routing(model: nn.Module, record: RoutingRecord, mask: Tensor | None = None) -> Iterator[None]:
    """The layers take the record's experts, forward after forward, while it lasts; their routers weigh them, with
    gradients and losses. Backward belongs into it where checkpointing runs forwards again, in the order of the
    forwards. RuntimeError for more forwards than the record has.

    Args:
        mask: bool, one for each token of a forward: true takes the record's experts, false the router's own choice.
    """
    layers = layers_of(model)
    if layers.keys() != record.expert_ids.keys():
        raise ValueError(f"replay_routing: the record is of {list(record.expert_ids)}, the model has {list(layers)}")

    def given(layer: nn.Module, args: Any, kwargs: dict[str, Any], replay: _Replay) -> tuple[Any, dict[str, Any]]:
        if not isinstance(layer, MoE) or len(args) > 1 or kwargs.get("routing") is not None:
            raise ValueError(f"replay_routing: {replay.name} is given its routing from outside")
        return args, {**kwargs, "expert_ids": replay.next(layer)}

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            replay = _Replay(name, record.expert_ids[name], mask)
            handle = layer.register_forward_pre_hook(
                lambda layer, args, kwargs, replay=replay: given(layer, args, kwargs, replay), with_kwargs=True
            )
            hooks.callback(handle.remove)
        yield


@contextlib.contextmanager
def trace_routing(model: nn.Module, path: str | os.PathLike[str]) -> Iterator[None]:
    """Appends a line of JSON for every forward of a layer: its name, the forward's number, this rank of its group,
    and `expert_ids` and `expert_weights`, [T, top_k]. Each waits for the device. One file a rank."""
    layers = layers_of(model)
    forwards = dict.fromkeys(layers, 0)

    def write(file: IO[str], name: str, layer: MoE, out: MoEOutput) -> None:
        if out.expert_ids is None or out.expert_weights is None or is_recomputing():
            return
        line = {"layer": name, "forward": forwards[name], "rank": layer.group.rank}
        line |= {"expert_ids": out.expert_ids.tolist(), "expert_weights": out.expert_weights.tolist()}
        file.write(json.dumps(line) + "\n")
        forwards[name] += 1

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "a", encoding="utf-8"))
        for name, layer in layers.items():
            handle = layer.register_forward_hook(lambda layer, args, out, name=name: write(file, name, layer, out))
            stack.callback(handle.remove)
        yield
