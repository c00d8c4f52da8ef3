"""Models of Hugging Face's transformers over anabranch layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .groups import Group, as_group
from .moe import MoE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)


def _softmax_routing(config: Any) -> dict[str, Any]:
    return {"renormalize": bool(getattr(config, "norm_topk_prob", True))}  # Mixtral has no such option


def _sigmoid_routing(config: Any) -> dict[str, Any]:
    return {
        "router_score": "sigmoid",
        "renormalize": bool(config.norm_topk_prob),
        "routing_scale": float(config.routed_scaling_factor),
        "expert_bias": True,
        "expert_groups": config.n_group,
        "top_groups": config.topk_group,
        "shared_expert_hidden_size": config.moe_intermediate_size * config.n_shared_experts,
    }


_FAMILIES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "mixtral": ("MixtralSparseMoeBlock", _softmax_routing),
    "olmoe": ("OlmoeSparseMoeBlock", _softmax_routing),
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", _softmax_routing),
    "deepseek_v3": ("DeepseekV3MoE", _sigmoid_routing),
}
"""By `config.model_type`: the class of its Mixture-of-Experts block, and the layer's options. A block has a `gate`
with `weight` [E, h] and `top_k`, and `experts` with `gate_up_proj` [E, 2n, h], gate first, and `down_proj`
[E, h, n]: in the layer's own layout."""
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_EXPERTS = {"gate_up_proj": "up_weight", "down_proj": "down_weight"}
"""Names of a family's stacked weights, and the layer's for those of this rank."""


def convert(model: Model, group: object = None) -> Model:
    """Swaps the Mixture-of-Experts blocks of a transformers model for anabranch layers with the same weights.

    In place, and returns the model; each rank keeps its experts only. The router computes in fp32.
    `output_router_logits` works, for the rank's own tokens. `model.save_pretrained(folder)` writes what plain
    transformers loads: it is collective, experts come together on rank 0, and the file is written there;
    `state_dict` has the layers' own names and this rank's experts. Parameters that are frozen stay so.

    Args:
        model: of transformers 5: Mixtral, OLMoE, Qwen3-MoE or DeepSeek-V3, with the same weights on every rank.
        group: the expert-parallel group, see `as_group`. Collective over it.

    TypeError for what is no model of transformers; ValueError for one of another family, or that has been
    converted.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, expected a PreTrainedModel of transformers")
    kind = model.config.model_type
    if kind not in _FAMILIES:
        raise ValueError(f"the model is of type {kind!r}; convert knows {', '.join(map(repr, _FAMILIES))}")
    block_class, routing = _FAMILIES[kind]
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ == block_class]
    if not found:
        raise ValueError(f"the model has no {block_class}: it has been converted, or has dense layers only")
    ranks = as_group(group)
    for name, block in found:
        _check(name, block)
    for name, block in found:
        model.set_submodule(name, ConvertedBlock(block, _options(model.config, block) | routing(model.config), ranks))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = _with_collective_saving(type(module))
    return model


def _check(name: str, block: nn.Module) -> None:
    import transformers

    experts = block.get_submodule("experts")
    if isinstance(experts, nn.ModuleList):
        raise ValueError(
            f"{name}.experts is a list of modules, as before transformers 5; {transformers.__version__} is installed, "
            "convert needs 5.0 or newer"
        )
    for weight in _EXPERTS:
        if type(getattr(experts, weight, None)) is not nn.Parameter:
            raise ValueError(
                f"{name}.experts.{weight} is a {type(getattr(experts, weight, None)).__name__}, expected a plain "
                "parameter: quantized, adapted or sharded models cannot be converted"
            )


def _options(config: Any, block: Any) -> dict[str, Any]:
    if config.hidden_act not in _ACTIVATIONS:
        raise ValueError(f"hidden_act is {config.hidden_act!r}, expected one of {', '.join(_ACTIVATIONS)}")
    num_experts, hidden_size, expert_hidden_size = block.experts.down_proj.shape
    return {
        "hidden_size": hidden_size,
        "expert_hidden_size": expert_hidden_size,
        "num_experts": num_experts,
        "top_k": block.gate.top_k,
        "activation": _ACTIVATIONS[config.hidden_act],
        "glu": True,
    }


class ConvertedBlock(nn.Module):
    """An anabranch layer in the place of a family's block: hidden states [B, S, h] in and out. Collective."""

    def __init__(self, block: Any, options: dict[str, Any], group: Group) -> None:
        super().__init__()
        weight = block.experts.down_proj
        self.moe = MoE(**options, seed=0, group=group, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
        self.gate = _recorder(type(block.gate))()
        for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            getattr(self.gate, hooks).update(getattr(block.gate, hooks))  # transformers puts its own there once
        self.jitter = float(getattr(block, "jitter_noise", 0.0))
        """Mixtral's: of the hidden states, for router and experts alike."""
        self.router_dtype = block.gate.weight.dtype
        """In the family's checkpoints."""
        _fill(self.moe.get_parameter("router.weight"), block.gate.weight)
        if options.get("expert_bias"):
            self.moe.get_buffer("router.expert_bias").copy_(block.gate.e_score_correction_bias)
        if options.get("shared_expert_hidden_size"):
            _fill_shared_expert(self.moe.shared_expert, block.shared_experts)
        first = _first_expert(options["num_experts"], group)
        for theirs, ours in _EXPERTS.items():
            _fill(getattr(self.moe.experts, ours), getattr(block.experts, theirs), first)
        self.train(block.training)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.training and self.jitter > 0:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter, 1 + self.jitter)
            hidden_states = hidden_states * noise
        if self.gate._forward_hooks:
            weight = self.moe.get_parameter("router.weight")
            self.gate(F.linear(hidden_states.flatten(0, -2).to(weight.dtype), weight))
        return self.moe(hidden_states).output


