"""Models of Megatron-Core over anabranch layers: its router and shared experts, our experts and exchange."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from .layer.activations import activation_name
from .layer.moe import MoE


class MoELayer(BaseMoELayer):
    """What Megatron's MoELayer is, for its spec. Collective over Megatron's expert-parallel group.

    Megatron's own DistributedDataParallel and optimizer finish the gradients: the experts' parameters say `allreduce`
    = False where they are spread over ranks, as Megatron's do.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        name: str | None = None,
        **of_router: Any,
    ) -> None:
        """`name`, and `of_router`, `is_mtp_layer`, come with Megatron-Core 0.19, not with 0.16."""
        groups = pg_collection or get_default_pg_collection()
        super().__init__(config=config, layer_number=layer_number, pg_collection=groups, **of_router)
        _check(config, groups)
        submodules = submodules or MoESubmodules(experts=None)
        self.router = submodules.router(config=config, pg_collection=groups, **of_router)
        self.experts = MoE(
            config.hidden_size,
            config.moe_ffn_hidden_size or config.ffn_hidden_size,
            config.num_moe_experts,
            top_k=1,
            activation=_activation(config),
            glu=config.gated_linear_unit,
            activation_limit=_of_gate(config, "activation_func_clamp_value"),
            glu_offset=_of_gate(config, "glu_linear_offset"),
            bias=config.add_bias_linear,
            router=False,
            seed=0,
            group=groups.ep,
            device="cpu" if config.use_cpu_initialization else "cuda",
            dtype=config.params_dtype,
        )
        for name, parameter in self.experts.experts.named_parameters():  # type: ignore[union-attr]
            vars(parameter)["allreduce"] = self.experts.group.size == 1
            if config.perform_initialization and not name.endswith("bias"):
                for weight in parameter.data:
                    (config.init_method if name == "up_weight" else config.output_layer_init_method)(weight)
        if self.use_shared_expert:
            spec, gate = submodules.shared_experts, config.moe_shared_expert_gate
            build = functools.partial(build_module, spec) if isinstance(spec, ModuleSpec) else spec
            self.shared_experts = build(config=config, pg_collection=groups, gate=gate)

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """[sequence, batch, h] → the same, and no bias."""
        if intermediate_tensors is not None:
            raise ValueError("intermediate_tensors, of a CUDA graph of a part of the layer: the layer runs as a whole")
        padding = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        probabilities, chosen = self.router(hidden_states, padding)
        ids, weights = routing_of(probabilities, chosen, self.config.moe_router_topk)
        output = self.experts(hidden_states, routing=(ids, weights)).output
        if self.shared_experts is not None:
            output = output + self.shared_experts(hidden_states)
        return output, None

    def sharded_state_dict(self, *arguments: Any, **more: Any) -> Any:
        raise NotImplementedError(
            "Megatron's distributed checkpoints know nothing of these experts: anabranch.save_checkpoint keeps them"
        )

    def backward_dw(self, *arguments: Any, **more: Any) -> None:
        """Weights' gradients come with the layer's backward."""


def moe_layer_spec(spec: Any) -> Any:
    """The spec of Megatron's MoE layer, as of `get_moe_module_spec`, with ours in its place; its router and its shared
    experts stay. In a model's: `spec.submodules.mlp = moe_layer_spec(spec.submodules.mlp)`."""
    if isinstance(spec, ModuleSpec) and isinstance(spec.submodules, MoESubmodules):
        return dataclasses.replace(spec, module=MoELayer)
    # Megatron-Core 0.19: a builder.
    if isinstance(spec, functools.partial) and isinstance(spec.keywords.get("submodules"), MoESubmodules):
        return functools.partial(MoELayer, *spec.args, **spec.keywords)
    raise TypeError(f"spec is {spec!r:.80}, expected that of a MoE layer")


def routing_of(probabilities: Tensor, chosen: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Megatron's routing, [T, E] each, as ids and weights [T, top_k]; a token that has fewer experts, where some are over
    their capacity, goes to others as well, with weight 0."""
    least = torch.finfo(probabilities.dtype).min
    weights, ids = torch.where(chosen, probabilities, least).topk(top_k, dim=-1)
    return ids, torch.where(chosen.gather(1, ids), weights, 0)


def _activation(config: Any) -> str:
    name = activation_name(config.activation_func)
    if name is None:
        raise ValueError(f"activation_func is {config.activation_func!r}, which no kernel here computes")
    return name


def _of_gate(config: Any, name: str) -> float:
    """Without a gate neither clamp nor offset has an effect there."""
    return float(getattr(config, name, None) or 0.0) if config.gated_linear_unit else 0.0


def _check(config: Any, groups: Any) -> None:
    """ValueError for what the layer does not do."""
    refused = {
        "moe_latent_size": "experts take the hidden states themselves",
        "moe_apply_probs_on_input": "the weights are applied to the experts' results",
        "moe_shared_expert_overlap": "the shared experts run after the router",
        "delay_wgrad_compute": "weights' gradients come with the layer's backward",
    }
    for name, reason in refused.items():
        if getattr(config, name, None):
            raise ValueError(f"{name} = {getattr(config, name)}: {reason}")
    tensor_parallel = getattr(groups, "expt_tp", None)
    if tensor_parallel is not None and tensor_parallel.size() > 1:
        raise ValueError(f"expert_tensor_parallel_size = {tensor_parallel.size()}: an expert lies on one rank")
