"""Configurations of Hugging Face's transformers in the words of `MoE`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .configuration import Configuration


def _softmax(of: Configuration, **more: Any) -> dict[str, Any]:
    return {"router_score": "softmax", **more}


def _softmax_if_asked(of: Configuration, **more: Any) -> dict[str, Any]:
    return _softmax(of, renormalize=of.get("norm_topk_prob", default=False), **more)


def _qwen_shared(of: Configuration) -> dict[str, Any]:
    return _softmax_if_asked(
        of, shared_expert_hidden_size=of.get("shared_expert_intermediate_size"), shared_expert_gate=True
    )


def _deepseek_shared(of: Configuration) -> dict[str, Any]:
    number = of.get("n_shared_experts", "moe_num_shared_experts", default=0)
    return {"shared_expert_hidden_size": of.get("moe_intermediate_size") * number}


def _deepseek_v2(of: Configuration) -> dict[str, Any]:
    of.only("topk_method", "greedy", "group_limited_greedy", why="expected greedy or group_limited_greedy")
    options = _softmax(of, renormalize=False, routing_scale=of.get("routed_scaling_factor", default=1.0))
    if of.get("topk_method", default="greedy") == "group_limited_greedy":
        options |= {"expert_groups": of.get("n_group"), "top_groups": of.get("topk_group"), "group_score": "maximum"}
    return options | _deepseek_shared(of)


def _deepseek_v3(of: Configuration) -> dict[str, Any]:
    return {
        "router_score": "sigmoid",
        "renormalize": of.get("norm_topk_prob", default=True),
        "routing_scale": of.get("routed_scaling_factor", default=1.0),
        "expert_bias": True,
        "expert_groups": of.get("n_group", default=1),
        "top_groups": of.get("topk_group", default=1),
        "group_score": "top_two_sum",
        **_deepseek_shared(of),
    }


def _ernie(of: Configuration) -> dict[str, Any]:
    return _softmax(of, renormalize=True, expert_bias=True, **_deepseek_shared(of))


def _mixtral(of: Configuration) -> dict[str, Any]:
    of.only("router_jitter_noise", 0.0, why="jitter is of the router's input alone here, there of the experts' too")
    return _softmax(of, renormalize=True)


_FAMILIES: dict[str, Callable[[Configuration], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "granitemoe": functools.partial(_softmax, renormalize=True),
    "jamba": functools.partial(_softmax, renormalize=False),
    **dict.fromkeys(["olmoe", "flex_olmo", "qwen3_moe"], _softmax_if_asked),
    **dict.fromkeys(["qwen2_moe", "qwen3_next"], _qwen_shared),
    "deepseek_v2": _deepseek_v2,
    **dict.fromkeys(["deepseek_v3", "glm4_moe", "dots1"], _deepseek_v3),
    "ernie4_5_moe": _ernie,
}
"""By `model_type`: how the family's router chooses, and its shared expert."""


def hf(of: Configuration) -> dict[str, Any]:
    """A configuration of transformers: of its Mixture-of-Experts layers."""
    kind = of.get("model_type")
    if kind not in _FAMILIES:
        of.refuse("model_type", f"expected one of {', '.join(sorted(_FAMILIES))}; convert(model) takes more, with their own routers")
    return {
        "hidden_size": of.get("hidden_size"),
        "expert_hidden_size": of.get("moe_intermediate_size", "intermediate_size"),
        "num_experts": of.get("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"),
        "top_k": of.get("num_experts_per_tok", "moe_k"),
        "glu": True,
        "activation": of.activation("hidden_act", default="silu"),
        **_FAMILIES[kind](of),
    }
