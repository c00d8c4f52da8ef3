"""Options of the router in Python: parameters, losses, the balancing bias. Numerics: test_transformers.py and the
C++ tests."""

import anabranch
import pytest
import torch

EVERYTHING = dict(
    router_score="sigmoid",
    expert_bias=True,
    expert_groups=2,
    group_score="maximum",
    routing_scale=2.5,
    shared_expert_hidden_size=6,
    shared_expert_gate=True,
)


def make(device="cpu", **more):
    return anabranch.MoE(8, 12, 4, 2, glu=True, seed=3, device=device, **more)


def test_names_are_those_of_cpp():
    layer = make(**EVERYTHING)
    assert dict(layer.named_buffers()).keys() == {"router.expert_bias"}
    assert tuple(layer.router.expert_bias.shape) == (4,) and layer.router.expert_bias.eq(0).all()
    assert "router.expert_bias" not in dict(layer.named_parameters())
    assert tuple(layer.shared_expert_gate.shape) == (1, 8)
    noisy = make(gate="noisy_top_k")
    assert list(noisy.state_dict()) == [
        "router.weight", "router.noise_weight", "experts.up_weight", "experts.down_weight"
    ]  # fmt: skip


def test_bias_moves_towards_the_mean_load(device):
    layer = make(device, **EVERYTHING)
    layer.update_expert_bias(torch.tensor([9, 3, 0, 0], device=device), 0.25)
    assert layer.router.expert_bias.tolist() == [-0.25, 0, 0.25, 0.25]
    layer.update_expert_bias(torch.tensor([0, 0, 0, 1]), 0.5)  # wherever the load is
    assert layer.router.expert_bias.tolist() == [0.25, 0.5, 0.75, -0.25]
    other = make(device, **EVERYTHING)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(30, 8, device=device)
    assert torch.equal(other(x).output, layer(x).output)
    other.reset_parameters()
    assert other.router.expert_bias.eq(0).all()


def test_bias_decides_who_is_chosen(device):
    layer = make(device, expert_bias=True)
    layer.router.expert_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 9.0]))
    assert layer(torch.randn(30, 8, device=device)).expert_load.tolist() == [0, 30, 0, 30]


def test_noisy_gate(device):
    layer = make(device, gate="noisy_top_k")
    assert make(device)(torch.randn(5, 8, device=device)).importance_loss is None
    x = torch.randn(50, 8, device=device)
    out = layer(x)
    (out.output.sum() + out.importance_loss + out.load_loss).backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    torch.manual_seed(1)
    first = layer(x).output
    torch.manual_seed(1)
    assert torch.equal(layer(x).output, first)
    layer.eval()
    quiet = layer(x)
    assert torch.equal(quiet.output, layer(x).output)
    assert torch.equal(quiet.output, make(device).eval()(x).output)
    variation = quiet.expert_load.double().var(correction=0) / quiet.expert_load.double().mean().square()
    torch.testing.assert_close(quiet.load_loss.double(), variation)
    ids, weights = torch.tensor([[0, 1]] * 50, device=device), torch.ones(50, 2, device=device)
    assert layer(x, (ids, weights)).load_loss is None


def test_gshard_drops_second_choices_in_training(device):
    layer = make(device, gate="gshard")
    x = torch.randn(200, 8, device=device, requires_grad=True)
    out = layer(x)
    assert 200 < out.expert_load.sum() < 400
    (out.output.sum() + out.balance_loss).backward()
    assert x.grad.isfinite().all() and layer.router.weight.grad.abs().max() > 0
    assert layer.eval()(x).expert_load.sum() == 400


def test_autocast_keeps_the_router_exact(device):
    layer = make(device, dtype=torch.float32, **EVERYTHING)
    layer.router.expert_bias.copy_(torch.tensor([0.1001, 0.1, 0.1, 0.1001]))
    x = torch.zeros(5, 8, device=device)  # all scores 1/2: the bias decides, by less than bf16 can tell
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(x)
    assert out.output.dtype == torch.bfloat16
    # Groups {0, 1} and {2, 3} are equally good: the first.
    assert out.expert_load.tolist() == [5, 5, 0, 0]
    layer.router.expert_bias.copy_(torch.tensor([0.1, 0.1, 0.1, 0.1001]))
    with torch.autocast(device.type, torch.bfloat16):
        assert layer(x).expert_load.tolist() == [0, 0, 5, 5]


@pytest.mark.parametrize(
    "options, shown",
    [
        ({"gate": "switch"}, 'gate = "switch" is unknown, expected one of top_k, noisy_top_k, gshard'),
        ({"router_score": "relu"}, "softmax, sigmoid"),
        ({"group_score": 2}, "group_score = 2"),
        ({"expert_groups": 3}, "expert_groups = 3"),
        ({"expert_groups": 2, "top_groups": 3}, "top_groups = 3"),
        ({"routing_scale": 0.0}, "routing_scale = 0"),
        ({"shared_expert_gate": True}, "shared_expert_gate"),
        ({"gate": "gshard", "renormalize": False}, "kGShard"),
        ({"gate": "noisy_top_k", "expert_bias": True}, "kNoisyTopK"),
    ],
    ids=str,
)
def test_options(options, shown):
    with pytest.raises(ValueError) as raised:
        make(**options)
    assert shown in str(raised.value)


def test_updates_of_the_bias_are_checked():
    with pytest.raises(ValueError, match="no bias of its experts"):
        make().update_expert_bias(torch.zeros(4), 0.1)
    layer = make(expert_bias=True)
    with pytest.raises(ValueError, match=r"\[5\]"):
        layer.update_expert_bias(torch.zeros(5), 0.1)
    with pytest.raises(ValueError, match="rate = -1"):
        layer.update_expert_bias(torch.zeros(4), -1.0)
