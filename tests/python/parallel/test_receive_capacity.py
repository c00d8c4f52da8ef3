"""Steps whose counts the host does not learn, and those that exceed what there is room for; the core's tests are in
tests/receive_capacity_test.cpp."""

import pytest
import torch
from ranks import run_ranks

import anabranch

TOKENS, HIDDEN, EXPERTS = 40, 16, 6


def make_layer(capacity):
    return anabranch.MoE(HIDDEN, 24, EXPERTS, 2, seed=5, receive_capacity=capacity, router=False, engine="deterministic")


def step(layer, x, ids):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x, (ids, torch.full(ids.shape, 0.5)))
    out.output.square().sum().backward()
    return [out.output.detach(), x.grad] + [p.grad.clone() for p in layer.parameters()]


def rank_steps(rank, size):
    runs_again(rank)
    hears_late()


def runs_again(rank):
    torch.manual_seed(rank)
    exact, bounded = make_layer(0), make_layer(1.5)
    for turn in range(4):
        x = torch.randn(TOKENS, HIDDEN)
        few = 2 if turn % 2 == 1 else EXPERTS  # all for rank 0's experts
        ids = torch.stack([torch.randperm(few)[:2] for _ in range(TOKENS)])
        if few == EXPERTS:
            ids = torch.arange(2 * TOKENS).view(TOKENS, 2) % EXPERTS
        steps = []
        found = anabranch.run(lambda: (steps.append(1), step(bounded, x, ids))[1])  # noqa: B023
        assert len(steps) == (2 if few == 2 else 1)
        for ours, expected in zip(found, step(exact, x, ids)):
            assert torch.equal(ours, expected)
    anabranch.check()


def hears_late():
    layer = make_layer(1.0)
    ids = torch.tensor([[0, 1]]).repeat(TOKENS, 1)
    assert step(layer, torch.randn(TOKENS, HIDDEN), ids)[0].isnan().all()
    with pytest.raises(RuntimeError, match="receive_capacity"):
        anabranch.check()
    anabranch.check()
    step(layer, torch.randn(TOKENS, HIDDEN), ids)
    with pytest.raises(RuntimeError, match="receive_capacity"):
        anabranch.finish_gradients(layer)


def test_what_exceeds_it_is_run_again_or_heard_late():
    run_ranks(2, rank_steps)


def test_one_rank_has_room_for_all():
    layer = make_layer(0.1)
    ids = torch.tensor([[0, 1]]).repeat(TOKENS, 1)
    assert not step(layer, torch.randn(TOKENS, HIDDEN), ids)[0].isnan().any()
    anabranch.check()


def test_refusals():
    for wrong in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="receive_capacity"):
            make_layer(wrong)
