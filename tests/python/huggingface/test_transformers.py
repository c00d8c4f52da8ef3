"""One MoE block of each of Hugging Face's models against a layer of the same weights."""

import importlib

import anabranch
import pytest
import torch

HIDDEN, INNER, EXPERTS, TOP_K = 16, 12, 8, 3
SHARED = dict(n_shared_experts=2, n_group=4, topk_group=2, routed_scaling_factor=2.5)

# Module and prefix of the classes, options of its configuration.
MODELS = {
    "Mixtral": ("mixtral", "Mixtral", dict(num_local_experts=EXPERTS)),
    "Granite-MoE": ("granitemoe", "GraniteMoe", dict(num_local_experts=EXPERTS)),
    "Jamba": ("jamba", "Jamba", dict(num_experts=EXPERTS)),
    "OLMoE": ("olmoe", "Olmoe", dict(num_experts=EXPERTS, norm_topk_prob=False)),
    "OLMoE renormalised": ("olmoe", "Olmoe", dict(num_experts=EXPERTS, norm_topk_prob=True)),
    "FlexOLMo": ("flex_olmo", "FlexOlmo", dict(num_experts=EXPERTS, norm_topk_prob=False)),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3Moe", dict(num_experts=EXPERTS, norm_topk_prob=True)),
    "Qwen2-MoE": (
        "qwen2_moe", "Qwen2Moe",
        dict(num_experts=EXPERTS, norm_topk_prob=False, shared_expert_intermediate_size=20),
    ),
    "Qwen3-Next": (
        "qwen3_next", "Qwen3Next",
        dict(num_experts=EXPERTS, norm_topk_prob=True, shared_expert_intermediate_size=20),
    ),
    "DeepSeek-V2": ("deepseek_v2", "DeepseekV2", dict(n_routed_experts=EXPERTS, n_shared_experts=2, topk_method="greedy")),
    "DeepSeek-V2 in groups": (
        "deepseek_v2", "DeepseekV2",
        dict(n_routed_experts=EXPERTS, topk_method="group_limited_greedy", **SHARED),
    ),
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3", dict(n_routed_experts=EXPERTS, norm_topk_prob=True, **SHARED)),
    "GLM-4-MoE": ("glm4_moe", "Glm4Moe", dict(n_routed_experts=EXPERTS, norm_topk_prob=True, **SHARED)),
    "dots1": ("dots1", "Dots1", dict(n_routed_experts=EXPERTS, norm_topk_prob=False, **SHARED)),
    "ERNIE 4.5": ("ernie4_5_moe", "Ernie4_5_Moe", dict(moe_num_experts=EXPERTS, moe_num_shared_experts=2, moe_k=TOP_K)),
}  # fmt: skip


@torch.no_grad()
def make_block(module, prefix, options, device):
    """Their block with random weights, and its configuration."""
    models = importlib.import_module(f"transformers.models.{module}")
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    sizes = dict(hidden_size=HIDDEN, hidden_act="silu", intermediate_size=INNER, num_experts_per_tok=TOP_K, num_attention_heads=4)
    kind = getattr(models, f"{prefix}Config")
    if hasattr(kind(), "moe_intermediate_size"):
        sizes |= {"moe_intermediate_size": INNER, "intermediate_size": 20}
    config = kind(**sizes, **options)
    config._experts_implementation = "eager"
    block = next(
        getattr(code, f"{prefix}{name}")(config)
        for name in ("MoE", "Moe", "SparseMoeBlock")
        if hasattr(code, f"{prefix}{name}") and hasattr(getattr(code, f"{prefix}{name}")(config), "experts")
    )
    for parameter in block.parameters():
        parameter.normal_(std=HIDDEN**-0.5)
    for bias in biases(block):
        bias.normal_(std=0.3).sub_(1)  # negative ones too: no group is better for that
    return block.to(device), config


def router(block):
    return block.gate if hasattr(block, "gate") else block.router


def biases(block):
    return [value for name, value in block.state_dict(keep_vars=True).items() if name.endswith("e_score_correction_bias")]


@torch.no_grad()
def make_layer(block, config, device):
    """Ours by the same configuration, with the same weights."""
    layer = anabranch.MoE.from_config(config, "hf", device=device, dtype=torch.float32)
    layer.router.weight.copy_(router(block).weight)
    layer.experts.up_weight.copy_(block.experts.gate_up_proj)
    layer.experts.down_weight.copy_(block.experts.down_proj)
    shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    assert (shared is not None) == (layer.options["shared_expert_hidden_size"] > 0)
    if shared is not None:
        layer.shared_expert.up_weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight])[None])
        layer.shared_expert.down_weight.copy_(shared.down_proj.weight[None])
    assert hasattr(block, "shared_expert_gate") == layer.options["shared_expert_gate"]
    if layer.options["shared_expert_gate"]:
        layer.shared_expert_gate.copy_(block.shared_expert_gate.weight)
    assert bool(biases(block)) == layer.options["expert_bias"]
    for bias in biases(block):
        layer.router.expert_bias.copy_(bias.flatten())
    return layer


def chosen(block, x):
    return router(block)(x.flatten(0, -2))[2].sort(-1).values


@torch.no_grad()
def draw_input(block, device):
    """Tokens whose experts rounding does not change."""
    for _ in range(1000):
        x = torch.randn(3, 11, HIDDEN, device=device)
        if all(chosen(block, x + 1e-5 * torch.randn_like(x)).equal(chosen(block, x)) for _ in range(8)):
            return x
    pytest.fail("what the block's router returns third, in this transformers, are no experts' numbers")


@pytest.mark.parametrize("name", MODELS)
def test_equals_their_block(name, device):
    block, config = make_block(*MODELS[name], device)
    layer = make_layer(block, config, device)
    x = draw_input(block, device)
    dy = torch.randn_like(x)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(ours)
    (out.output * dy).sum().backward()
    expected = block(theirs)
    (expected * dy).sum().backward()

    # Sums of fewer than a hundred terms of the order of 1, rounded to 2⁻²⁴ each.
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.output, expected, **close)
    torch.testing.assert_close(ours.grad, theirs.grad, **close)
    torch.testing.assert_close(layer.router.weight.grad, router(block).weight.grad, **close)
    torch.testing.assert_close(layer.experts.up_weight.grad, block.experts.gate_up_proj.grad, **close)
    load = torch.bincount(chosen(block, x).flatten(), minlength=EXPERTS)
    assert out.expert_load.equal(load)
