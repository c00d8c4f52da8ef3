"""Checkpoints that any number of ranks can load: the files of the C++ library (safetensors and an index)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..layer.factors import by_expert
from ..layer.held import first_expert, held_experts
from ..layer.moe import MoE
from ..layer.spread import rows_of
from ..layer.wrappers import managed_by_fsdp1
from .gradients import ParallelGroups, only_group

Optimizers = Optimizer | Iterable[Optimizer] | None

Place = tuple[int, int, str]
"""This rank's first expert (place), how many experts all ranks have, 0 of replicated tensors, and their layer's options
where they are placed otherwise than in blocks."""
REPLICATED: Place = (0, 0, "")


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    metadata: dict[str, str] | None = None,
    groups: ParallelGroups | None = None,
) -> None:
    """Writes model (parameters and persistent buffers) and optimizer into `folder`, which all ranks must see.

    Each rank writes a file, and the index's replacement is the commit: a crash at any moment leaves the former
    checkpoint or this one. Experts are stored one by one, so any number of ranks can load them. Collective;
    RuntimeError on every rank if any fails, and the former checkpoint stands.

    Args:
        model: also as DistributedDataParallel or compiled; its names are those of the model within.
        optimizer: one, or several with parameters of their own, whose state is `step` and tensors of the parameters'
            shapes: AdamW, Adam, SGD, Muon and others of torch.
        metadata: texts to keep with it, rank 0's.
        groups: see `make_parallel_groups`; None where the layers' group is the whole world.
    """
    model = _within(model)
    groups = groups or only_group(model)
    contents, optimizers = _contents_of(model, groups), _listed(optimizer)
    for each in optimizers:
        for p in _updated(each, contents):
            for slot, value in each.state.get(p, {}).items():
                if value is not None:
                    contents.add_slot(p, slot, _checked_slot(each, contents.names[id(p)], slot, value, p))
    torch.ops.anabranch.save_checkpoint(
        os.fspath(folder), *contents.listed(), _kind(optimizers), json.dumps(metadata or {}), *_named(groups)
    )


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers = None,
    *,
    groups: ParallelGroups | None = None,
) -> dict[str, str]:
    """Loads what `save_checkpoint` wrote, here or in C++, at this or another number of ranks; returns its metadata.

    All or nothing: every file, name, type, shape and checksum is looked at before the first parameter is touched.
    The optimizer keeps its options and loses the state it had; without one the checkpoint's is left out.
    Collective; RuntimeError on every rank if any fails.
    """
    model = _within(model)
    groups = groups or only_group(model)
    world, expert_parallel = _named(groups)
    index, names, kind, metadata = torch.ops.anabranch.read_checkpoint_index(os.fspath(folder), world)
    contents, optimizers = _contents_of(model, groups), _listed(optimizer)
    if optimizers and kind != _kind(optimizers):
        raise RuntimeError(f"the checkpoint holds {kind or 'no optimizer'}, state was asked for {_kind(optimizers)}")
    slots = _stored_slots(names)
    states = [_room_for_state(each, contents, slots) for each in optimizers]
    torch.ops.anabranch.load_checkpoint(
        os.fspath(folder), index, *contents.listed(), bool(optimizers), world, expert_parallel
    )
    for each, state in zip(optimizers, states):
        for kept in state.values():
            if "step" in kept:
                kept["step"] = kept["step"].float()
        each.load_state_dict({**each.state_dict(), "state": state})
    return json.loads(metadata)


class _Contents:
    """A checkpoint's tensors as the operators take them, and where an expert's lie."""

    def __init__(self) -> None:
        self.names: dict[int, str] = {}
        """Of parameters, by their ids."""
        self._places: dict[int, Place] = {}
        self._views: dict[int, Callable[[Tensor], Tensor]] = {}
        """Of parameters whose rows are not experts: tensors of their shape as if they were."""
        self._all: list[tuple[str, Tensor, int, int, str]] = []

    def add(self, name: str, tensor: Tensor, place: Place = REPLICATED) -> None:
        self._all.append((name, rows_of(tensor.detach()), *place))

    def add_parameter(self, name: str, parameter: nn.Parameter, place: Place, view: Callable[[Tensor], Tensor] | None) -> None:
        self.names[id(parameter)] = name
        self._places[id(parameter)] = place
        if view is not None:
            self._views[id(parameter)] = view
        self._add_of(parameter, name, parameter, place)

    def _add_of(self, parameter: nn.Parameter, name: str, tensor: Tensor, place: Place) -> None:
        view = self._views.get(id(parameter)) if place[1] else None
        self.add(name, view(tensor.detach()) if view else tensor, place)

    def add_slot(self, parameter: nn.Parameter, slot: str, tensor: Tensor) -> None:
        place = REPLICATED if slot == "step" else self._places[id(parameter)]
        self._add_of(parameter, f"optimizer.{slot}.{self.names[id(parameter)]}", tensor, place)

    def refuse_names_of_optimizers(self) -> None:
        for name, *_ in self._all:
            if name.startswith("optimizer."):
                raise ValueError(f"the model's tensor {name} has a name of the optimizer's")

    def stored_names(self, parameter: nn.Parameter) -> set[str]:
        """What its slots are of: the name, and that of its first expert."""
        name = self.names[id(parameter)]
        head, dot, tail = name.rpartition(".")
        return {name, f"{head}{dot}0.{tail}"} if self._places[id(parameter)][1] else {name}

    def listed(self) -> tuple[list[Any], ...]:
        """Names, tensors, first experts, numbers of experts, layers' options."""
        return tuple(list(column) for column in zip(*self._all)) if self._all else ([], [], [], [], [])


