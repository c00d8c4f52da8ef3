"""Routers of other kinds, against plain PyTorch: which experts and which weights, and their gradients."""

import anabranch
import pytest
import reference
import torch
from case import parameters_of

EXPERTS = 8


def routed(logits, bias, layer):
    """Ids and weights by the options' words: DeepSeek-V3's router, of which the others are parts."""
    options = layer.options
    scores = logits.sigmoid() if options["router_score"] == "sigmoid" else logits.softmax(-1)
    choice = scores.detach() + bias
    groups, top_k = options["expert_groups"], options["top_k"]
    if groups > 1:
        of_group = choice.view(-1, groups, EXPERTS // groups)
        if options["group_score"] == "maximum":
            best = of_group.max(-1).values
        else:
            best = of_group.topk(2, dim=-1).values.sum(-1)
        taken = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(options["top_groups"]).indices, True)
        choice = of_group.masked_fill(~taken.unsqueeze(-1), -torch.inf).view_as(choice)
    ids = choice.topk(top_k).indices
    weights = scores.gather(1, ids)
    if options["renormalize"]:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * options["routing_scale"]


@pytest.mark.parametrize(
    "options",
    [
        {"router_score": "sigmoid"},
        {"router_score": "sigmoid", "renormalize": False, "routing_scale": 2.5},
        {"expert_bias": True},
        {"expert_groups": 4, "top_groups": 2, "group_score": "maximum", "renormalize": False, "routing_scale": 16.0},
        {"router_score": "sigmoid", "expert_bias": True, "expert_groups": 4, "top_groups": 2, "routing_scale": 2.5},
        {"shared_expert_hidden_size": 6, "shared_expert_gate": True},
    ],
    ids=str,
)
def test_equals_plain_pytorch(options, device):
    layer = anabranch.MoE(6, 5, EXPERTS, 3, glu=True, activation="silu", dtype=torch.float64, device=device, **options)
    if "expert_bias" in options:
        layer.router.expert_bias.uniform_(-0.1, 0.1)
        assert "router.expert_bias" in layer.state_dict() and "router.expert_bias" in dict(layer.named_buffers())
    x = torch.randn(29, 6, dtype=torch.float64, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    (layer(x).output * dy).sum().backward()

    leaf = x.detach().cpu().requires_grad_()
    leaves = {name: value.requires_grad_() for name, value in parameters_of(layer).items()}
    bias = layer.router.expert_bias.cpu() if "expert_bias" in options else 0.0
    ids, weights = routed(leaf @ leaves["router.weight"].T, bias, layer)
    plain = reference.Options(top_k=3, glu=True, activation="silu")
    only_experts = {name: value for name, value in leaves.items() if not name.startswith("shared")}
    y = reference.mix(leaf, only_experts, ids, weights, plain)
    if "shared_expert_gate" in leaves:
        shared = reference.feed_forward(leaf, leaves, "shared_expert.", 0, plain)
        y = y + (leaf @ leaves["shared_expert_gate"].T).sigmoid() * shared
    (y * dy.cpu()).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), leaf.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), leaves[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_expert_bias_follows_the_load(device):
    layer = anabranch.MoE(6, 5, 4, expert_bias=True, device=device)
    layer.update_expert_bias(torch.tensor([9, 3, 4, 0], device=device), 0.5)
    torch.testing.assert_close(layer.router.expert_bias.cpu(), torch.tensor([-0.5, 0.5, 0.0, 0.5]))
    with pytest.raises(ValueError, match="load"):
        layer.update_expert_bias(torch.tensor([1, 2], device=device), 0.5)


def test_megatrons_sinkhorn(device):
    """Theirs ends where its factors no longer change, ours within a thousandth of even sums: who is clear is the same."""
    utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    layer = anabranch.MoE(6, 5, EXPERTS, 2, gate="sinkhorn", dtype=torch.float64, device=device)
    x = torch.randn(400, 6, dtype=torch.float64, device=device)
    x[:, 0] = 1  # some experts are everyone's favourites
    ids = layer(x).expert_ids.cpu()
    logits = (x @ layer.router.weight.detach().T).cpu()
    best = utils.sinkhorn(logits, tol=1e-6).log().topk(3)
    clear = best.values[:, 1] - best.values[:, 2] > 0.02
    assert clear.sum() > 300
    assert torch.equal(ids[clear].sort(-1).values, best.indices[clear, :2].sort(-1).values)
    own = layer.eval()(x).expert_ids.cpu()
    assert not torch.equal(own, ids) and torch.equal(own, logits.topk(2).indices)


@pytest.mark.parametrize("gate", ["noisy_top_k", "gshard"])
def test_gates_that_draw_lots(gate, device):
    layer = anabranch.MoE(6, 5, 4, 2, gate=gate, device=device)
    x = torch.randn(200, 6, device=device, requires_grad=True)
    out = layer(x)
    losses = [loss for loss in out[1:] if loss is not None and loss.is_floating_point() and loss.dim() == 0]
    assert len(losses) == (4 if gate == "noisy_top_k" else 2) and all(loss.isfinite() for loss in losses)
    (out.output.sum() + sum(losses)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert out.expert_load.sum() == 400 if gate == "noisy_top_k" else 200 <= out.expert_load.sum() <= 400
    layer.eval()
    assert torch.equal(layer(x).output, layer(x).output)


@pytest.mark.parametrize(
    "options, shown",
    [
        ({"router_score": "tanh"}, "tanh"),
        ({"gate": "hash"}, "hash"),
        ({"gate": "gshard", "top_k": 3}, "top_k = 3"),
        ({"expert_groups": 3}, "expert_groups = 3"),
        ({"expert_groups": 2, "top_groups": 3}, "top_groups = 3"),
        ({"shared_expert_gate": True}, "shared_expert_gate"),
    ],
    ids=str,
)
def test_options_that_no_router_can_have(options, shown):
    with pytest.raises(ValueError) as raised:
        anabranch.MoE(**{"hidden_size": 6, "expert_hidden_size": 5, "num_experts": EXPERTS, "top_k": 2, **options})
    assert shown in str(raised.value)
