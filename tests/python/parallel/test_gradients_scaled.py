"""torch.amp.GradScaler over ranks: what overflows on one is skipped on all."""

import math

import anabranch
import pytest
import torch
from ranks import run_ranks
from small import Small, batch_of
from torch import nn


def train(rank, size, seed, order, experts=4):
    """60 steps under fp16 autocast with a scale that grows fast: some rank overflows every few steps."""
    model = Small(seed, dtype=torch.float32)
    if order == "ddp":
        model = nn.parallel.DistributedDataParallel(anabranch.ignore_expert_parameters(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
    history = []
    for step in range(60):
        x, dy = batch_of(seed + step, rank, size, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (model(x * (1 + 3 * rank)) * dy).sum()
        scaler.scale(loss).backward()
        if order == "unscaled before":
            scaler.unscale_(optimizer)
            anabranch.finish_gradients(model, scaler=scaler)
        else:
            anabranch.finish_gradients(model)
        if order == "clipped":
            scaler.unscale_(optimizer)
        norm = anabranch.clip_gradient_norm(model, 1.0, scaler=scaler)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        stepped = any(not torch.equal(p, value) for p, value in zip(model.parameters(), before))
        assert stepped == math.isfinite(norm)
        scaler.update()
        optimizer.zero_grad()
        history.append((scaler.get_scale(), stepped, norm))
    experts = {id(p) for _, p in anabranch.expert_parameters(model)}
    return history, [p.tolist() for p in model.parameters() if id(p) not in experts]


@pytest.mark.parametrize("order", ["finished", "clipped", "unscaled before", "ddp"])
def test_ranks_skip_the_same_steps(order, seed):
    (history, replicated), other = run_ranks(2, train, seed, order)
    assert str(other) == str((history, replicated))
    skipped = [not stepped for _, stepped, _ in history]
    assert 5 < sum(skipped) < 55
    # Clipped to 1 whatever the scale: the norms are of unscaled gradients.
    norms = [norm for _, _, norm in history if math.isfinite(norm)]
    assert max(norms) < 1e4


def overflown(rank, size, seed, name):
    """Rank 1's gradient of one parameter alone is not finite."""
    model = Small(seed, dtype=torch.float32)
    optimizers = [
        torch.optim.SGD([p for _, p in anabranch.expert_parameters(model)], lr=0.1),
        torch.optim.SGD([*model.before.parameters(), *model.after.parameters(), model.moe.router.weight], lr=0.1),
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, dy = batch_of(seed, rank, size, dtype=torch.float32)
    scaler.scale((model(x) * dy).sum()).backward()
    if rank == 1:
        model.get_parameter(name).grad.view(-1)[-1] = float("inf")
    before = [p.detach().clone() for p in model.parameters()]
    anabranch.finish_gradients(model)
    with pytest.raises(ValueError, match="the gradient's norm is"):
        anabranch.clip_gradient_norm(model, 1.0)
    assert not math.isfinite(anabranch.clip_gradient_norm(model, 1.0, scaler=scaler))
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    return [torch.equal(p, value) for p, value in zip(model.parameters(), before)]


@pytest.mark.parametrize("name", ["moe.experts.down_weight", "before.weight"])
def test_one_number_is_enough(name, seed):
    first, second = run_ranks(2, overflown, seed, name)
    assert first == second
    if name.startswith("moe.experts"):
        assert all(first)


def overflown_without_experts(rank, size, seed):
    """Of 2 experts on 3 ranks: the last has none."""
    model = nn.Sequential(nn.Linear(8, 8), anabranch.MoE(8, 12, 2, 1, renormalize=False, seed=seed))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, dy = batch_of(seed, rank, size, dtype=torch.float32)
    scaler.scale((model(x).output * dy).sum()).backward()
    if rank == 0:
        model[1].experts.up_weight.grad[0, 0, 0] = float("nan")
    anabranch.finish_gradients(model)
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), model[1].experts.up_weight.shape[0]


def test_a_rank_without_experts_skips_too(seed):
    assert run_ranks(3, overflown_without_experts, seed) == [(4.0, 1), (4.0, 1), (4.0, 0)]


def overflown_without_experts_under_fsdp2(rank, size, seed):
    """Of 2 experts on 3 ranks, everything else sharded: the last has no gradient that is replicated, either."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(8, 8), anabranch.MoE(8, 12, 2, 1, renormalize=False, seed=seed))
    experts = [p for _, p in anabranch.expert_parameters(model)]
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)), ignored_params=set(experts))
    others = [p for p in model.parameters() if all(p is not expert for expert in experts)]
    x, dy = batch_of(seed, rank, size, dtype=torch.float32)
    (model(x).output * dy).sum().backward()
    if rank == 0:
        model[1].experts.up_weight.grad[0, 0, 0] = float("nan")
    anabranch.finish_gradients(model)
    return all(p.grad.to_local().isfinite().all().item() for p in others)


def test_a_rank_without_experts_hears_of_it_under_fsdp2(seed):
    assert run_ranks(3, overflown_without_experts_under_fsdp2, seed) == [False] * 3
