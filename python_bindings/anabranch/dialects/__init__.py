"""Configurations of other libraries in the words of `MoE`: what `MoE.from_config` reads.

A dialect is a function that asks a configuration for its keys. What it asks for is known; a key of a
Mixture-of-Experts layer that it does not ask for, and a value that no layer here computes, are refused with the
reason, so that no option is silently without effect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .configuration import Configuration, normalised
from .hf import hf
from .megatron import megatron


def _megablocks(of: Configuration) -> dict[str, Any]:
    """MegaBlocks' Arguments, for its dMoE."""
    kind = of.get("mlp_type", default="mlp")
    of.only("mlp_type", "mlp", "glu", why="expected mlp or glu")
    normalised = of.get("moe_normalize_expert_weights", default=0)
    of.only("moe_normalize_expert_weights", 0, 1, why="weights are divided by their sum, the norm of 1, or not at all")
    shared = of.get("shared_expert", default=False)
    if of.get("bias", default=True):
        raise ValueError(
            f"{of.dialect}: bias = True, as it is there unless it is given: one vector added to the layer's output, while "
            "biases here are the experts' own. Give bias=False and add the vector behind the layer"
        )
    options = {
        "hidden_size": of.get("hidden_size", default=1024),
        "expert_hidden_size": of.get("ffn_hidden_size", default=4096),
        "num_experts": of.get("moe_num_experts", default=1),
        "top_k": of.get("moe_top_k", default=1),
        "glu": kind == "glu",
        "activation": of.activation("activation_fn", default="gelu_tanh"),
        "renormalize": bool(normalised),
        "jitter": of.get("moe_jitter_eps", default=0.0),
        "shared_expert_hidden_size": of.get("shared_expert_hidden_size", "ffn_hidden_size", default=4096) if shared else 0,
    }
    of.only("shared_expert_weighted_sum", False, why="the shared expert's output is added as it is")
    of.only("uniform_expert_assignment", False, why="the router's choices are not forced")
    of.only("moe_weight_parallelism", False, why="experts are spread whole")
    of.elsewhere("shared_expert_hidden_size", "fp16", "bf16", "mlp_impl", "moe_capacity_factor", "moe_loss_weight")
    of.elsewhere("moe_zloss_weight", "batched_load_balancing_loss", "moe_lbl_in_fp32", "moe_zloss_in_fp32")
    of.elsewhere("moe_expert_model_parallelism", "expert_parallel_group")
    of.check_known("moe", "expert")
    return options


def _flattened_torchtitan(values: dict[str, Any]) -> dict[str, Any]:
    """MoE.Config in the words of MoEArgs, which it took the place of in 0.3."""
    if "router" not in values:
        return {"num_shared_experts": 1, "score_before_experts": True, **values}
    router, routed = normalised(values["router"]), normalised(values["routed_experts"])
    flat = {**normalised(routed["inner_experts"]), **router, "load_balance_coeff": values.get("load_balance_coeff", 1e-3)}
    flat["gate_bias"] = normalised(flat.pop("gate", {})).get("bias", False)
    shared = values.get("shared_experts")
    if shared is not None:
        shared = normalised(shared)
        flat |= {"shared_hidden_dim": normalised(shared["w1"])["out_features"], "shared_gate": "gate" in shared}
    return flat


def _torchtitan(of: Configuration) -> dict[str, Any]:
    """torchtitan's MoE.Config, or MoEArgs with `dim` and `hidden_dim`. Its experts are SwiGLU."""
    of.values = _flattened_torchtitan(of.values)
    hidden = of.get("hidden_dim")
    shared = of.get("shared_hidden_dim", default=hidden * of.get("num_shared_experts", default=0))
    options = {
        "hidden_size": of.get("dim"),
        "expert_hidden_size": hidden,
        "num_experts": of.get("num_experts", default=8),
        "top_k": of.get("top_k", default=1),
        "glu": True,
        "activation": "silu",
        "router_score": of.get("score_func", default="sigmoid"),
        "renormalize": of.get("route_norm", default=False),
        "routing_scale": of.get("route_scale", default=1.0),
        "expert_bias": of.values.get("load_balance_coeff", 1e-3) is not None,
        "shared_expert_hidden_size": shared,
        "shared_expert_gate": of.get("shared_gate", default=False),
    }
    of.only("score_func", "softmax", "sigmoid", why="expected softmax or sigmoid")
    groups = of.get("num_expert_groups", default=None)
    if groups is not None:
        options |= {"expert_groups": groups, "top_groups": of.get("num_limited_groups"), "group_score": "top_two_sum"}
    of.only("score_before_experts", False, why="the routing weights are applied to the experts' results")
    of.only("gate_bias", False, why="the router has no bias")
    options["forced_routing"] = "balanced" if of.get("_debug_force_load_balance", default=False) else "none"
    of.elsewhere("router", "routed_experts", "shared_experts", "load_balance_coeff", "use_grouped_mm", "num_limited_groups")
    of.check_known("expert", "score", "route", "gate")
    return options


DIALECTS: dict[str, Callable[[Configuration], dict[str, Any]]] = {
    "megatron": megatron,
    "megablocks": _megablocks,
    "torchtitan": _torchtitan,
    "hf": hf,
}


def options_from(config: Any, dialect: str) -> dict[str, Any]:
    """Arguments of `MoE` for another library's configuration. ValueError with the key and the reason for what it
    cannot be."""
    if dialect not in DIALECTS:
        raise ValueError(f"dialect = {dialect!r}, expected one of {', '.join(DIALECTS)}")
    return DIALECTS[dialect](Configuration(dialect, config))
