"""Gradients of models with expert-parallel layers, beside DDP, FSDP2, or on their own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..groups import Group, alone, as_group, split_group
from ..layer.moe import MoE
from ..layer.spread import rows_of
from ..layer.wrappers import averaged_by_ddp, ddp_refusal, fsdp_refusal, managed_by_fsdp1, spread_over
from .drift import digest, drift_of
from .step_ends import end_step

BUCKET_BYTES = 16 << 20
"""The least size of a message of gradients, where there are as many."""


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


def finish_gradients(
    model: nn.Module, groups: ParallelGroups | None = None, *, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Makes every gradient that of the mean of the ranks' losses: once a step, after its last backward and before
    whatever reads gradients: `scaler.unscale_`, clipping, the optimizer.

    Expert parameters already hold every token of their group: they are summed over their replicas and
    divided by the number of ranks. Other parameters are averaged over the world, unless DDP or FSDP do
    that. A gradient that is None on this rank counts as zero, and is a tensor afterwards; a parameter that
    requires none is left alone. Collective.

    Layers under `set_expert_bias_rate` have their routers' biases updated.

    Where an expert's gradient is not finite on some rank, gradients are not finite on any: every rank's
    GradScaler skips the step and lowers its scale.

    Args:
        model: also as DistributedDataParallel or FullyShardedDataParallel, or with parts under `fully_shard`.
        groups: see `make_parallel_groups`; None where the layers' group is the whole world.
        scaler: needed only where its `unscale_` was called before: what that found is then shared.

    ValueError where DDP or FSDP take spread experts for replicated, and for gradients that are finished already, or
    that a backward has added to since.
    """
    groups = groups or only_group(model)
    found = parameters_of(model, groups)
    world, replicas = found.groups_of(groups)
    end_step(model, groups)
    if world.size == 1:
        return

    def average(beside: list[Tensor]) -> Tensor:
        experts, replicated = gradients_of(found.experts), gradients_of(found.replicated)
        return torch.ops.anabranch.finish_gradients(
            experts, replicated, beside, world.name, replicas.name, BUCKET_BYTES
        )

    finish_by(average, model, found, groups, scaler)


