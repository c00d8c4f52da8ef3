"""Which experts a layer's state holds: every rank's has the same names and shapes, and other experts."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .groups import Group

_REMEDY = (
    "anabranch.save_checkpoint keeps all ranks' experts, for any number of ranks; else each rank saves a file of its own "
    "and loads that one"
)


def first_expert(num_experts: int, group: Group) -> int:
    """Ranks have consecutive experts, the first ranks one more where they are no multiple."""
    return group.rank * (num_experts // group.size) + min(group.rank, num_experts % group.size)


def held(num_experts: int, group: Group) -> Tensor:
    """[3] int64 in host memory: this rank's first expert, its last one + 1, all of them. A tensor, as everything
    else in a state that programs walk through."""
    first = first_expert(num_experts, group)
    local = num_experts // group.size + (group.rank < num_experts % group.size)
    return torch.tensor([first, first + local, num_experts], dtype=torch.int64, device="cpu")


def check_held(saved: Tensor, expected: Tensor) -> None:
    """ValueError where a state holds other experts than this rank's."""
    begin, end, all_of_them = (int(value) for value in saved.tolist())
    first, last, num_experts = expected.tolist()
    if (begin, end, all_of_them) != (first, last, num_experts):
        raise ValueError(
            f"the state holds experts [{begin}, {end}) of {all_of_them}, this rank has [{first}, {last}) of "
            f"{num_experts}: it was saved by another rank or at another number of ranks; {_REMEDY}"
        )


def warn_of_unnamed(group: Group, where: str) -> None:
    """For a state that does not say which experts it holds, as those of earlier versions."""
    warnings.warn(
        f"the state of {where} does not say which experts it holds (_extra_state), as those saved by earlier versions: "
        f"it is taken for that of rank {group.rank} of {group.size}, whoever saved it; {_REMEDY}",
        stacklevel=2,
    )
