"""What LoRA has of a rank's experts, and how it becomes part of peft's files: of all experts, whichever rank has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .held import check_held, held
from .parts import Experts

_REMEDY = "anabranch.lora.save_adapters, called on every rank, keeps all ranks' adapters, for any number of ranks"


class Factors(nn.Module):
    """One side of the adapters of both projections, by the name of the weight: [E / W, …] each."""

    def __init__(self, experts: Experts, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up_weight = nn.Parameter(up)
        self.down_weight = nn.Parameter(down)
        self.num_experts, self.group = experts.num_experts, experts.group

    def get_extra_state(self) -> Tensor:
        """Which experts the state holds, see `held`: [1, 3], as peft takes adapters of one dimension for incomplete."""
        return held(self.num_experts, self.group)[None]

    def set_extra_state(self, state: Tensor) -> None:
        """Looked at before anything is copied."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *more: Any
    ) -> None:
        """Of a state of all experts this rank's are taken; ValueError for other experts'."""
        own, saved = self.get_extra_state()[0], state_dict.get(f"{prefix}_extra_state")
        if saved is not None and saved.tolist() == [[0, self.num_experts, self.num_experts]]:
            for name in self._parameters:
                if f"{prefix}{name}" in state_dict:
                    state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{name}"][slice(*own[:2].tolist())]
        elif saved is not None:
            check_held(saved[0], own, _REMEDY)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *more)
        if f"{prefix}_extra_state" in missing:
            missing.remove(f"{prefix}_extra_state")

    def gather_into(self, state: dict[str, Any], prefix: str) -> None:
        """Has `state` hold all experts' on the group's rank 0. Collective."""
        for name, values in self._parameters.items():
            assert values is not None
            if self.group.size > 1:
                rows = values.detach()
                state[f"{prefix}{name}"] = torch.ops.anabranch.gather_rows(rows, self.group.on(rows.device).name)
        state[f"{prefix}_extra_state"] = torch.tensor([[0, self.num_experts, self.num_experts]])


def like_linear(weight: Tensor, r: int, experts: Experts) -> Tensor:
    """A [E / W, r, in] of the experts of `weight` [E / W, out, in], each as nn.Linear begins with it, which is peft's way.
    All experts' are drawn: so an expert's do not depend on the ranks, and generators go on alike on all of them."""
    first, last, num_experts = held(experts.num_experts, experts.group).tolist()
    factors = weight.new_empty(last - first, r, weight.shape[2])
    others = weight.new_empty(r, weight.shape[2])
    for expert in range(num_experts):
        nn.init.kaiming_uniform_(factors[expert - first] if first <= expert < last else others, a=math.sqrt(5))
    return factors


def by_expert(experts: nn.Module) -> dict[int, Callable[[Tensor], Tensor]]:
    """Of adapters that peft's `target_parameters` has put on experts, whose tensors are of all of a rank's in one: by the
    parameter's id what views a tensor of its shape as [E / W, …]."""
    found: dict[int, Callable[[Tensor], Tensor]] = {}
    for module in experts.modules():
        if not hasattr(module, "parameter_name") or "lora_A" not in module._modules:
            continue
        for adapter, r in module.r.items():  # type: ignore[union-attr, operator]
            sizes = (module.num_experts, r)
            a, b = (getattr(module, side)[adapter].weight for side in ("lora_A", "lora_B"))
            found[id(a)] = lambda values, sizes=sizes: values.view(*sizes, values.shape[1])  # type: ignore[misc]
            found[id(b)] = lambda values, sizes=sizes: values.view(values.shape[0], *sizes[::-1]).permute(2, 0, 1)  # type: ignore[misc]
    return found
