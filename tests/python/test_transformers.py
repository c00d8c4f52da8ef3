"""One MoE block of each of Hugging Face's models against a layer of the same weights."""

import importlib

import anabranch
import pytest
import torch

HIDDEN, INNER, EXPERTS, TOP_K = 16, 12, 8, 3
COUNT = dict(num_experts_per_tok=TOP_K)

# Module and prefix of the classes, options of its configuration, options of the layer.
MODELS = {
    "OLMoE": (
        "olmoe", "Olmoe",
        dict(intermediate_size=INNER, num_experts=EXPERTS, norm_topk_prob=False),
        dict(renormalize=False),
    ),
    "OLMoE renormalised": (
        "olmoe", "Olmoe",
        dict(intermediate_size=INNER, num_experts=EXPERTS, norm_topk_prob=True),
        dict(renormalize=True),
    ),
    "Mixtral": (
        "mixtral", "Mixtral",
        dict(intermediate_size=INNER, num_local_experts=EXPERTS),
        dict(renormalize=True),
    ),
    "Qwen3-MoE": (
        "qwen3_moe", "Qwen3Moe",
        dict(moe_intermediate_size=INNER, num_experts=EXPERTS, norm_topk_prob=True),
        dict(renormalize=True),
    ),
    "Qwen2-MoE": (
        "qwen2_moe", "Qwen2Moe",
        dict(
            moe_intermediate_size=INNER, num_experts=EXPERTS, norm_topk_prob=False,
            shared_expert_intermediate_size=20,
        ),
        dict(renormalize=False, shared_expert_hidden_size=20, shared_expert_gate=True),
    ),
    "DeepSeek-V3": (
        "deepseek_v3", "DeepseekV3",
        dict(
            moe_intermediate_size=INNER, n_routed_experts=EXPERTS, n_shared_experts=2, norm_topk_prob=True,
            n_group=4, topk_group=2, routed_scaling_factor=2.5,
        ),
        dict(
            router_score="sigmoid", renormalize=True, expert_bias=True, expert_groups=4, top_groups=2,
            routing_scale=2.5, shared_expert_hidden_size=2 * INNER,
        ),
    ),
}  # fmt: skip


def make_layer(more, device):
    layer = anabranch.MoE(
        HIDDEN, INNER, EXPERTS, TOP_K, activation="silu", glu=True, device=device, dtype=torch.float32, **more
    )
    with torch.no_grad():
        layer.router.weight.normal_(std=HIDDEN**-0.5)
        if "expert_bias" in more:
            layer.router.expert_bias.normal_(std=0.3).sub_(1)  # negative ones too: no group is better for that
    return layer


@torch.no_grad()
def make_block(module, prefix, options, layer, device):
    """Their block with the layer's weights."""
    models = importlib.import_module(f"transformers.models.{module}")
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = getattr(models, f"{prefix}Config")(hidden_size=HIDDEN, hidden_act="silu", **COUNT, **options)
    config._experts_implementation = "eager"
    kind = getattr(code, f"{prefix}MoE", None) or getattr(code, f"{prefix}SparseMoeBlock")
    block = kind(config).to(device)
    block.gate.weight.copy_(layer.router.weight)
    block.experts.gate_up_proj.copy_(layer.experts.up_weight)
    block.experts.down_proj.copy_(layer.experts.down_weight)
    shared = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    if shared is not None:
        gate, up = layer.shared_expert.up_weight[0].chunk(2)
        shared.gate_proj.weight.copy_(gate)
        shared.up_proj.weight.copy_(up)
        shared.down_proj.weight.copy_(layer.shared_expert.down_weight[0])
    if layer.options["shared_expert_gate"]:
        block.shared_expert_gate.weight.copy_(layer.shared_expert_gate)
    if layer.options["expert_bias"]:
        block.gate.e_score_correction_bias.copy_(layer.router.expert_bias)
    return block


def chosen(block, x):
    return block.gate(x)[2].sort(-1).values


@torch.no_grad()
def draw_input(block, device):
    """Tokens whose experts rounding does not change."""
    while True:
        x = torch.randn(3, 11, HIDDEN, device=device)
        if all(chosen(block, x + 1e-5 * torch.randn_like(x)).equal(chosen(block, x)) for _ in range(8)):
            return x


@pytest.mark.parametrize("name", MODELS)
def test_equals_their_block(name, device):
    module, prefix, options, more = MODELS[name]
    layer = make_layer(more, device)
    block = make_block(module, prefix, options, layer, device)
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
    torch.testing.assert_close(layer.router.weight.grad, block.gate.weight.grad, **close)
    torch.testing.assert_close(layer.experts.up_weight.grad, block.experts.gate_up_proj.grad, **close)
    load = torch.bincount(chosen(block, x).flatten(), minlength=EXPERTS)
    assert out.expert_load.equal(load)
