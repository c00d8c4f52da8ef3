"""Models of Hugging Face's transformers over anabranch layers."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ._held import first_expert
from .groups import Group, as_group
from .moe import MoE
from .stacked_experts import Layout, recognised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


def convert(model: Model, group: object = None) -> Model:
    """Swaps the experts of a transformers model for anabranch layers with the same weights.

    In place, and returns the model; each rank keeps its experts only. All else stays: the family's router and what
    it records, shared experts, hooks, adapters elsewhere, what is frozen. So tokens go to the same experts, with the
    same weights, as before.

    `model.save_pretrained(folder)` writes what plain transformers loads: it is collective, experts come together on
    rank 0, and the file is written there; `state_dict` has the layers' own names and this rank's experts.

    Args:
        model: of transformers 5, with the same weights on every rank; its experts are stacked, follow transformers'
            interface for them, and compute down(activation(gate) · up) or down(activation(up)).
        group: the expert-parallel group, see `as_group`. Collective over it.

    TypeError for what is no model of transformers; ValueError with the reason for one with other experts or none, or
    that has been converted. It is unchanged then.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a PreTrainedModel of transformers")
    found = [(name, experts, *recognised(name, experts)) for name, experts in _stacked_experts(model)]
    ranks = as_group(group)
    for name, experts, layout, activation in found:
        model.set_submodule(name, ConvertedExperts(experts, layout, activation, ranks))
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and any(isinstance(part, ConvertedExperts) for part in module.modules()):
            module.save_pretrained = CollectiveSaving(module)  # type: ignore[method-assign]
    return model


def _stacked_experts(model: Any) -> list[tuple[str, Any]]:
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

    def __init__(self, experts: Any, layout: Layout, activation: str, group: Group) -> None:
        super().__init__()
        num_experts, hidden_size, expert_hidden_size = layout.to_layer("down_proj", experts.down_proj).shape
        self.layout = layout
        self.moe = MoE(
            hidden_size,
            expert_hidden_size,
            num_experts,
            top_k=1,
            activation=activation,
            glu=layout.glu,
            bias=layout.bias,
            router=False,
            seed=0,
            group=group,
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
        parameter.copy_(layout.to_layer(name, values[first : first + parameter.shape[0]]))
    parameter.requires_grad_(values.requires_grad)


class CollectiveSaving:
    """`save_pretrained` of a converted model: what it writes is the family's checkpoint."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # which has this in turn

    def __deepcopy__(self, memo: dict[int, Any]) -> CollectiveSaving:
        return CollectiveSaving(memo.get(id(self._model()), self._model()))

    def __reduce__(self) -> Any:
        return CollectiveSaving, (self._model(),)

    def __call__(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **options: Any
    ) -> None:
        """As transformers' own. Collective over the layers' group: every rank makes the call, rank 0 has the whole
        model in host memory and writes it, and all return when that is done; RuntimeError on all if it failed."""
        model: Any = self._model()
        group = next(module for module in model.modules() if isinstance(module, ConvertedExperts)).moe.group
        whole = _whole_state_dict(model, model.state_dict() if state_dict is None else state_dict)
        error: Exception | None = None
        if group.rank == 0:
            try:
                type(model).save_pretrained(model, save_directory, is_main_process, whole, **options)
            except Exception as raised:  # the other ranks are waiting to hear of it
                error = raised
        failed = torch.tensor([float(error is not None)], device=model.device)
        group.all_reduce(failed)
        if error is not None:
            raise error
        if failed.item() > 0:
            raise RuntimeError(f"rank 0 could not save the model in {save_directory}")


def _whole_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The family's, from the layers' own: complete on rank 0. Collective."""
    whole = dict(state_dict)
    converted = [(name, module) for name, module in model.named_modules() if isinstance(module, ConvertedExperts)]
    for name, _ in converted:
        whole.pop(f"{name}.moe._extra_state", None)
    missing = [
        key
        for name, module in converted
        for key in module.state_dict(prefix=f"{name}.")
        if key not in whole and not key.endswith("_extra_state")
    ]
    if missing:
        raise ValueError(f"state_dict has no {missing[0]}, expected model.state_dict() of the converted model")
    for name, module in converted:
        keys = module.state_dict(prefix=f"{name}.")
        mine = {key: whole.pop(key) for key in keys if not key.endswith("_extra_state")}
        for theirs, ours in module.layout.names.items():
            experts = _gathered(mine[f"{name}.moe.experts.{ours}"], module.moe.group)
            whole[f"{name}.{theirs}"] = module.layout.to_family(theirs, experts)
    return whole


def _gathered(experts: Tensor, group: Group) -> Tensor:
    """Those of all ranks, on rank 0; none elsewhere. Collective."""
    if group.size == 1:
        return experts
    return torch.ops.anabranch.gather_rows(experts.detach(), group.on(experts.device).name)
