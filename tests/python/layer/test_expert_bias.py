"""Biases that follow the load of all ranks, step by step."""

import copy

import anabranch
import pytest
import torch
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

OPTIONS = dict(router_score="sigmoid", expert_bias=True, seed=4, dtype=torch.float64)
RATE, STEPS, MICRO_BATCHES = 0.01, 3, 2


def batches(seed):
    """[steps, micro-batches, tokens, hidden], far from balance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(STEPS, MICRO_BATCHES, 24, 8, generator=generator, dtype=torch.float64) + 1


def train(layer, groups, parts, checkpointed=False):
    anabranch.set_expert_bias_rate(layer, RATE)
    biases = []
    for step in parts:
        layer.zero_grad()
        for x in step:
            y = checkpoint(lambda x: layer(x).output, x, use_reentrant=False) if checkpointed else layer(x).output
            y.sum().backward()
        layer.eval()
        layer(step[0])  # is not counted
        layer.train()
        anabranch.finish_gradients(layer, groups)
        biases.append(layer.router.expert_bias.tolist())
    return biases


def rank_of_replicas(rank, size, seed, expert_parallel):
    groups = anabranch.make_parallel_groups(expert_parallel)
    layer = anabranch.MoE(8, 6, 4, 2, group=groups.expert_parallel, **OPTIONS)
    return train(layer, groups, batches(seed)[:, :, 24 * rank // size : 24 * (rank + 1) // size])


@pytest.mark.parametrize("size, expert_parallel", [(2, 1), (4, 2), (3, 3)])
def test_the_biases_follow_the_load_of_all_ranks(size, expert_parallel, seed):
    found = run_ranks(size, rank_of_replicas, seed, expert_parallel)
    alone = anabranch.groups.alone()
    groups = anabranch.ParallelGroups(alone, alone, alone)
    layer = anabranch.MoE(8, 6, 4, 2, group=alone, **OPTIONS)
    expected = train(copy.deepcopy(layer), groups, batches(seed))
    assert all(biases == expected for biases in found)
    assert expected == train(copy.deepcopy(layer), groups, batches(seed), checkpointed=True)

    bias = torch.zeros(4, dtype=torch.float64)  # by hand
    for step, found_bias in zip(batches(seed), expected):
        scores = (step.flatten(0, 1) @ layer.router.weight.detach().T).sigmoid() + bias
        load = torch.bincount(scores.topk(2).indices.flatten(), minlength=4).double()
        bias += RATE * (load.mean() - load).sign()
        torch.testing.assert_close(torch.tensor(found_bias, dtype=torch.float64), bias, rtol=0, atol=1e-15)


def test_what_is_refused():
    with pytest.raises(ValueError, match="no layer with expert_bias"):
        anabranch.set_expert_bias_rate(anabranch.MoE(8, 6, 4, 2), RATE)
    layer = anabranch.MoE(8, 6, 4, 2, **OPTIONS)
    with pytest.raises(ValueError, match="rate = -1"):
        anabranch.set_expert_bias_rate(layer, -1)
    anabranch.set_expert_bias_rate(layer, RATE)
    anabranch.set_expert_bias_rate(layer, 0)
    layer(torch.randn(5, 8, dtype=torch.float64)).output.sum().backward()
    anabranch.finish_gradients(layer)
    assert layer.router.expert_bias.eq(0).all()
