"""What the parts of a layer have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..groups import Group
from .spread import local_part

Through = Callable[[Tensor, dict[str, Tensor]], Any]


class Part(nn.Module):
    """Parameters under one name. The layer calls it to get them, so that what wraps the part, hooks or adapters,
    takes effect."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def tensors(self) -> dict[str, Tensor]:
        """By name; of DTensors this rank's part."""
        return {name: local_part(getattr(self, name)) for name in self.names}

    def forward(self, x: Tensor | None = None) -> dict[str, Tensor]:
        """By name; `x`, what the layer is given, is for what wraps this module."""
        return self.tensors()


class Experts(Part):
    """Those of the experts. What the layer does with its parts it does within this one's forward: so the parameters
    are there, gathered or adapted by what wraps this module, until the output is, and again for its backward."""

    def __init__(self, num_experts: int, group: Group) -> None:
        super().__init__()
        self.num_experts = num_experts
        """Of the layer, whose `group` they lie over."""
        self.group = group

    def forward(self, x: Tensor, through: Through) -> Any:  # type: ignore[override]
        return through(x, self.tensors())
