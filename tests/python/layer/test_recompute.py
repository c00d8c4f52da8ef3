"""torch.compile over activation checkpointing: what is computed again draws the same numbers again."""

import anabranch
import pytest
import torch
from torch.utils.checkpoint import checkpoint

KINDS = [{"gate": "noisy_top_k"}, {"gate": "gshard"}, {"jitter": 0.4}, {}]


def make(device, **kind):
    layer = anabranch.MoE(8, 12, 8, 2, device=device, dtype=torch.float64, **kind)
    if kind.get("gate") == "noisy_top_k":
        with torch.no_grad():
            layer.router.noise_weight.normal_()
    return layer


def results(call, layer, x, seed):
    """Of one step with that seed: the output, which experts were chosen, and the gradients."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y, load = call(leaf)
    torch.rand(3, device=x.device)  # the program draws on, as other layers do
    y.square().sum().backward()
    return [y, load, leaf.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiled_checkpoint_of_the_module(kind, device):
    torch._dynamo.reset()
    layer = make(device, **kind)

    def run(x):
        out = layer(x)
        return out.output, out.expert_load

    compiled = torch.compile(
        lambda x: checkpoint(run, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    for seed in range(3):
        x = torch.randn(40, 8, device=device, dtype=torch.float64)
        before = layer.stats().forwards
        for actual, expected in zip(results(compiled, layer, x, seed), results(run, layer, x, seed), strict=True):
            torch.testing.assert_close(actual, expected)
        assert layer.stats().forwards == before + 3, "one is computed again"


def test_the_module_leaves_nothing_behind_in_forward(device):
    """Attributes that forward sets keep checkpointing out of one graph."""
    layer = make(device)
    before = dict(vars(layer))
    out = layer(torch.randn(5, 8, device=device, dtype=torch.float64))
    assert vars(layer) == before
    assert torch.equal(layer.stats().expert_load, out.expert_load.cpu())
    out.expert_load.zero_()  # the caller's to change
    assert layer.stats().expert_load.sum() == 10
