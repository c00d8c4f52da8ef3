"""Which experts a layer's state holds: every rank's has the same names and shapes, and other experts."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..groups import Group

_REMEDY = (
    "anabranch.save_checkpoint keeps all ranks' experts, for any number of ranks; else each rank saves a file of its own "
    "and loads that one"
)


def first_expert(num_experts: int, group: Group) -> int:
    """Ranks have consecutive experts, the first ranks one more where they are no multiple."""
    return group.rank * (num_experts // group.size) + min(group.rank, num_experts % group.size)


def held_experts(options: str, group: Group) -> tuple[int, list[list[int]]]:
    """Where experts are placed otherwise: how many places the ranks before this one have, and for each of its own the
    expert, the slice and into how many it is cut."""
    first, flat = torch.ops.anabranch.held_experts(options, group.rank, group.size)
    return first, [flat[i : i + 3] for i in range(0, len(flat), 3)]


def held(num_experts: int, group: Group) -> Tensor:
    """[3] int64 in host memory: this rank's first expert, its last one + 1, all of them. A tensor, as everything
    else in a state that programs walk through."""
    first = first_expert(num_experts, group)
    local = num_experts // group.size + (group.rank < num_experts % group.size)
    return torch.tensor([first, first + local, num_experts], dtype=torch.int64, device="cpu")


def check_held(saved: Tensor, expected: Tensor, remedy: str = _REMEDY) -> None:
    """ValueError where a state holds other experts than this rank's."""
    if saved.dim() == 2 or expected.dim() == 2:  # placed
        if not torch.equal(saved.cpu(), expected):
            raise ValueError(
                f"the state holds experts (expert, slice, slices) {saved.tolist()}, this rank has {expected.tolist()}: it was "
                f"saved by another rank or at another placement; {_REMEDY}"
            )
        return
    begin, end, all_of_them = (int(value) for value in saved.tolist())
    first, last, num_experts = expected.tolist()
    if (begin, end, all_of_them) != (first, last, num_experts):
        raise ValueError(
            f"the state holds experts [{begin}, {end}) of {all_of_them}, this rank has [{first}, {last}) of "
            f"{num_experts}: it was saved by another rank or at another number of ranks; {remedy}"
        )


def warn_of_unnamed(group: Group, where: str) -> None:
    """For a state that does not say which experts it holds, as those of earlier versions."""
    warnings.warn(
        f"the state of {where} does not say which experts it holds (_extra_state), as those saved by earlier versions: "
        f"it is taken for that of rank {group.rank} of {group.size}, whoever saved it; {_REMEDY}",
        stacklevel=2,
    )
