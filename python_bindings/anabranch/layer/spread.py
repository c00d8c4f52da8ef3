"""Experts as DTensors: one tensor [num_experts, …] over the group's ranks, of which each has its rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor, Shard

from ..groups import Group


def local_part(tensor: Tensor) -> Tensor:
    """This rank's rows of a DTensor, differentiable; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def rows_of(tensor: Tensor) -> Tensor:
    """The same without autograd: always the same object, whose memory is the tensor's."""
    return local_part(tensor)


def mesh_of(source: object, group: Group, device: torch.device, asked: str = "dtensor=True") -> DeviceMesh:
    """Of one dimension, over the ranks of `group`, which was made from `source`. `asked`: what needs it."""
    if isinstance(source, DeviceMesh):
        return source
    made_from: object = group
    while isinstance(made_from, Group) and made_from.size == group.size:
        made_from = made_from.source
    if not isinstance(made_from, dist.ProcessGroup) or made_from.size() != group.size:
        raise ValueError(
            f"{asked} with group = {group}, expected a DeviceMesh of one dimension or a torch.distributed process "
            "group, over which DTensors can lie"
        )
    kind = device.type if device.type != "meta" else "cuda" if torch.cuda.is_available() else "cpu"
    return DeviceMesh.from_group(made_from, kind)


def check_equal_shares(num_experts: int, mesh: DeviceMesh) -> None:
    """ValueError where a DTensor would have the experts on other ranks than a layer has."""
    ranks, most = mesh.size(), -(-num_experts // mesh.size())
    ours = [num_experts // ranks + (rank < num_experts % ranks) for rank in range(ranks)]
    theirs = [min(most, max(0, num_experts - rank * most)) for rank in range(ranks)]
    if ours != theirs:
        raise ValueError(
            f"dtensor=True with {num_experts} experts over {ranks} ranks, which have {ours} of them, where a DTensor's "
            f"would have {theirs}: take a multiple of the ranks"
        )


def spread(rows: Tensor, num_experts: int, mesh: DeviceMesh) -> DTensor:
    """`rows`: this rank's experts of `num_experts`."""
    check_equal_shares(num_experts, mesh)
    return DTensor.from_local(
        rows, mesh, [Shard(0)], run_check=False, shape=torch.Size((num_experts, *rows.shape[1:])), stride=rows.stride()
    )
