"""Small models of Hugging Face's families with random weights, and batches for them."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import Tensor

VOCABULARY, HIDDEN, EXPERT_HIDDEN, LAYERS = 64, 16, 12, 2
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.5,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _mixtral(experts: int, **options):
    return transformers.MixtralConfig(
        **{**_COMMON, "intermediate_size": EXPERT_HIDDEN, "num_local_experts": experts, "num_experts_per_tok": 2, **options}
    )


def _olmoe(experts: int, **options):
    return transformers.OlmoeConfig(
        **{**_COMMON, "intermediate_size": EXPERT_HIDDEN, "num_experts": experts, "num_experts_per_tok": 3, **options}
    )


def _qwen3_moe(experts: int, **options):
    return transformers.Qwen3MoeConfig(
        **{
            **_COMMON,
            "head_dim": 4,
            "intermediate_size": 20,
            "moe_intermediate_size": EXPERT_HIDDEN,
            "num_experts": experts,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
            **options,
        }
    )


def _deepseek_v3(experts: int, **options):
    groups = dict(n_group=1, topk_group=1) if experts % 2 else dict(n_group=experts // 2, topk_group=2)
    sizes = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
    return transformers.DeepseekV3Config(
        **{
            **_COMMON,
            **sizes,
            **groups,
            "num_key_value_heads": 4,
            "intermediate_size": 20,
            "moe_intermediate_size": EXPERT_HIDDEN,
            "n_routed_experts": experts,
            "n_shared_experts": 2,
            "num_experts_per_tok": 3,
            "first_k_dense_replace": 1,
            **options,
        }
    )


_MOE = dict(moe_intermediate_size=EXPERT_HIDDEN, intermediate_size=20, num_experts_per_tok=2)
_PLAIN = dict(intermediate_size=EXPERT_HIDDEN, num_experts_per_tok=2)
_SHARED = dict(_MOE, head_dim=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
_MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, num_key_value_heads=4)
_LINEAR = dict(linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=4, linear_value_head_dim=4)
_MAMBA = dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4, mamba_dt_rank=4)
MORE = {
    "AriaText": dict(_PLAIN, moe_num_experts=6, moe_topk=2, moe_num_shared_experts=1),
    "DeepseekV2": {**_SHARED, **_MLA, "n_routed_experts": 6, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    "Dots1": dict(_SHARED, n_routed_experts=6),
    "Ernie4_5_Moe": dict(_MOE, moe_num_experts=6, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
    "ExaoneMoe": dict(_SHARED, num_experts=6, num_shared_experts=1),
    "FlexOlmo": dict(_PLAIN, num_experts=6),
    "Glm4Moe": dict(_SHARED, n_routed_experts=6),
    "GraniteMoe": dict(_PLAIN, num_local_experts=6),
    "HunYuanMoEV1": dict(_PLAIN, num_experts=6, moe_topk=2, head_dim=4),
    "Jamba": dict(_PLAIN, **_MAMBA, num_experts=6, expert_layer_period=2, expert_layer_offset=1),
    "Lfm2Moe": dict(_MOE, num_experts=6, num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "MiniMax": dict(_PLAIN, num_local_experts=6, head_dim=4, block_size=4),
    "Phimoe": dict(_PLAIN, num_local_experts=6),
    "Qwen2Moe": dict(_MOE, num_experts=6, shared_expert_intermediate_size=10),
    "Qwen3Next": dict(
        _MOE, **_LINEAR, head_dim=4, num_experts=6, shared_expert_intermediate_size=10,
        layer_types=["linear_attention", "full_attention"],
    ),
    "SolarOpen": dict(_SHARED, n_routed_experts=6),
}  # fmt: skip
"""By the prefix of their classes: further families whose experts convert swaps."""


def make_more(family: str, seed: int, experts: int = 6) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    numbers = {name: experts for name in MORE[family] if name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")}
    config = getattr(transformers, f"{family}Config")(**{**_COMMON, **MORE[family], **numbers})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def chosen_experts(model: transformers.PreTrainedModel, batch: Tensor) -> list[Tensor]:
    """Of each layer, [T, top_k]."""
    found: list[Tensor] = []
    experts = [module for module in model.modules() if isinstance(getattr(module, "down_proj", None), Tensor)]
    hooks = [each.register_forward_pre_hook(lambda _, given: found.append(given[1])) for each in experts]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return found


def make_settled_batch(model: transformers.PreTrainedModel, seed: int) -> Tensor:
    """Token ids [B, S] whose experts fp32 chooses as fp64 does."""
    generator = torch.Generator().manual_seed(seed)
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # the grouped one takes no fp64
    while True:
        batch = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
        if all(map(torch.equal, chosen_experts(model, batch), chosen_experts(wide, batch))):
            return batch


CONFIGS = {"mixtral": _mixtral, "olmoe": _olmoe, "qwen3_moe": _qwen3_moe, "deepseek_v3": _deepseek_v3}
FAMILIES = list(CONFIGS)


def make_model(family: str, seed: int, experts: int = 6, **options) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](experts, **options))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    return model


def make_batch(model: transformers.PreTrainedModel, seed: int, sequences: int = 4, length: int = 9) -> Tensor:
    """Token ids [B, S] whose experts rounding does not change: no choice is closer than 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    top_k = model.config.num_experts_per_tok
    while True:
        batch = torch.randint(3, VOCABULARY, (sequences, length), generator=generator)
        with torch.no_grad():
            logits = torch.cat(model(batch, output_router_logits=True).router_logits)
        ordered = logits.sort(-1, descending=True).values
        if (ordered[:, top_k - 1] - ordered[:, top_k]).min() > 1e-4:
            return batch


def tolerance(expected: Tensor, batch: Tensor) -> float:
    """Each addition on the way through all layers, forwards and back, may err by one unit roundoff of what is
    largest in the result."""
    additions = LAYERS * (4 * HIDDEN + EXPERT_HIDDEN + batch.numel()) + VOCABULARY
    return 2 * additions * 2.0**-24 * expected.abs().max().item()


def assert_close(actual: Tensor, expected: Tensor, batch: Tensor, what: str) -> None:
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    error = (actual - expected).abs().max().item()
    assert error <= tolerance(expected, batch), f"{what}: off by {error:.3g} where {expected.abs().max():.3g} is largest"
