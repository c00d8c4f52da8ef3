"""How much memory a layer will take, before it is made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from .layer.moe import _to_json


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one rank's layer over a step, in bytes by what they are for; see `plan_memory`."""

    parameters: dict[str, int]
    #: Alive between forward and backward, the output included.
    saved: dict[str, int]
    #: Alive beside the parameters when forward has most.
    forward: dict[str, int]
    #: The same of backward, which leaves the gradients.
    backward: dict[str, int]
    #: That the GPUs of one host map from each other; once for all layers of a group.
    mailboxes: dict[str, int]
    #: All that is alive at the step's fullest moment.
    peak: int
    text: str

    def explain(self) -> str:
        """As a table for people."""
        return self.text


def plan_memory(
    tokens: int,
    ranks: int = 1,
    *,
    load: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> MemoryPlan:
    """What rank 0 of `ranks` needs for a training step of a layer of those `options`, the arguments of `MoE`.

    Args:
        tokens: of every rank.
        load: the assignments that the rank's experts receive, over those of a rank in perfect balance.
        dtype, device: the layer's. `torch.device("cuda")` can be asked about without a GPU.

    Not in it: the step's input and the gradient of its output, which are the caller's, an optimizer's state, and
    what libraries keep for themselves (NCCL, cuBLAS, the allocator's unused blocks). ::

        print(anabranch.plan_memory(16384, 8, hidden_size=4096, expert_hidden_size=14336, num_experts=8, glu=True,
                                    dtype=torch.bfloat16, device="cuda").explain())
    """
    kind = torch.device(device or torch.get_default_device())
    text = torch.ops.anabranch.plan_memory(
        _to_json(options), dtype or torch.get_default_dtype(), kind, tokens, ranks, load
    )
    return MemoryPlan(**json.loads(text))