def finish_by(
    average: Callable[[list[Tensor]], Tensor],
    model: nn.Module,
    found: Parameters,
    groups: ParallelGroups,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """`average` finishes the gradients of `found`'s experts and replicated parameters, replaces a few more tensors by
    their means, and returns [1]: NaN if an expert's gradient was not finite on some rank."""
    asked = found.replicas[0] if found.replicas else None
    drift = drift_of(model)
    with torch.no_grad():
        shards_of_experts = gradients_of(found.shards_of_experts)
        known = _nan_unless_finite(shards_of_experts)
        means = list(known)
        if asked is not None:
            drift.warn(asked[0])
            means.append(digest(asked[1]))
        not_finite = average(means)
        if asked is not None:
            drift.keep(means[-1])
        if known:  # FSDP has averaged them over the replicas
            for shard in shards_of_experts:
                shard.view(-1)[:1].add_(known[0] + not_finite)
            expert_parallel = groups.expert_parallel.on(known[0].device)
            torch.ops.anabranch.finish_gradients(
                shards_of_experts, [], [], expert_parallel.name, alone().name, BUCKET_BYTES
            )
        # A rank without experts has nothing else that tells its scaler.
        for gradient in [*gradients_of(found.averaged), *found.shards()][:1]:
            gradient.as_strided((1,), (1,)).add_(not_finite)
    for inf in _found_by(scaler):
        groups.world.all_reduce(inf)


def clip_gradient_norm(
    model: nn.Module,
    max_norm: float,
    groups: ParallelGroups | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
) -> float:
    """Scales finished gradients so that their norm over all ranks, each expert counted once, is at most
    `max_norm`; returns the norm before, the same on every rank. Collective.

    Args:
        model: not under FullyShardedDataParallel; parts under `fully_shard`, over all ranks of the world, or over as many
            as share one set of experts, with replicas of both (hybrid sharding).
        scaler: the GradScaler in use. Gradients that it has not unscaled yet are clipped as if it had, and the norm is
            that of unscaled ones; one that is not finite is returned, and the gradients are left for the scaler to
            skip.

    ValueError for a norm that is not finite (without a scaler), and for gradients that are not finished.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm = {max_norm}, expected more than 0")
    groups = groups or only_group(model)
    found = parameters_of(model, groups)
    ranks_of_a_copy = _ranks_of_a_copy(found, groups)
    world, _ = found.groups_of(groups)
    in_use = scaler is not None and scaler.is_enabled()
    norm = torch.ops.anabranch.clip_gradient_norm(
        gradients_of(found.experts + found.shards_of_experts) + found.shards(),
        gradients_of(found.replicated + found.averaged),
        world.name,
        ranks_of_a_copy,
        max_norm,
        scaler.get_scale() if scaler is not None and in_use and not _found_by(scaler) else 1.0,
    )
    if not math.isfinite(norm) and not in_use:
        raise ValueError(f"the gradient's norm is {norm}")
    return norm


def _found_by(scaler: torch.amp.GradScaler | None) -> list[Tensor]:
    """What its `unscale_` has found in this step, for each optimizer and device: > 0 if something is not finite."""
    if scaler is None or not scaler.is_enabled():
        return []
    return [found for state in scaler._per_optimizer_states.values() for found in state["found_inf_per_device"].values()]


def only_group(model: nn.Module) -> ParallelGroups:
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


Named = tuple[str, nn.Parameter]


@dataclasses.dataclass
class Parameters:
    """Those that require gradients, each with its name."""

    experts: list[Named] = dataclasses.field(default_factory=list)
    """Of this rank alone."""
    shards_of_experts: list[Named] = dataclasses.field(default_factory=list)
    """Of experts that `fully_shard` shards over their replicas."""
    sharded: list[Named] = dataclasses.field(default_factory=list)
    """What else FSDP shards, and averages."""
    replicated: list[Named] = dataclasses.field(default_factory=list)
    averaged: list[Named] = dataclasses.field(default_factory=list)
    """Replicated ones that DDP averages."""
    replicas: list[Named] = dataclasses.field(default_factory=list)
    """Parameters that are to be the same on all ranks, routers first."""

    def names(self) -> list[list[str]]:
        return [[name for name, _ in kind] for kind in vars(self).values()]

    def groups_of(self, groups: ParallelGroups) -> tuple[Group, Group]:
        """The world and the experts' replicas, for tensors where the gradients are."""
        parameters = self.experts or self.shards_of_experts or self.replicated or self.averaged or self.sharded
        device = parameters[0][1].device if parameters else torch.device("cpu")
        return groups.world.on(device), groups.expert_replicas.on(device)

    def shards(self) -> list[Tensor]:
        """This rank's parts of the gradients of `sharded`, those that there are and that hold numbers."""
        parts = [rows_of(p.grad) for _, p in self.sharded if p.grad is not None]
        return [part for part in parts if part.numel() > 0]


def gradients_of(parameters: list[Named]) -> list[Tensor]:
    """Of each; None has become zeros. Of DTensors this rank's part."""
    gradients = []
    for name, p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if p.grad.layout != torch.strided:
            raise ValueError(f"the gradient of {name} has layout {p.grad.layout}, expected a dense one")
        gradients.append(rows_of(p.grad))
    return gradients


def parameters_of(model: nn.Module, groups: ParallelGroups) -> Parameters:
    if type(model).__module__.partition(".")[0] == "deepspeed":
        raise TypeError(
            f"model is a {type(model).__name__} of DeepSpeed, which averages and partitions parameters as if they were the "
            "same on all ranks, and each rank has experts of its own: take fully_shard for the other parameters"
        )
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    experts = {id(p) for _, p in expert_parameters(model)}
    spread = set().union(*(spread_over(layer) for layer in layers))
    routers = {id(getattr(layer._modules.get("router"), "weight", None)) for layer in layers}
    by_ddp, by_fsdp1 = averaged_by_ddp(model), managed_by_fsdp1(model)
    found = Parameters()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_shard = isinstance(p, DTensor) or id(p) in by_fsdp1
        if id(p) in spread and (id(p) in by_ddp or (is_shard and not _is_spread_dtensor(p, groups))):
            raise ValueError(fsdp_refusal(name) if is_shard else ddp_refusal(name))
        if id(p) in routers and not is_shard and p.dim() != 2:
            raise ValueError(f"{name} is a flat shard of FSDP's: give the FullyShardedDataParallel model itself")
        if is_shard and id(p) not in spread:
            found.sharded.append((name, p))
            continue
        if isinstance(p, DTensor) and p.device_mesh.size() > groups.expert_parallel.size:
            found.shards_of_experts.append((name, p))
        elif id(p) in by_ddp:
            found.averaged.append((name, p))
        else:
            (found.experts if id(p) in experts else found.replicated).append((name, p))
        if id(p) not in experts:
            found.replicas.insert(0 if id(p) in routers else len(found.replicas), (name, p))
    return found


def _is_spread_dtensor(parameter: nn.Parameter, groups: ParallelGroups) -> bool:
    """Whether it is one of `dtensor=True`: over the ranks that share one set of experts, or by `fully_shard` over their
    replicas as well."""
    return (
        isinstance(parameter, DTensor)
        and parameter.placements[-1].is_shard(0)
        and parameter.device_mesh.size(-1) == groups.expert_parallel.size
    )


def _ranks_of_shards(name: str, parameter: nn.Parameter, groups: ParallelGroups) -> int:
    """How many consecutive ranks of the world have different shards; the next ones have the same again."""
    if not isinstance(parameter, DTensor):
        raise ValueError(f"{name} is sharded by FullyShardedDataParallel: clip_gradient_norm takes fully_shard's")
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = [not placement.is_replicate() for placement in placements]  # over two dimensions: _StridedShard
    if mesh.size() != groups.world.size or sharded != sorted(sharded) or not sharded[-1]:
        raise ValueError(
            f"{name} is a DTensor {placements} over {mesh.size()} of {groups.world.size} ranks: clip_gradient_norm takes "
            "those that fully_shard shards over all of them, or over parts of them that are replicas of each other"
        )
    return math.prod(size for size, is_sharded in zip(mesh.shape, sharded) if is_sharded)


def _ranks_of_a_copy(found: Parameters, groups: ParallelGroups) -> int:
    """Over how many ranks whatever is not replicated lies."""
    ranks = {_ranks_of_shards(name, p, groups): name for name, p in found.shards_of_experts + found.sharded}
    if found.experts:
        ranks.setdefault(groups.expert_parallel.size, "experts")
    if len(ranks) > 1:
        raise ValueError(
            "clip_gradient_norm takes one way to lie over ranks, and these differ: "
            + ", ".join(f"{name} over {size}" for size, name in ranks.items())
        )
    return next(iter(ranks), groups.expert_parallel.size)


def _nan_unless_finite(gradients: list[Tensor]) -> list[Tensor]:
    """One of [1]: 0, or NaN where a number in them is not finite; none for none."""
    filled = [gradient for gradient in gradients if gradient.numel()]
    if not gradients:
        return []
    if not filled:
        return [gradients[0].new_zeros(1, dtype=torch.float32)]
    largest = torch._foreach_norm(filled, math.inf)
    return [torch.stack([value.float() for value in largest]).mul(0).sum().reshape(1)]