def _recorder(router: type[nn.Module]) -> type[nn.Module]:
    """A module that transformers takes for the family's router where it puts hooks for router logits."""

    class RouterLogits(router):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            nn.Module.__init__(self)

        def forward(self, logits: Tensor) -> tuple[Tensor]:
            return (logits,)

    return RouterLogits


def _first_expert(num_experts: int, group: Group) -> int:
    """Ranks have consecutive experts, the first ranks one more where they are no multiple."""
    return group.rank * (num_experts // group.size) + min(group.rank, num_experts % group.size)


def _fill(parameter: nn.Parameter, values: Tensor, first: int = 0) -> None:
    with torch.no_grad():
        parameter.copy_(values[first : first + parameter.shape[0]])
    parameter.requires_grad_(values.requires_grad)


def _fill_shared_expert(ours: Any, theirs: Any) -> None:
    _fill(ours.up_weight, torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight])[None])
    _fill(ours.down_weight, theirs.down_proj.weight[None])


class _CollectiveSaving:
    """Of a converted model: what it saves is the family's checkpoint."""

    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **options: Any
    ) -> None:
        """As transformers' own. Collective over the layers' group: every rank makes the call, rank 0 has the whole
        model in host memory and writes it, and all return when that is done; RuntimeError on all if it failed."""
        group = next(module for module in self.modules() if isinstance(module, ConvertedBlock)).moe.group
        whole = _whole_state_dict(self, self.state_dict() if state_dict is None else state_dict)
        error: Exception | None = None
        if group.rank == 0:
            try:
                super().save_pretrained(save_directory, is_main_process, whole, **options)  # type: ignore[misc]
            except Exception as raised:  # the other ranks are waiting to hear of it
                error = raised
        failed = torch.tensor([float(error is not None)], device=self.device)
        group.all_reduce(failed)
        if error is not None:
            raise error
        if failed.item() > 0:
            raise RuntimeError(f"rank 0 could not save the model in {save_directory}")


_saving: dict[type, type] = {}


def _with_collective_saving(cls: type) -> type:
    """A class that passes for `cls`: transformers knows models by their classes' names."""
    if cls not in _saving:
        place = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _saving[cls] = type(cls.__name__, (_CollectiveSaving, cls), place)
    return _saving[cls]


def _whole_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The family's, from the layers' own: complete on rank 0. Collective."""
    whole = dict(state_dict)
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, ConvertedBlock)]
    missing = [key for name, block in blocks for key in block.state_dict(prefix=f"{name}.") if key not in whole]
    if missing:
        raise ValueError(f"state_dict has no {missing[0]}, expected model.state_dict() of the converted model")
    for name, block in blocks:
        whole[f"{name}.gate.weight"] = whole.pop(f"{name}.moe.router.weight").to(block.router_dtype)
        if f"{name}.moe.router.expert_bias" in whole:
            whole[f"{name}.gate.e_score_correction_bias"] = whole.pop(f"{name}.moe.router.expert_bias")
        if f"{name}.moe.shared_expert.up_weight" in whole:
            gate, up = whole.pop(f"{name}.moe.shared_expert.up_weight")[0].chunk(2)
            down = whole.pop(f"{name}.moe.shared_expert.down_weight")[0]
            for projection, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                whole[f"{name}.shared_experts.{projection}.weight"] = weight.clone()
        for theirs, ours in _EXPERTS.items():
            experts = whole.pop(f"{name}.moe.experts.{ours}")
            whole[f"{name}.experts.{theirs}"] = _gathered(experts, block.moe.group)
    return whole


def _gathered(experts: Tensor, group: Group) -> Tensor:
    """Those of all ranks, on rank 0; none elsewhere. Collective."""
    if group.size == 1:
        return experts
    return torch.ops.anabranch.gather_rows(experts.detach(), group.on(experts.device).name)
