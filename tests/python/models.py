"""Small models of Hugging Face's families with random weights, and batches for them."""

from __future__ import annotations

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
