"""Models of Hugging Face's transformers over anabranch layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor

from ..groups import Group, as_group
from ..layer.held import first_expert
from ..layer.moe import MoE
from ..layer.spread import check_equal_shares, mesh_of, rows_of
from .saving import CollectiveSaving
from .stacked_experts import Layout, recognised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


def convert(model: Model, group: object = None, *, dtensor: bool = False) -> Model:
    """Swaps the experts of a transformers model for anabranch layers with the same weights.

    In place, and returns the model; each rank keeps its experts only. All else stays: the family's router and what
    it records, shared experts, hooks, adapters elsewhere, what is frozen. So tokens go to the same experts, with the
    same weights, as before.

    `model.save_pretrained(folder)` writes what plain transformers loads: it is collective, experts come together on
    rank 0, and the file is written there; `state_dict` has the layers' own names and this rank's experts.

    Args:
        model: of transformers 5, with the same weights on every rank; its experts are stacked, follow transformers'
            interface for them, and compute down(activation(gate) · up), also clamped as in gpt-oss, or down(activation(up)).
        group: the expert-parallel group, see `as_group`. Collective over it.
        dtensor: the layers' experts are DTensors [num_experts, …] over the group, a DeviceMesh or a process group, as
            with `MoE(dtensor=True)`: torch.distributed.checkpoint writes and reads them at any number of ranks.

    TypeError for what is no model of transformers; ValueError with the reason for one with other experts or none, or
    that has been converted. It is unchanged then.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a PreTrainedModel of transformers")
    ranks = as_group(group)
    found = [(name, experts, *recognised(name, experts, ranks.size)) for name, experts in stacked_experts(model)]
    on_devices = {experts.down_proj.device for _, experts, *_ in found}
    meshes = {device: mesh_of(group, ranks, device) for device in on_devices} if dtensor and ranks.size > 1 else {}
    for _, experts, *_ in found if meshes else ():
        check_equal_shares(experts.down_proj.shape[0], meshes[experts.down_proj.device])
    for name, experts, layout, computed in found:
        mesh = meshes.get(experts.down_proj.device)
        model.set_submodule(name, ConvertedExperts(experts, layout, computed, ranks, mesh))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(isinstance(part, ConvertedExperts) for part in module.modules()):
            module.save_pretrained = CollectiveSaving(module)  # type: ignore[method-assign]
    return model


def stacked_experts(model: Any) -> list[tuple[str, Any]]:
    """By name. ValueError where there are none."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ConvertedExperts):
            raise ValueError(f"the model has been converted: {name} is a layer of anabranch")
        if name.rpartition(".")[2] == "experts" and isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            import transformers

            raise ValueError(
                f"{name} is a list of modules, as before transformers 5 ({transformers.__version__} is installed); "
                "convert takes stacked experts, from 5.0 on"
            )
        if isinstance(getattr(module, "down_proj", None), Tensor):
            if name.endswith("base_layer"):
                raise ValueError(f"{name}: the experts have been adapted. Convert first, then add adapters")
            found.append((name, module))
    if not found:
        raise ValueError(
            f"the model, of type {model.config.model_type!r}, has no stacked experts that convert knows (gate_up_proj "
            "or up_proj, and down_proj): it has dense layers only, or computes its experts in another way"
        )
    return found


class ConvertedExperts(nn.Module):
    """An anabranch layer in the place of a family's stacked experts. Collective."""

    def __init__(
        self, experts: Any, layout: Layout, computed: dict[str, Any], group: Group, mesh: DeviceMesh | None = None
    ) -> None:
        super().__init__()
        num_experts, hidden_size, expert_hidden_size = layout.to_layer("down_proj", experts.down_proj).shape
        self.layout = layout
        self.moe = MoE(
            hidden_size,
            expert_hidden_size,
            num_experts,
            top_k=1,
            **computed,
            glu=layout.glu,
            bias=layout.bias,
            router=False,
            seed=0,
            group=group if mesh is None else mesh,
            dtensor=mesh is not None,
            device="meta",
            dtype=experts.down_proj.dtype,
        ).to_empty(device=experts.down_proj.device)
        first = first_expert(num_experts, group)
        for theirs, ours in layout.names.items():
            _fill(getattr(self.moe.experts, ours), getattr(experts, theirs), theirs, layout, first)
        self._take_hooks(experts)
        self.train(experts.training)

    def _take_hooks(self, experts: nn.Module) -> None:
        """The dictionaries themselves: whoever has put a hook there can still remove it."""
        for name, value in vars(experts).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called", "_full_backward_hook")):
                self.__dict__[name] = value

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, h], [T, top_k] and [T, top_k] → [T, h]: of each token the weighted sum of its experts' results."""
        return self.moe(hidden_states, routing=(top_k_index, top_k_weights)).output


def _fill(parameter: nn.Parameter, values: nn.Parameter, name: str, layout: Layout, first: int) -> None:
    with torch.no_grad():
        ours = rows_of(parameter)
        rows = rows_of(values) if isinstance(values, DTensor) else values[first : first + ours.shape[0]]
        ours.copy_(layout.to_layer(name, rows))
    parameter.requires_grad_(values.requires_grad)
