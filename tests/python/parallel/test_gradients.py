"""Gradients are finished once a step, whatever else a loop does to them."""

import warnings

import anabranch
import pytest
import torch
from ranks import run_ranks
from small import Small, assert_gradients, batch_of, expected_gradients, whole_parameters
from torch import nn


def backward(model, seed, rank, size):
    x, dy = batch_of(seed, rank, size)
    (model(x) * dy).sum().backward()


def expected_after(seed, seeds, size):
    return expected_gradients(whole_parameters(seed), [batch_of(each, 0, 1) for each in seeds], size)


def accumulated(rank, size, seed, set_to_none):
    model = Small(seed)
    for step in range(2):
        model.zero_grad(set_to_none=set_to_none)
        seeds = [seed + 10 * step + micro for micro in range(3)]
        for each in seeds:
            backward(model, each, rank, size)
        anabranch.finish_gradients(model)
        assert_gradients(model, expected_after(seed, seeds, size), rank, size)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_micro_batches_that_are_finished_together(set_to_none, seed):
    run_ranks(2, accumulated, seed, set_to_none)


def finished_again(rank, size, seed):
    model = Small(seed)
    backward(model, seed, rank, size)
    anabranch.finish_gradients(model)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises((ValueError, RuntimeError), match="is finished already") as raised:
        anabranch.finish_gradients(model)
    assert "once a step" in str(raised.value)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before))
    anabranch.clip_gradient_norm(model, 1e-3)
    with pytest.raises((ValueError, RuntimeError), match="is finished already"):
        anabranch.finish_gradients(model)
    backward(model, seed + 1, rank, size)
    with pytest.raises((ValueError, RuntimeError), match="micro-batch") as raised:
        anabranch.finish_gradients(model)
    assert "zero_grad" in str(raised.value)
    model.zero_grad()
    backward(model, seed + 1, rank, size)
    anabranch.finish_gradients(model)
    assert_gradients(model, expected_after(seed, [seed + 1], size), rank, size)


def test_finishing_again_is_refused(seed):
    run_ranks(2, finished_again, seed)


def stepped_unfinished(rank, size, seed):
    model = Small(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        backward(model, seed, rank, size)
        with pytest.raises(RuntimeError, match="call anabranch.finish_gradients"):
            optimizer.step()
        assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before))
        anabranch.finish_gradients(model)
        torch._foreach_mul_([p.grad for p in model.parameters()], 0.5)  # in place, as scalers and clipping do
        optimizer.step()
        optimizer.zero_grad()
        before = [p.detach().clone() for p in model.parameters()]

    # Other parameters than experts, and other optimizers' experts.
    backward(model, seed, rank, size)
    torch.optim.SGD(model.before.parameters(), lr=0.1).step()
    # The same in a copy of the model.
    import copy

    other = copy.deepcopy(model)
    backward(other, seed, rank, size)
    with pytest.raises(RuntimeError, match="call anabranch.finish_gradients"):
        torch.optim.SGD(other.parameters(), lr=0.1).step()
    # Who finishes them otherwise.
    anabranch.steps.REFUSE = False
    optimizer.step()
    anabranch.steps.REFUSE = True


def stepped_alone(rank, size, seed):
    model = Small(seed, group=anabranch.groups.alone())
    backward(model, seed, rank, size)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_a_step_with_unfinished_gradients_is_refused(seed):
    run_ranks(2, stepped_unfinished, seed)


def test_a_rank_alone_need_not_finish(seed):
    run_ranks(2, stepped_alone, seed)


def partitioned(rank, size, seed):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    plain, model = Small(seed), Small(seed)
    experts = [p for _, p in anabranch.expert_parameters(model)]
    others = [p for p in model.parameters() if all(p is not expert for expert in experts)]
    wrong = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    right = ZeroRedundancyOptimizer(others, torch.optim.SGD, lr=0.1), torch.optim.SGD(experts, lr=0.1)
    for each, optimizers in ((plain, [torch.optim.SGD(plain.parameters(), lr=0.1)]), (model, right)):
        backward(each, seed, rank, size)
        anabranch.finish_gradients(each)
        if each is model:
            with pytest.raises(RuntimeError, match="ZeroRedundancyOptimizer would overwrite each rank's experts"):
                wrong.step()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters()))


def test_zero_redundancy_optimizer(seed):
    run_ranks(2, partitioned, seed)


def clipped(rank, size, seed, clip):
    model = Small(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    texts = []
    for step in range(12):
        backward(model, seed + step, rank, size)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            anabranch.finish_gradients(model)
        texts += [str(each.message) for each in caught]
        if clip == "torch":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        else:
            anabranch.clip_gradient_norm(model, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return texts, model.before.weight.tolist()


def test_replicas_that_drift_apart_are_told_of(seed):
    for rank in run_ranks(2, clipped, seed, "torch"):
        (text,) = rank[0]  # once
        assert "moe.router.weight is not the same on all ranks" in text and "anabranch.clip_gradient_norm" in text
    first, second = run_ranks(2, clipped, seed, "anabranch")
    assert first == second and first[0] == []


def clipped_unfinished(rank, size, seed):
    model = Small(seed)
    backward(model, seed, rank, size)
    with pytest.raises((ValueError, RuntimeError), match="finish_gradients goes before"):
        anabranch.clip_gradient_norm(model, 0.1)


def test_clipping_before_finishing_is_refused(seed):
    run_ranks(2, clipped_unfinished, seed)


def whole_norm(expected):
    return torch.cat([grad.flatten() for grad in expected.values()]).norm().item()


def clipped_beside(rank, size, seed, kind):
    model = Small(seed)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(anabranch.ignore_expert_parameters(model))
    elif kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        experts = {p for _, p in anabranch.expert_parameters(model)}
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)), ignored_params=experts)
    backward(model, seed, rank, size)
    anabranch.finish_gradients(model)
    expected = expected_after(seed, [seed], size)
    assert_gradients(model, expected, rank, size)
    norm = whole_norm(expected)
    assert anabranch.clip_gradient_norm(model, 2 * norm) == pytest.approx(norm, rel=1e-11)
    assert_gradients(model, expected, rank, size)
    assert anabranch.clip_gradient_norm(model, norm / 4) == pytest.approx(norm, rel=1e-11)
    assert_gradients(model, {name: grad / 4 for name, grad in expected.items()}, rank, size)


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
def test_clipping_counts_everything_once(kind, seed):
    run_ranks(2, clipped_beside, seed, kind)
