"""Plots of a layer's load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..layer.moe import MoE
from ..layer.stats import imbalance

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_load(source: nn.Module | Tensor | Mapping[str, Tensor], axes: Axes | None = None) -> Axes:
    """Draws the share of all assignments that each expert took, a line of bars a layer.

    Args:
        source: a model, whose MoE layers show their last forward; the load of one layer, [num_experts]; or
            loads by name.
        axes: matplotlib's, to draw into; None: of a new figure, which `axes.figure.savefig(path)` writes.
    """
    loads = _loads_of(source)
    if axes is None:
        from matplotlib.figure import Figure

        experts = max(len(load) for load in loads.values())
        size: Any = (min(4 + 0.25 * experts, 16), 1.5 + 0.8 * len(loads))
        axes = Figure(figsize=size, layout="constrained").subplots()
    image = axes.imshow(
        [_padded([load / max(sum(values), 1) * len(values) for load in values], loads) for values in loads.values()],
        aspect="auto",
        cmap="viridis",
        vmin=0,
    )
    axes.figure.colorbar(image, ax=axes, label="load / mean load")
    axes.set_xlabel("expert")
    axes.set_yticks(
        range(len(loads)), [f"{name} (imbalance {_imbalance(values):.2f})" for name, values in loads.items()]
    )
    axes.set_title("Load of experts")
    return axes


def _loads_of(source: nn.Module | Tensor | Mapping[str, Tensor]) -> dict[str, list[int]]:
    if isinstance(source, nn.Module):
        layers = {name or "layer": module for name, module in source.named_modules() if isinstance(module, MoE)}
        if not layers:
            raise ValueError("plot_load: the model has no MoE layer")
        found = {name: layer.stats().expert_load for name, layer in layers.items()}
        missing = [name for name, load in found.items() if load is None]
        if missing:
            raise ValueError(f"plot_load: no forward yet of {', '.join(missing)}")
        return {name: load.tolist() for name, load in found.items() if load is not None}
    if isinstance(source, Tensor):
        source = {"layer": source}
    if not isinstance(source, Mapping) or not source:
        raise TypeError(f"plot_load: got a {type(source).__name__}, expected a model, a load, or loads by name")
    for name, load in source.items():
        if not isinstance(load, Tensor) or load.dim() != 1 or load.numel() == 0:
            raise ValueError(f"plot_load: the load of {name} is {load!r:.80}, expected a tensor [num_experts]")
    return {name: load.tolist() for name, load in source.items()}


def _padded(values: list[float], loads: dict[str, list[int]]) -> list[float]:
    return values + [float("nan")] * (max(len(each) for each in loads.values()) - len(values))


def _imbalance(values: list[int]) -> float:
    import torch

    return imbalance(torch.tensor(values))
