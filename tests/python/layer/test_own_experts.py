"""Experts and activations that are not the core's: as the core's where they compute the same, and against plain PyTorch."""

import anabranch
import pytest
import reference
import torch
from case import parameters_of
from ranks import run_ranks
from torch import nn

HIDDEN, INNER, EXPERTS, TOP_K = 8, 6, 6, 2
CASES = {
    "plain": {},
    "deepseek": dict(router_score="sigmoid", expert_bias=True, expert_groups=3, top_groups=2, routing_scale=2.5,
                     sequence_balance_coefficient=0.2, balance_coefficient=0.1, attach_losses=True),
    "gshard": dict(gate="gshard"),
    "noisy": dict(gate="noisy_top_k"),
    "latent": dict(latent_size=5, router_fp64=True),
}  # fmt: skip


class Mlps(nn.Module):
    """down(silu(gate) · up), one expert after another."""

    def __init__(self, layer):
        super().__init__()
        self.up = nn.Parameter(layer.experts.up_weight.detach().clone())
        self.down = nn.Parameter(layer.experts.down_weight.detach().clone())

    def forward(self, rows, counts):
        assert counts.device.type == "cpu" and counts.sum() == len(rows)
        results = []
        for x, up, down in zip(rows.split(counts.tolist()), self.up, self.down):
            gate, value = (x @ up.T).chunk(2, -1)
            results.append((nn.functional.silu(gate) * value) @ down.T)
        return torch.cat(results) if results else rows


def pair(more, device=None):
    options = dict(glu=True, activation="silu", seed=8, dtype=torch.float64, device=device) | more
    plain = anabranch.MoE(HIDDEN, INNER, EXPERTS, TOP_K, **options)
    own = anabranch.MoE(HIDDEN, INNER, EXPERTS, TOP_K, experts=Mlps(plain), **options)
    return plain, own


def step(layer, x, dy, seed, **given):
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = layer(leaf, **given)
    losses = [loss for loss in (out.balance_loss, out.z_loss, out.importance_loss, out.sequence_balance_loss) if loss is not None]
    ((out.output * dy).sum() + sum(losses)).backward()
    anabranch.finish_gradients(layer)
    names = {"experts.up": "experts.up_weight", "experts.down": "experts.down_weight"}
    gradients = {names.get(name, name): parameter.grad for name, parameter in layer.named_parameters()}
    load = out.expert_load.double()
    return {"output": out.output.detach(), "x": leaf.grad, "load": load, "losses": torch.stack(losses).detach(), **gradients}


def compare_on_a_rank(rank, size, seed, name):
    torch.manual_seed(seed + rank)
    shape = (0 if rank == 1 else 3, 5, HIDDEN)  # a rank without tokens
    x, dy = torch.randn(2, *shape, dtype=torch.float64)
    given = {"padding_mask": torch.rand(shape[:-1]) < 0.3} if name != "plain" else {}
    plain, own = pair(CASES[name])
    expected = step(plain, x, dy, seed, **given)
    found = step(own, x, dy, seed, **given)
    assert found.keys() == expected.keys()
    for what, value in expected.items():
        torch.testing.assert_close(found[what], value, rtol=1e-9, atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")
    assert {name for name, _ in anabranch.expert_parameters(own)} == {"experts.up", "experts.down"}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_module_that_computes_the_same(size, name, seed):
    run_ranks(size, compare_on_a_rank, seed, name)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_an_activation_of_ones_own(glu, bias, device, monkeypatch):
    monkeypatch.setitem(reference.ACTIVATIONS, "mish", nn.functional.mish)
    layer = anabranch.MoE(
        HIDDEN, INNER, EXPERTS, TOP_K, activation=nn.functional.mish, glu=glu, bias=bias, dtype=torch.float64, device=device
    )
    x = torch.randn(19, HIDDEN, dtype=torch.float64, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    (layer(x).output * dy).sum().backward()
    leaves = {name: value.requires_grad_() for name, value in parameters_of(layer).items()}
    leaf = x.detach().cpu().requires_grad_()
    plain = reference.Options(top_k=TOP_K, activation="mish", glu=glu)
    (reference.moe(leaf, leaves, plain).output * dy.cpu()).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), leaf.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), leaves[name].grad, msg=lambda m, name=name: f"{name}: {m}")
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    same = anabranch.MoE(HIDDEN, INNER, EXPERTS, TOP_K, glu=glu, bias=bias, dtype=torch.float64, device=device)
    same.load_state_dict(state)  # names and shapes are the core's


def test_experts_alone_replay_and_no_gradient(device):
    plain, own = pair(dict(router=False), device)
    x = torch.randn(7, HIDDEN, dtype=torch.float64, device=device)
    ids = torch.rand(7, EXPERTS, device=device).argsort(-1)[:, :3]
    ids[2, 1] = -1
    weights = torch.rand(7, 3, dtype=torch.float64, device=device)
    with torch.no_grad():
        found, expected = (layer(x, (ids, weights), may_skip=True) for layer in (own, plain))
    torch.testing.assert_close(found.output, expected.output)
    assert torch.equal(found.expert_load, expected.expert_load)
    plain, own = pair({}, device)
    with anabranch.record_routing(own) as record:
        wanted = own(x)
    with anabranch.replay_routing(own, record):
        assert torch.equal(own(x).output, wanted.output)


def test_what_is_refused(device):
    with pytest.raises(ValueError, match="shared_expert_hidden_size"):
        pair(dict(shared_expert_hidden_size=4), device)

    class Narrow(nn.Module):
        def forward(self, rows, counts):
            return rows[:, 1:]

    layer = anabranch.MoE(HIDDEN, INNER, EXPERTS, TOP_K, experts=Narrow(), device=device)
    with pytest.raises(ValueError, match="expected the rows' shape"):
        layer(torch.randn(3, HIDDEN, device=device))
