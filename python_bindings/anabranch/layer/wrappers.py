"""What DistributedDataParallel and FSDP do to parameters: known, and refused where ranks' experts would mix."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..steps import is_watched
from .parts import Experts

_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def averaged_by_ddp(model: nn.Module) -> set[int]:
    """Ids of the parameters that the DDP modules within `model` average."""
    averaged: set[int] = set()
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            ignored = module.parameters_to_ignore
            averaged |= {id(p) for name, p in module.module.named_parameters() if name not in ignored}
    return averaged


def managed_by_fsdp1(model: nn.Module) -> set[int]:
    """Ids of the parameters of which the FullyShardedDataParallel modules within `model` keep flat shards."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    managed: set[int] = set()
    for module in model.modules():
        if isinstance(module, fsdp):
            ignored = {id(p) for p in getattr(module, "_ignored_params", ())}
            managed |= {id(p) for p in module.parameters()} - ignored
    return managed


def spread_over(layer: nn.Module) -> set[int]:
    """Ids of the parameters that are this rank's alone: of experts that are spread over several ranks."""
    return {id(p) for p in layer.get_submodule("experts").parameters()} if is_watched(layer) else set()


def ddp_refusal(name: str) -> str:
    return (
        f"DistributedDataParallel takes {name}, each rank's own experts, for the same on all ranks: call "
        "anabranch.ignore_expert_parameters(model) before DistributedDataParallel(model)"
    )


def fsdp_refusal(name: str) -> str:
    return (
        f"FSDP would shard {name}, each rank's own experts, as if they were the same on all ranks. Leave them out: "
        "experts = {p for _, p in anabranch.expert_parameters(model)}, then fully_shard(model, ignored_params=experts), "
        "or FullyShardedDataParallel(model, ignored_states=experts, use_orig_params=True); or have them as DTensors "
        "(dtensor=True), which fully_shard takes over the replicas' mesh"
    )


def refuse_active_ddp() -> None:
    """In a layer's forward: ValueError where the DDP module that it runs in takes spread experts for replicated.
    It has overwritten them with rank 0's."""
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is None or active in _seen:
        return
    averaged = averaged_by_ddp(active)
    for path, module in active.module.named_modules():
        if spread_over(module) & averaged:
            raise ValueError(ddp_refusal(f"{path}.experts".lstrip(".")))
    _seen.add(active)


def ddp_around(model: nn.Module) -> nn.Module:
    """The DistributedDataParallel in whose forward layers of `model` have been, or the model itself."""
    return next((ddp for ddp in _seen if ddp.module is model), model)


class SpreadExperts(Experts):
    """Those of experts that are spread over several ranks. Refuses what FSDP sets in their place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and (hasattr(value, "placements") or self._is_flat_shard(name, value)):
            raise ValueError(fsdp_refusal(f"experts.{name}"))
        super().__setattr__(name, value)

    def _is_flat_shard(self, name: str, value: Tensor) -> bool:
        """FSDP1 marks the modules it takes, makes parameters of theirs flat, or sets views in their place."""
        return bool(self.__dict__.get("_is_fsdp_managed_module")) and (
            not isinstance(value, nn.Parameter) or value.dim() != (2 if name.endswith("bias") else 3)
        )
