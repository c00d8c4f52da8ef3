"""Megatron-Core's options in the words of `MoE`."""

from __future__ import annotations

from typing import Any

from .configuration import Configuration

_HOW = (
    *("moe_router_bias_update_rate", "moe_router_quantile_balancing_ema"),
    *("moe_layer_freq", "moe_layer_recompute", "moe_per_layer_logging", "moe_grad_scale_func"),
    *("expert_model_parallel_size", "expert_tensor_parallel_size", "moe_token_dispatcher_type", "moe_enable_deepep"),
    *("moe_grouped_gemm", "moe_use_legacy_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias"),
    *("moe_shared_expert_overlap", "overlap_moe_expert_parallel_comm", "moe_router_fusion", "moe_token_drop_policy"),
    *("moe_router_padding_for_fp8", "moe_router_padding_for_quantization", "moe_enable_routing_replay"),
    "moe_pad_experts_for_cuda_graph_inference",
)
"""How they compute or train, not what a layer computes."""
_HOW_BEGINS = ("moe_deepep_", "moe_hybridep_", "moe_ncclep_", "moe_flex_", "moe_permute_", "moe_paged_", "inference_moe_")


def megatron(of: Configuration) -> dict[str, Any]:
    """Megatron-Core's TransformerConfig, or its command line's names."""
    top_k = of.get("moe_router_topk", default=2)
    swiglu, gated = of.get("swiglu", default=False), of.get("gated_linear_unit", default=False)
    options = {
        "hidden_size": of.get("hidden_size"),
        "expert_hidden_size": of.get("moe_ffn_hidden_size", "ffn_hidden_size"),
        "num_experts": of.get("num_moe_experts", "num_experts"),
        "top_k": top_k,
        "glu": swiglu or gated,
        "activation": of.activation("activation_func", default="silu" if swiglu else "gelu"),
        "bias": of.get("add_bias_linear", default=not of.get("disable_bias_linear", default=False)),
        "shared_expert_hidden_size": of.get("moe_shared_expert_intermediate_size", default=0),
        "shared_expert_gate": of.get("moe_shared_expert_gate", default=False),
        "routing_scale": of.get("moe_router_topk_scaling_factor", default=1.0),
        "expert_bias": of.get("moe_router_enable_expert_bias", default=False),
        "latent_size": of.get("moe_latent_size", default=0),
        "router_fp64": of.get("moe_router_dtype", default="fp32") == "fp64",
        "forced_routing": "random" if of.get("moe_router_force_load_balancing", default=False) else "none",
        "activation_limit": of.get("activation_func_clamp_value", default=0.0),
        "glu_offset": of.get("glu_linear_offset", default=0.0),
        "jitter": of.get("moe_input_jitter_eps", default=0.0),
    }
    if options["latent_size"] and options["bias"]:
        of.refuse("moe_latent_size", "the projections around the experts have biases there with add_bias_linear")
    if not options["glu"] and options["activation_limit"]:
        of.refuse("activation_func_clamp_value", "without a gate nothing is clamped there")
    if options["activation"] == "gelu" and not options["glu"] and of.get("bias_activation_fusion", default=False):
        options["activation"] = "gelu_tanh"  # what their fused kernel computes
    _refuse(of)
    options |= _scores(of, top_k) | _groups(of) | _losses(of)
    of.elsewhere(*_HOW, *(key for key in of.values if key.startswith(_HOW_BEGINS)))
    of.check_known("moe", "expert")
    return options


def _refuse(of: Configuration) -> None:
    """What no layer here computes."""
    why = "nothing is dropped or padded here"
    of.only("moe_expert_capacity_factor", why=why)
    of.only("moe_expert_rank_capacity_factor", why=why)
    of.only("moe_pad_expert_input_to_capacity", False, why=why)
    of.only("moe_token_dropping", False, why=why)
    of.only("moe_apply_probs_on_input", False, why="the routing weights are applied to the experts' results")
    of.only("moe_router_dtype", "fp32", "fp64", why="the router computes in fp32, or in fp64")
    of.only("moe_router_force_biased", why="the router's choices are not forced so")
    of.only("moe_router_topk_limited_devices", why="deprecated there: give moe_router_num_groups and _group_topk")
    of.only("moe_mlp_glu_interleave_size", why="rows of the gate lie before those of up")
    of.only("moe_shared_expert_glu_interleave_size", why="rows of the gate lie before those of up")


def _losses(of: Configuration) -> dict[str, Any]:
    """Coefficients: each of one loss, or of a list of them."""
    kinds = of.get("moe_router_load_balancing_type", default="none")
    if kinds == "sinkhorn":
        kinds = "none"  # a gate, see _scores
    coefficients = of.get("moe_aux_loss_coeff", default=0.0)
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    coefficients = [float(each) for each in (coefficients if isinstance(coefficients, (list, tuple)) else [coefficients])]
    names = {"aux_loss": "balance_coefficient", "global_aux_loss": "global_balance_coefficient"}
    names |= {"seq_aux_loss": "sequence_balance_coefficient"}
    if any(kind not in {"none", *names} for kind in kinds) or len(kinds) != len(coefficients):
        known = ", ".join(["none", *names])
        of.refuse("moe_router_load_balancing_type", f"expected one of {known}, or a list of them, each with a coefficient")
    found = {"z_coefficient": of.get("moe_z_loss_coeff", default=0.0)}
    for kind, coefficient in zip(kinds, coefficients):
        if kind != "none":
            found[names[kind]] = found.get(names[kind], 0.0) + coefficient
    return found


def _scores(of: Configuration, top_k: int) -> dict[str, Any]:
    score = of.get("moe_router_score_function", default="softmax")
    before = of.get("moe_router_pre_softmax", default=False)
    of.only("moe_router_score_function", "softmax", "sigmoid", "sqrtsoftplus", why="expected one of these")
    if of.get("moe_router_load_balancing_type", default="none") == "sinkhorn":
        return {"gate": "sinkhorn", "router_score": "sigmoid" if top_k == 1 else "softmax", "renormalize": False}
    if score != "softmax":
        return {"router_score": {"sqrtsoftplus": "sqrt_softplus"}.get(score, score), "renormalize": top_k > 1}
    if top_k == 1 and not before:
        of.refuse("moe_router_pre_softmax", "softmax over one expert has no gradient, and is refused there too")
    return {"router_score": "softmax", "renormalize": not before}


def _groups(of: Configuration) -> dict[str, Any]:
    """Theirs scores a group by the sum of its best top_k / group_topk experts: of logits with the softmax after
    top-k, of scores otherwise."""
    groups, taken = of.get("moe_router_num_groups", default=1), of.get("moe_router_group_topk", default=0)
    if not taken:
        return {}
    softmax = of.get("moe_router_score_function", default="softmax") == "softmax"
    after = softmax and not of.get("moe_router_pre_softmax", default=False)
    score = "top_share_logit_sum" if after else "top_share_sum"
    return {"expert_groups": groups, "top_groups": taken, "group_score": score}
