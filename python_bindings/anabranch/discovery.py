"""Who this process is to its launcher."""

from __future__ import annotations

import dataclasses
import json

import torch

from . import _library  # noqa: F401


@dataclasses.dataclass(frozen=True)
class RankInfo:
    """What the launcher of this process says about it."""

    rank: int
    size: int
    node: str
    launcher: str
    """"Open MPI", "Slurm", "torchrun", ...; empty: none."""
    local_rank: int | None = None
    """Among the ranks of its node; unknown where nobody says it."""
    local_size: int | None = None


def discover_rank() -> RankInfo:
    """This process among its job's ranks, by the variables of torchrun, Open MPI, PMI, PMIx and Slurm.

    The discovery of the C++ library: the same results, and ValueError naming the variables where
    launchers contradict each other. No communication.
    """
    return RankInfo(**json.loads(torch.ops.anabranch.discover_rank()))
