"""What the parts of a layer have in common."""

from __future__ import annotations

from torch import Tensor, nn


class Part(nn.Module):
    """Parameters under one name. The layer calls it to get them, so that what wraps the part, hooks or adapters,
    takes effect."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def forward(self, x: Tensor | None = None) -> dict[str, Tensor]:
        """By name; `x`, what the layer is given, is for what wraps this module."""
        return {name: getattr(self, name) for name in self.names}
