"""Groups of ranks, from whatever a program has: torch.distributed, a DeviceMesh, mpi4py, nothing."""

from __future__ import annotations

import atexit
import collections
import datetime
import gc
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .discovery import discover_rank
from .features import transports

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
        if self.kind == "self":
            return alone, ()
        raise TypeError(
            "a group of running ranks cannot be pickled, nor what is spread over it: save the state_dict instead, "
            "or a converted model by its save_pretrained"
        )

    def on(self, device: torch.device) -> Group:
        """The same ranks for tensors on `device`: on a GPU through the library's own communicator over NCCL, but
        for a process group that does not use NCCL itself. Collective where that takes another communicator."""
        if device.type != "cuda" or self._serves_gpus:
            return self
        operators = torch.ops.anabranch
        return _named(
            f"{self.name}@{device}",
            self,
            lambda name: operators.nccl_group(name, self.name, device, DEADLINE.total_seconds()),
        )

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replaces `tensor` with the sum over ranks, 16-bit types summed in fp32. Collective; no gradient."""
        torch.ops.anabranch.all_reduce(tensor, self.on(tensor.device).name)

    def raise_together(self, error: Exception | None, device: torch.device, message: str) -> None:
        """Raises `error` where a rank has one, and then RuntimeError of `message` on those that have none. Collective, of a
        number that travels from `device`."""
        failed = torch.tensor([float(error is not None)], device=device)
        self.all_reduce(failed)
        if error is not None:
            raise error
        if failed.item() > 0:
            raise RuntimeError(message)


def _by_nccl(source: object) -> bool:
    """Whether ranks of that source move GPU memory by NCCL: a process group, only where it does so too."""
    if isinstance(source, Group):
        return _by_nccl(source.source)
    if isinstance(source, dist.ProcessGroup):
        return "nccl" in dist.get_backend_config(source) and "nccl" in transports()
    return True


_groups: dict[str, Group] = {}
"""By what each was asked for as, in the order they were made: one that is made of another comes behind it."""
_times: collections.Counter[str] = collections.Counter()
"""How often a group has been made for what was asked for."""


@atexit.register
def release_groups() -> None:
    """Leaves all groups: at exit, while what they are made of is still there."""
    _let_go()
    for group in reversed(list(_groups.values())):
        torch.ops.anabranch.release_group(group.name)
    _groups.clear()


def _let_go() -> None:
    """A graph of autograd holds its layer's group, an exception's traceback the frames with it, in a cycle: on a rank that has
    had one the group would live on, and the others wait for it where they end theirs."""
    gc.collect()


def _release(group: Group) -> None:
    """Leaves that group, and first those made of it: layers over them say so."""
    for made in [each for each in _groups.values() if each.source is group]:
        _release(made)
    torch.ops.anabranch.release_group(group.name)
    for key in [key for key, each in _groups.items() if each is group]:
        del _groups[key]


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


def _named(what: str, source: object, make: Callable[[str], str], kind: Callable[[str, Any], Group] = Group) -> Group:
    """The group that is asked for as `what`, made if there is none yet from `source`.

    Where there is one from another source, that one is gone and its name given out again, as by
    destroy_process_group and init_process_group: it is left. A name is used once: layers over a group that was
    left must not find another by it.
    """
    known = _groups.get(what)
    if known is not None:
        if known.source is source:
            return known
        _let_go()
        _release(known)
    _times[what] += 1
    name = what if _times[what] == 1 else f"{what}#{_times[what]}"
    _groups[what] = kind(make(name), source)
    return _groups[what]


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
    if isinstance(group, HierarchicalGroup):
        return hierarchical(split_group(group.flat, what, color, key), group.all_to_all, group.node)
    name = f"{group.name}/{what}.{color}"
    place = group.rank if key is None else key
    return _named(name, group, lambda name: torch.ops.anabranch.split_group(name, group.name, color, place))


class HierarchicalGroup(Group):
    """Ranks whose rows go within each node first, on GPUs too. Made by `hierarchical`."""

    def __init__(self, name: str, flat: Group, all_to_all: str, node: str) -> None:
        super().__init__(name, flat)
        self.flat = flat
        self.all_to_all = all_to_all
        self.node = node

    def on(self, device: torch.device) -> Group:
        flat = self.flat.on(device)
        return self if flat is self.flat else hierarchical(flat, self.all_to_all, self.node)


def hierarchical(group: object = None, all_to_all: str = "auto", node: str = "") -> Group:
    """The ranks of `group`, whose rows go to ranks of the same node first, and then in one message from node to node;
    results are the same bit for bit. For many short messages over a slow network.

    Args:
        group: see `as_group`.
        all_to_all: "hierarchical"; "flat", from each rank straight to each other; "auto", what is faster, as measured
            on the first exchanges of each kind.
        node: ranks with the same name are on one node; empty: the host's name.

    Collective, with the same `all_to_all` on every rank; ValueError for another one. Parts of the group
    (`make_parallel_groups(8, hierarchical())`) go the same way.
    """
    flat = as_group(group)
    if flat.size == 1:
        return flat
    operators = torch.ops.anabranch
    return _named(
        f"{flat.name}/{all_to_all} {node}",
        flat,
        lambda name: operators.hierarchical_group(name, flat.name, all_to_all, node),
        lambda name, flat: HierarchicalGroup(name, flat, all_to_all, node),
    )


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
