"""Megatron-Core's MoE layer over our experts, against its own: the package from PyPI, on the CPU."""


import pytest
import torch
from ranks import preload, run_ranks

pytest.importorskip(
    "megatron.core.transformer.moe.moe_layer", reason="no Megatron-Core: pip install megatron-core==0.16.1", exc_type=ImportError
)
preload("megatron.core.transformer.moe.moe_layer")
EXPERTS, HIDDEN, INNER, TOP_K = 4, 16, 12, 2
KINDS = {
    "swiglu": dict(gated_linear_unit=True, activation_func=torch.nn.functional.silu),
    "gelu": dict(activation_func=torch.nn.functional.gelu),
    "sigmoid": dict(
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=2.5,
    ),
    "dropping": dict(activation_func=torch.nn.functional.gelu, moe_expert_capacity_factor=0.7),
}  # fmt: skip


def config_of(kind):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=EXPERTS, moe_ffn_hidden_size=INNER,
        moe_router_topk=TOP_K, add_bias_linear=False, use_cpu_initialization=True, moe_token_dispatcher_type="allgather",
        moe_router_load_balancing_type="none", **KINDS[kind],
    )  # fmt: skip


def on_the_cpu():
    """Megatron's router asks for a GPU, and for Transformer Engine, whose place nothing takes."""
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: torch.device("cpu")
    moe_utils.te_general_gemm = None


def built(spec, **arguments):
    """Of Megatron-Core 0.16 a spec is a ModuleSpec, of 0.19 a builder."""
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    return build_module(spec, **arguments) if isinstance(spec, ModuleSpec) else spec(**arguments)


def layers_of(kind, size, seed):
    """Theirs and ours, of the same weights; theirs has all experts."""
    from anabranch.megatron_layer import MoELayer, moe_layer_spec
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    on_the_cpu()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=size)
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS)
    config = config_of(kind)
    groups = get_default_pg_collection()
    theirs = None
    if size == 1:
        theirs = built(spec, config=config)
    ours = built(moe_layer_spec(spec), config=config, pg_collection=groups)
    assert type(ours) is MoELayer
    torch.manual_seed(seed)
    up = torch.randn(EXPERTS, INNER * (2 if config.gated_linear_unit else 1), HIDDEN) * 0.3
    down, gate = torch.randn(EXPERTS, HIDDEN, INNER) * 0.3, torch.randn(EXPERTS, HIDDEN)
    own = slice(ours.experts.group.rank * EXPERTS // size, (ours.experts.group.rank + 1) * EXPERTS // size)
    with torch.no_grad():
        ours.router.weight.copy_(gate)
        ours.experts.experts.up_weight.copy_(up[own])
        ours.experts.experts.down_weight.copy_(down[own])
        if theirs is not None:
            theirs.router.weight.copy_(gate)
            for expert, weight, other in zip(theirs.experts.local_experts, up, down, strict=True):
                expert.linear_fc1.weight.copy_(weight)
                expert.linear_fc2.weight.copy_(other)
    return theirs, ours


def batch_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, HIDDEN, generator=generator), torch.randn(6, 2, HIDDEN, generator=generator)


def run(layer, x, dy):
    x = x.clone().requires_grad_()
    output, bias = layer(x)
    assert bias is None
    (output * dy).sum().backward()
    return output.detach(), x.grad


def beside_theirs(rank, size, seed):
    results = {}
    for kind in KINDS:
        theirs, ours = layers_of(kind, size, seed)
        x, dy = batch_of(seed)
        expected, found = run(theirs, x, dy), run(ours, x, dy)
        # fp32: sums of fewer than a hundred terms of the order of 1
        close = dict(rtol=1e-4, atol=1e-5)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other, **close, msg=lambda text, kind=kind: f"{kind}: {text}")
        torch.testing.assert_close(ours.router.weight.grad, theirs.router.weight.grad, **close)
        for gradient, expert in zip(ours.experts.experts.up_weight.grad, theirs.experts.local_experts, strict=True):
            wanted = expert.linear_fc1.weight.grad
            torch.testing.assert_close(gradient, torch.zeros_like(gradient) if wanted is None else wanted, **close)
        assert all(parameter.allreduce for parameter in ours.experts.experts.parameters())
        results[kind] = (expected[0].tolist(), ours.experts.experts.up_weight.grad.tolist())
    return results


def over_ranks(rank, size, seed, expected):
    for kind in ("swiglu", "sigmoid"):
        _, ours = layers_of(kind, size, seed)
        assert ours.experts.group.size == size
        assert not any(parameter.allreduce for parameter in ours.experts.experts.parameters())
        x, dy = batch_of(seed)
        rows = slice(rank * 6 // size, (rank + 1) * 6 // size)
        found = run(ours, x[rows], dy[rows])
        whole, gradient = (torch.tensor(value) for value in expected[kind])
        own = slice(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
        torch.testing.assert_close(found[0], whole[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.experts.experts.up_weight.grad, gradient[own], rtol=1e-4, atol=1e-5)
        with pytest.raises(NotImplementedError, match=r"anabranch\.save_checkpoint"):
            ours.sharded_state_dict()


def test_it_is_theirs(seed):
    (expected,) = run_ranks(1, beside_theirs, seed)
    for size in (2, 4):
        run_ranks(size, over_ranks, seed, expected)


def refused(rank, size):
    from anabranch.megatron_layer import MoELayer, moe_layer_spec

    layers_of("gelu", 1, 1)
    for option, value, match in (("moe_latent_size", 8, "moe_latent_size = 8"), ("activation_func", torch.sin, "activation_func")):
        config = config_of("gelu")
        object.__setattr__(config, option, value)
        with pytest.raises(ValueError, match=match):
            MoELayer(config)
    with pytest.raises(TypeError, match="expected that of a MoE layer"):
        moe_layer_spec(3)


def test_what_is_refused():
    run_ranks(1, refused)


def test_routing_of_tokens_with_fewer_experts():
    from anabranch.megatron_layer import routing_of

    probabilities = torch.tensor([[0.1, 0.0, 0.7], [0.0, 0.0, 0.0]], dtype=torch.float32)
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    ids, weights = routing_of(probabilities, chosen, 2)
    assert ids[0].tolist() == [2, 0] and ids[1, 0] == 1 and ids[1, 1] != 1
    torch.testing.assert_close(weights, torch.tensor([[0.7, 0.1], [0.0, 0.0]]))