def _within(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
            continue
        compiled = getattr(model, "_orig_mod", None)  # torch.compile's
        if not isinstance(compiled, nn.Module):
            return model
        model = compiled


def _place_of(layer: MoE) -> Place:
    num_experts = layer.options["num_experts"]
    if layer.options["placement"] == "blocks":
        return first_expert(num_experts, layer.group), num_experts, ""
    return held_experts(layer._options, layer.group)[0], num_experts, layer._options


def _contents_of(model: nn.Module, groups: ParallelGroups) -> _Contents:
    contents = _Contents()
    places: dict[int, Place] = {}
    views: dict[int, Callable[[Tensor], Tensor]] = {}
    for module in model.modules():
        if isinstance(module, MoE):
            place, experts = _place_of(module), module.get_submodule("experts")
            places |= {id(p): place for p in experts.parameters()}
            views |= by_expert(experts)
    flat = managed_by_fsdp1(model)
    for name, p in model.named_parameters():
        dtensor = isinstance(p, DTensor) and (id(p) not in places or p.device_mesh.size() != groups.expert_parallel.size)
        if dtensor or id(p) in flat:
            raise ValueError(f"{name} is sharded by FSDP: save_checkpoint and load_checkpoint take plain parameters")
        contents.add_parameter(name, p, places.get(id(p), REPLICATED), views.get(id(p)))
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                contents.add(f"{path}.{name}".lstrip("."), buffer)
    contents.refuse_names_of_optimizers()
    return contents


def _listed(optimizer: Optimizers) -> list[Optimizer]:
    if optimizer is None:
        return []
    several = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    return [_unwrapped(each) for each in several]


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The program's, of which Accelerate's is a wrapper."""
    within = getattr(optimizer, "optimizer", None)
    return within if isinstance(within, Optimizer) else optimizer


def _kind(optimizers: list[Optimizer]) -> str:
    return "+".join(type(each).__name__ for each in optimizers)


def _named(groups: ParallelGroups) -> tuple[str, str]:
    return groups.world.name, groups.expert_parallel.name


def _checked_slot(optimizer: Optimizer, name: str, slot: str, value: Any, parameter: nn.Parameter) -> Tensor:
    if slot == "step":
        return torch.as_tensor(value, device="cpu").to(torch.int64)
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dtype != parameter.dtype:
        raise ValueError(
            f"{type(optimizer).__name__} keeps {slot} of {name} in another form than the parameter's: save_checkpoint "
            "takes optimizers that keep `step` and tensors of the parameters' shapes and types"
        )
    return value


def _updated(optimizer: Optimizer, contents: _Contents) -> list[nn.Parameter]:
    """In the order of the optimizer's state_dict."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        if id(p) not in contents.names:
            raise ValueError(f"the optimizer updates a tensor of shape {tuple(p.shape)} that is no parameter of the model")
    return parameters


def _stored_slots(names: list[str]) -> dict[str, list[str]]:
    """What a checkpoint has of optimizers, by the stored name of the parameter."""
    slots: dict[str, list[str]] = {}
    for name in names:
        kind, _, rest = name.partition(".")
        slot, _, of = rest.partition(".")
        if kind == "optimizer":
            slots.setdefault(of, []).append(slot)
    return slots


def _room_for_state(optimizer: Optimizer, contents: _Contents, stored: dict[str, list[str]]) -> dict[int, dict[str, Tensor]]:
    """By the parameter's number in the optimizer's state_dict; part of `contents`."""
    state: dict[int, dict[str, Tensor]] = {}
    for number, p in enumerate(_updated(optimizer, contents)):
        for slot in sorted({slot for name in contents.stored_names(p) for slot in stored.get(name, [])}):
            room = torch.zeros((), dtype=torch.int64) if slot == "step" else torch.empty_like(p).detach()
            state.setdefault(number, {})[slot] = room
            contents.add_slot(p, slot, room)
    return state
