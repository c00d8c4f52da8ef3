"""torchtitan's MoE over our experts, against itself: the package from PyPI, on the CPU."""

import anabranch
import pytest
import torch
from ranks import preload, run_ranks

moe = pytest.importorskip(
    "torchtitan.models.common.moe", reason="no torchtitan: pip install torchtitan==0.3.0", exc_type=ImportError
)
preload("torchtitan.models.common.moe")
EXPERTS, HIDDEN, INNER, TOP_K = 4, 16, 16, 2


def make(seed, **options):
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    def linear(inputs, outputs):
        return Linear.Config(in_features=inputs, out_features=outputs, bias=False)

    torch.manual_seed(seed)
    shared = FeedForward.Config(w1=linear(HIDDEN, 8), w2=linear(8, HIDDEN), w3=linear(HIDDEN, 8))
    config = MoE.Config(
        num_experts=EXPERTS,
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=HIDDEN, hidden_dim=INNER, num_experts=EXPERTS),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=EXPERTS, top_k=TOP_K),
        ),
        router=TokenChoiceTopKRouter.Config(
            num_experts=EXPERTS, gate=linear(HIDDEN, EXPERTS), top_k=TOP_K, score_func="sigmoid", route_norm=True
        ),
        shared_experts=shared,
    )
    model = torch.nn.Sequential(config.build())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for buffer in model.buffers():
        torch.nn.init.zeros_(buffer)
    return model


def batch_of(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, HIDDEN, generator=generator), torch.randn(4, 5, HIDDEN, generator=generator)


def close(found, expected, what):
    """Theirs multiplies in bf16, two products after each other: a few roundings of 2⁻⁸ of what is largest."""
    assert (found - expected).abs().max() <= 16 * 2**-8 * expected.abs().max(), what


def swapped(rank, size, seed, dtensor):
    from anabranch.torchtitan_layer import RoutedExperts, swap_experts

    x, dy = batch_of(seed)
    plain = make(seed)
    expected = plain(x)
    (expected * dy).sum().div(size).backward()
    model = swap_experts(make(seed), dtensor=dtensor)
    assert isinstance(model[0].routed_experts, RoutedExperts)
    rows = slice(rank * 4 // size, (rank + 1) * 4 // size)
    found = model(x[rows])
    (found * dy[rows]).sum().backward()
    anabranch.finish_gradients(model)
    close(found, expected[rows], "output")
    theirs = plain[0].routed_experts.inner_experts
    up = torch.cat([theirs.w1_EFD.grad, theirs.w3_EFD.grad], 1)
    own = slice(rank * EXPERTS // size, (rank + 1) * EXPERTS // size)
    layer = model[0].routed_experts.inner_experts
    for parameter, whole in ((layer.experts.up_weight, up), (layer.experts.down_weight, theirs.w2_EDF.grad)):
        gradient = parameter.grad.to_local() if dtensor else parameter.grad
        close(gradient, whole[own], "experts")
    close(model[0].router.gate.weight.grad, plain[0].router.gate.weight.grad, "router")
    close(model[0].shared_experts.w1.weight.grad, plain[0].shared_experts.w1.weight.grad, "shared")
    # What torchtitan's optimizer hook balances by.
    load = model[0].tokens_per_expert_E.clone()
    torch.distributed.all_reduce(load)
    assert torch.equal(load, plain[0].tokens_per_expert_E)
    model[0].init_states()  # walks over what is not torchtitan's


@pytest.mark.parametrize("size, dtensor", [(1, False), (2, False), (4, True), (4, False)])
def test_swapped_experts(size, dtensor, seed):
    run_ranks(size, swapped, seed, dtensor)


def test_what_is_refused(seed):
    from anabranch.torchtitan_layer import swap_experts

    with pytest.raises(ValueError, match="has no MoE of torchtitan"):
        swap_experts(torch.nn.Linear(2, 2))
    model = make(seed)
    model[0].routed_experts.inner_experts = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the experts are Linear"):
        swap_experts(model)
