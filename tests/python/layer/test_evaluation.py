"""A layer in eval mode sums no losses: a collective less, unless it is asked for them."""

import anabranch
import pytest
import torch
from ranks import run_ranks

EXPERTS, TOP_K, HIDDEN = 6, 2, 8
COEFFICIENTS = dict(balance_coefficient=0.2, sequence_balance_coefficient=0.3, z_coefficient=0.05)


def layer_of(**more):
    return anabranch.MoE(HIDDEN, 12, EXPERTS, TOP_K, glu=True, activation="silu", seed=5, dtype=torch.float64, **more)


def collectives(layer, x, **given):
    layer.reset_stats()
    out = layer(x, **given)
    return out, layer.stats().collectives


def routing_of(x):
    ids = torch.arange(len(x) * TOP_K).remainder(EXPERTS).view(-1, TOP_K)
    return ids, torch.ones(ids.shape, dtype=torch.float64)


def evaluated(layer, x, **given):
    """With losses and without: one collective more or less, and the same bits."""
    layer.train()
    with torch.no_grad():
        trained, with_losses = collectives(layer, x, **given)
    layer.eval()
    recorded, without_in_gradients = collectives(layer, x, **given)
    assert recorded.output.requires_grad and recorded.balance_loss is None
    with torch.no_grad():
        out, without = collectives(layer, x, **given)
        assert without == without_in_gradients
        own = torch.bincount(out.expert_ids.flatten(), minlength=EXPERTS)
        layer.evaluation_losses = True
        asked, with_losses_again = collectives(layer, x, **given)
        layer.evaluation_losses = False
    assert torch.equal(out.output, trained.output) and torch.equal(out.output, asked.output)
    assert torch.equal(out.expert_load, own) and torch.equal(asked.expert_load, trained.expert_load)
    losses = [field for field in out._fields if field.endswith("_loss")]
    assert all(getattr(out, field) is None for field in losses)
    for field in losses:
        one, other = getattr(asked, field), getattr(trained, field)
        assert one is other is None or torch.equal(one, other), field
    return with_losses - without, with_losses_again - without


@pytest.mark.parametrize("more", [COEFFICIENTS, {"gate": "noisy_top_k"}, {"gate": "gshard"}], ids=str)
def test_alone(more):
    layer = layer_of(**more).eval()
    for tokens in (7, 0):
        x = torch.randn(tokens, HIDDEN, dtype=torch.float64)
        out = layer(x)
        assert all(getattr(out, field) is None for field in out._fields if field.endswith("_loss"))
        layer.evaluation_losses = True
        asked = layer(x)
        layer.evaluation_losses = False
        assert torch.equal(out.output, asked.output) and torch.equal(out.expert_load, asked.expert_load)
        assert asked.balance_loss is not None


def test_with_a_capacity_there_are_losses():
    layer = layer_of(receive_capacity=2.0).eval()
    assert layer(torch.randn(5, HIDDEN, dtype=torch.float64)).balance_loss is not None


def on_ranks(rank, size, seed):
    layer = layer_of(**COEFFICIENTS)
    torch.manual_seed(seed + rank)
    x = torch.randn(3 * rank, 5, HIDDEN, dtype=torch.float64)
    rows = torch.randn(4, HIDDEN, dtype=torch.float64)
    assert evaluated(layer, x) == (1, 1)
    assert evaluated(layer, rows, routing=routing_of(rows)) == (1, 1)
    found = []
    for mode in (lambda: layer.train(rank == 0), lambda: layer.train(rank == 1)):  # a rank's own accident
        layer.eval(), mode()
        with torch.no_grad(), pytest.raises(RuntimeError) as raised:
            layer(x)
        found.append(str(raised.value))
        assert torch.isfinite(layer.train()(rows).output).all()  # and they go on
    return found


def test_on_ranks_and_ranks_that_differ(seed):
    for rank, (first, second) in enumerate(run_ranks(2, on_ranks, seed)):
        assert "a gate's routing without losses, as in an evaluation where rank 0 has" in first, rank
        assert "where rank 0 has" in second and second.endswith("without losses, as in an evaluation"), rank
