"""Gradients of models with expert-parallel layers, beside DDP, FSDP2, or on their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .groups import Group, alone, as_group, split_group
from .moe import MoE


@dataclasses.dataclass(frozen=True)
class ParallelGroups:
    """Expert parallelism inside data parallelism. Members may be whatever `as_group` takes."""

    world: Group
    """All ranks that share the batch."""
    expert_parallel: Group
    """Those that share one set of experts: the layers' group."""
    expert_replicas: Group
    """Those that hold the same experts as this one."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, as_group(getattr(self, field.name)))
        if self.expert_parallel.size * self.expert_replicas.size != self.world.size:
            raise ValueError(
                f"{self.world.size} ranks are not {self.expert_replicas.size} replicas of "
                f"{self.expert_parallel.size} expert-parallel ranks"
            )


def make_parallel_groups(expert_parallel_size: int = 0, world: object = None) -> ParallelGroups:
    """The world's ranks in groups of `expert_parallel_size` consecutive ones (0: all). Collective.

    `MoE(group=groups.expert_parallel)`, then `finish_gradients(model, groups)`.
    """
    all_ranks = as_group(world)
    size = expert_parallel_size or all_ranks.size
    if size < 1 or all_ranks.size % size:
        raise ValueError(f"expert_parallel_size = {size} does not divide the {all_ranks.size} ranks of the world")
    if size == all_ranks.size:
        return ParallelGroups(all_ranks, all_ranks, alone())
    return ParallelGroups(
        all_ranks,
        split_group(all_ranks, f"blocks of {size}", all_ranks.rank // size),
        split_group(all_ranks, f"every {size}th", all_ranks.rank % size),
    )


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of what is spread over ranks: each rank has its own experts."""
    for path, module in model.named_modules():
        if isinstance(module, MoE):
            yield from module.get_submodule("experts").named_parameters(prefix=f"{path}.experts".lstrip("."))


def ignore_expert_parameters(model: nn.Module) -> nn.Module:
    """Has DistributedDataParallel leave the experts of `model` alone: to be called before `DDP(model)`.

    DDP then neither broadcasts nor averages them; `finish_gradients` does what is left to do. For FSDP2:
    `fully_shard(module, ignored_params={p for _, p in expert_parameters(module)})`.
    """
    names = [name for name, _ in expert_parameters(model)]
    already = list(getattr(model, "_ddp_params_and_buffers_to_ignore", []))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, already + names)
    return model


def finish_gradients(model: nn.Module, groups: ParallelGroups | None = None) -> None:
    """Makes every gradient that of the mean of the ranks' losses: after backward, before the optimizer.

    Expert parameters already hold every token of their group: they are summed over their replicas and
    divided by the number of ranks. Other parameters are averaged over the world, unless DDP or FSDP2 do
    that. A gradient that is None on this rank counts as zero, and is a tensor afterwards; a parameter that
    requires none is left alone. Collective.

    Args:
        model: also as DistributedDataParallel, or with parts under `fully_shard`.
        groups: see `make_parallel_groups`; None where the layers' group is the whole world.
    """
    torch.ops.anabranch.check()
    groups = groups or _only_group(model)
    experts, replicated = _with_gradients(model, leave_averaged=True)
    world = groups.world
    with torch.no_grad():
        average = torch.ops.anabranch.average_gradients
        average(replicated, world.on(_device(replicated)).name, world.size)
        average(experts, groups.expert_replicas.on(_device(experts)).name, world.size)


def clip_gradient_norm(model: nn.Module, max_norm: float, groups: ParallelGroups | None = None) -> float:
    """Scales finished gradients so that their norm over all ranks, each expert counted once, is at most
    `max_norm`; returns the norm before, the same on every rank. Collective. ValueError for a norm that is
    not finite."""
    if not max_norm > 0:
        raise ValueError(f"max_norm = {max_norm}, expected more than 0")
    groups = groups or _only_group(model)
    experts, replicated = _with_gradients(model, leave_averaged=False)
    world = groups.world.on(_device(experts or replicated))
    norm = torch.ops.anabranch.gradient_norm(experts, replicated, world.name, groups.expert_parallel.size)
    if not norm < float("inf"):
        raise ValueError(f"the gradient's norm is {norm}")
    if norm > max_norm:
        torch._foreach_mul_(experts + replicated, max_norm / norm)
    return norm


def _only_group(model: nn.Module) -> ParallelGroups:
    """For layers whose group is the whole world."""
    layers = [module.group for module in model.modules() if isinstance(module, MoE)]
    world = as_group()
    if not layers:
        layers = [world]
    for group in layers:
        if group.size != layers[0].size or (world.size > 1 and group.size != world.size):
            raise ValueError(
                f"layers' groups have {group.size} ranks, the world has {max(world.size, layers[0].size)}: "
                "give the groups (make_parallel_groups)"
            )
    return ParallelGroups(layers[0], layers[0], alone())


def _with_gradients(model: nn.Module, leave_averaged: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of experts, and of other parameters; with `leave_averaged` without those that DDP or FSDP2
    average. None becomes zeros."""
    experts = {id(parameter) for _, parameter in expert_parameters(model)}
    averaged = _averaged_by_ddp(model) if leave_averaged else set()
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, DTensor):
            if not leave_averaged:
                raise ValueError(f"{name} is a DTensor (FSDP2): clip_gradient_norm takes plain parameters")
            continue
        if id(parameter) in experts & averaged:
            raise ValueError(f"DDP averages the experts' {name}: call ignore_expert_parameters(model) before DDP(model)")
        if id(parameter) in averaged:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name} has layout {parameter.grad.layout}, expected a dense one")
        found[0 if id(parameter) in experts else 1].append(parameter.grad)
    return found


def _averaged_by_ddp(model: nn.Module) -> set[int]:
    averaged: set[int] = set()
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            ignored = module.parameters_to_ignore
            averaged |= {id(p) for name, p in module.module.named_parameters() if name not in ignored}
    return averaged


def _device(gradients: list[Tensor]) -> torch.device:
    return gradients[0].device if gradients else torch.device("cpu")
