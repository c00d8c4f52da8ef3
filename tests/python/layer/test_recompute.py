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
    """Of one step with that seed: the output, the load, which experts were chosen by what weights, and the gradients."""
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y, *routing = call(leaf)
    torch.rand(3, device=x.device)  # the program draws on, as other layers do
    y.square().sum().backward()
    return [y, *routing, leaf.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiled_checkpoint_of_the_module(kind, device):
    torch._dynamo.reset()
    layer = make(device, **kind)

    def run(x):
        out = layer(x)
        return out.output, out.expert_load, out.expert_ids, out.expert_weights

    compiled = torch.compile(
        lambda x: checkpoint(run, x, use_reentrant=False), fullgraph=True, backend="aot_eager"
    )
    for seed in range(3):
        x = torch.randn(40, 8, device=device, dtype=torch.float64)
        before = layer.stats().forwards
        found = results(compiled, layer, x, seed)
        assert layer.stats().forwards == before + 2, "one is computed again"
        # What backward trained is what forward chose.
        y, load, ids, weights, _, *gradients = found
        layer.zero_grad()
        again = layer(x, (ids, weights.detach()), may_skip=True)
        again.output.square().sum().backward()
        torch.testing.assert_close([again.output, again.expert_load], [y, load])
        for (name, parameter), gradient in zip(layer.named_parameters(), gradients, strict=True):
            if name.startswith("experts."):
                torch.testing.assert_close(parameter.grad, gradient, msg=name)
        if device.type == "cpu":  # on a GPU what is compiled draws from generators of its own
            torch.testing.assert_close(found, results(run, layer, x, seed))


def test_the_module_leaves_nothing_behind_in_forward(device):
    """Attributes that forward sets keep checkpointing out of one graph."""
    layer = make(device)
    before = dict(vars(layer))
    out = layer(torch.randn(5, 8, device=device, dtype=torch.float64))
    assert vars(layer) == before
    assert torch.equal(layer.stats().expert_load, out.expert_load.cpu())
    out.expert_load.zero_()  # the caller's to change
    assert layer.stats().expert_load.sum() == 10
