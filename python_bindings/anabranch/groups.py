"""Groups of ranks, from whatever a program has: torch.distributed, a DeviceMesh, mpi4py, nothing."""

from __future__ import annotations

import atexit
import datetime
from typing import Any

import torch
import torch.distributed as dist

from .discovery import discover_rank
from .info import transports

DEADLINE = datetime.timedelta(minutes=5)
"""How long one collective may wait for a peer before it ends in an error that names it."""


class Group:
    """Ranks that can exchange tensors. Made by `as_group`; every rank makes the same ones in the same order."""

    def __init__(self, name: str, source: object = None) -> None:
        self.name = name
        """What operators call it by."""
        self.source = source
        """What it was made from, kept alive."""
        self.rank, self.size, self.kind = torch.ops.anabranch.describe_group(name)
        self._serves_gpus = self.kind in ("self", "nccl") or not _by_nccl(source)

    def __repr__(self) -> str:
        return f"Group({self.name!r}, rank {self.rank} of {self.size}, {self.kind})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a group of running ranks cannot be pickled: save the state_dict instead")

    def on(self, device: torch.device) -> Group:
        """The same ranks for tensors on `device`: on a GPU through the library's own communicator over NCCL, but
        for a process group that does not use NCCL itself. Collective where that takes another communicator."""
        if device.type != "cuda" or self._serves_gpus:
            return self
        name = f"{self.name}@{device}"
        if name not in _groups:
            operators = torch.ops.anabranch
            _groups[name] = Group(operators.nccl_group(name, self.name, device, DEADLINE.total_seconds()), self)
        return _groups[name]

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` with the sum over ranks, 16-bit types summed in fp32. Collective; no gradient."""
        torch.ops.anabranch.all_reduce(tensor, self.on(tensor.device).name)


def _by_nccl(source: object) -> bool:
    """Whether ranks of that source move GPU memory by NCCL: a process group, only where it does so too."""
    if isinstance(source, Group):
        return _by_nccl(source.source)
    if isinstance(source, dist.ProcessGroup):
        return "nccl" in dist.get_backend_config(source) and "nccl" in transports()
    return True


_groups: dict[str, Group] = {}


@atexit.register
def release_groups() -> None:
    """Leaves all groups: at exit, while what they are made of is still there."""
    for name in reversed(list(_groups)):
        torch.ops.anabranch.release_group(name)
    _groups.clear()


def as_group(group: object = None) -> Group:
    """The ranks that `group` stands for.

    Args:
        group: a `torch.distributed` process group; a DeviceMesh of one dimension; an mpi4py
            communicator (then every rank of MPI's world makes the call, with its own); a Group; or None: the default process group where there is one, else the ranks
            that mpirun, srun or torchrun have started, else this process alone.

    Collective over the ranks in question. TypeError for anything else.
    """
    if group is None:
        return _default_group()
    if isinstance(group, Group):
        return group
    if isinstance(group, dist.DeviceMesh):
        return _of_mesh(group)
    if isinstance(group, dist.ProcessGroup):
        return _of_process_group(group)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this rank is no member of that process group")
    if type(group).__module__.partition(".")[0] == "mpi4py":
        return _of_mpi4py(group)
    raise TypeError(
        f"group is a {type(group).__name__}, expected a torch.distributed process group, a DeviceMesh of "
        "one dimension, an mpi4py communicator, or None"
    )


def _named(name: str, source: object, make: Any) -> Group:
    """The group of that name, made if there is none yet from `source`."""
    known = _groups.get(name)
    if known is None or known.source is not source:
        _groups[name] = Group(make(name), source)
    return _groups[name]


def _of_process_group(group: dist.ProcessGroup) -> Group:
    if group.size() == 1:
        return alone()
    operators = torch.ops.anabranch
    return _named(
        f"process_group:{group.group_name}",
        group,
        lambda name: operators.process_group(name, group.group_name, DEADLINE.total_seconds()),
    )


def _of_mesh(mesh: dist.DeviceMesh) -> Group:
    if mesh.ndim != 1:
        raise ValueError(
            f"group is a DeviceMesh of {mesh.ndim} dimensions {mesh.mesh_dim_names}, expected one of "
            'them: mesh["expert"]'
        )
    return _of_process_group(mesh.get_group())


def _of_mpi4py(communicator: Any) -> Group:
    """The same ranks by the library's own communicator over MPI: of the world, or split from it."""
    from mpi4py import MPI

    if not isinstance(communicator, MPI.Intracomm):
        raise TypeError(f"group is a {type(communicator).__name__} of mpi4py, expected an intracommunicator")
    if communicator.size == 1:
        return alone()
    world = _mpi_world()
    members = MPI.Group.Translate_ranks(communicator.Get_group(), None, MPI.COMM_WORLD.Get_group())
    if sorted(members) == list(range(world.size)) == list(members):
        return world
    return split_group(world, f"mpi4py {members}", members[0], communicator.rank)


def _mpi_world() -> Group:
    return _named("mpi", None, lambda name: torch.ops.anabranch.mpi_group(name, DEADLINE.total_seconds()))


def split_group(group: Group, what: str, color: int, key: int | None = None) -> Group:
    """The ranks of `group` that give the same `color`, ordered by `key` (None: as in the group); made once
    for each `what`. Collective over `group`."""
    if group.size == 1:
        return group
    name = f"{group.name}/{what}.{color}"
    place = group.rank if key is None else key
    return _named(name, group, lambda name: torch.ops.anabranch.split_group(name, group.name, color, place))


def alone() -> Group:
    return _named("self", None, torch.ops.anabranch.self_group)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _default_group() -> Group:
    if dist.is_available() and dist.is_initialized():
        return _of_process_group(_world())
    info = discover_rank()
    if info.size == 1:
        return alone()
    if info.launcher == "torchrun":
        dist.init_process_group()
        return _of_process_group(_world())
    return _mpi_world()
