"""GradientReducer against finish_gradients: the same bits, beside whatever else a model is in."""

import math

import anabranch
import pytest
import torch
from ranks import run_ranks
from small import Small, batch_of
from torch import nn


class Partly(Small):
    """With a projection that only some batches go through, and a layer that none does."""

    def __init__(self, seed, **options):
        super().__init__(seed, **options)
        self.sometimes = nn.Linear(8, 8, dtype=self.before.weight.dtype)
        self.never = nn.Linear(8, 8, dtype=self.before.weight.dtype)

    def forward(self, x, partly=False):
        return super().forward(self.sometimes(x) if partly else x)


def wrapped(model, kind, size):
    if kind == "ddp":
        anabranch.ignore_expert_parameters(model)
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        experts = {p for _, p in anabranch.expert_parameters(model)}
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)), ignored_params=experts)
    return model


def local(grad):
    return grad.to_local() if hasattr(grad, "to_local") else grad


def steps(rank, size, seed, kind, bucket_bytes, expert_parallel_size):
    groups = anabranch.make_parallel_groups(expert_parallel_size)
    expected, model = (wrapped(Partly(seed, group=groups.expert_parallel), kind, size) for _ in range(2))
    reducer = anabranch.GradientReducer(model, groups, bucket_bytes=bucket_bytes)
    for step in range(3):
        for each in (expected, model):
            each.zero_grad(set_to_none=step != 1)
            for micro in range(2):
                # Rank 0 has no tokens in the last step, the others one sometimes.
                tokens = 12 if step < 2 else size - 1
                x, dy = batch_of(seed + 10 * step + micro, rank, size, tokens)
                if each is model and micro == 1:
                    reducer.start()
                partly = step == 1 if kind == "fsdp2" else rank == step  # FSDP2 wants the same parameters used on all
                (each(x, partly=partly) * dy).sum().backward()
        anabranch.finish_gradients(expected, groups)
        reducer.finish()
        for (name, p), wanted in zip(model.named_parameters(), expected.parameters()):
            if p.grad is None or wanted.grad is None:
                assert p.grad is None and wanted.grad is None, name
            else:
                assert torch.equal(local(p.grad), local(wanted.grad)), name


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
def test_gives_the_bits_of_finish_gradients(kind, seed):
    run_ranks(2, steps, seed, kind, 64, 0)


def test_with_replicas_of_experts(seed):
    run_ranks(4, steps, seed, "plain", 64, 2)
    run_ranks(2, steps, seed, "plain", anabranch.training.gradients.BUCKET_BYTES, 1)


def scaled(rank, size, seed, reduced):
    model = Small(seed, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3)
    reducer = anabranch.GradientReducer(model, bucket_bytes=64) if reduced else None
    history = []
    for step in range(30):
        x, dy = batch_of(seed + step, rank, size, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (model(x * (1 + 3 * rank)) * dy).sum()
        if reducer is not None:
            reducer.start()
        scaler.scale(loss).backward()
        if reducer is not None:
            reducer.finish()
        else:
            anabranch.finish_gradients(model)
        norm = anabranch.clip_gradient_norm(model, 1.0, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        history.append((scaler.get_scale(), math.isfinite(norm), norm if math.isfinite(norm) else 0.0))
    return history, [p.tolist() for p in model.parameters()]


def test_beside_a_scaler_and_clipping(seed):
    reduced, plain = run_ranks(2, scaled, seed, True), run_ranks(2, scaled, seed, False)
    assert reduced == plain
    finite = [finite for _, finite, _ in reduced[0][0]]
    assert any(finite) and not all(finite)


def out_of_order(rank, size, seed):
    model = Small(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reducer = anabranch.GradientReducer(model)
    x, dy = batch_of(seed, rank, size)
    with pytest.raises((ValueError, RuntimeError), match="finish without start"):
        reducer.finish()
    reducer.start()
    with pytest.raises((ValueError, RuntimeError), match="start again before finish"):
        reducer.start()
    (model(x) * dy).sum().backward()
    with pytest.raises(RuntimeError, match="call anabranch.finish_gradients"):
        optimizer.step()  # not finished yet
    reducer.finish()
    optimizer.step()
    with pytest.raises((ValueError, RuntimeError), match="is finished already"):
        reducer.start()
    with pytest.raises((ValueError, RuntimeError), match="is finished already"):
        anabranch.finish_gradients(model)
    optimizer.zero_grad()
    reducer.start()
    for _ in range(2):
        (model(x) * dy).sum().backward()
    with pytest.raises((ValueError, RuntimeError), match="has changed since it was taken"):
        reducer.finish()
    optimizer.zero_grad()
    model.before.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="make another one"):
        reducer.start()


def test_out_of_order(seed):
    run_ranks(2, out_of_order, seed)


def alone(rank, size, seed):
    model, expected = (Small(seed, group=anabranch.groups.alone()) for _ in range(2))
    reducer = anabranch.GradientReducer(model)
    x, dy = batch_of(seed, rank, size)
    reducer.start()
    for each in (model, expected):
        (each(x) * dy).sum().backward()
    reducer.finish()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), expected.parameters()))


def test_a_rank_alone(seed):
    run_ranks(1, alone, seed)


class Between(torch.autograd.Function):
    """x, and calls on the way back."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.call()
        return dy, None


def beside(rank, size, seed):
    import time

    model = Small(seed)
    reducer = anabranch.GradientReducer(model, bucket_bytes=1)
    x, dy = batch_of(seed, rank, size)
    found = []

    def wait():
        end = time.monotonic() + 30
        while reducer.summed < 2 and time.monotonic() < end:
            time.sleep(0.001)
        found.append(reducer.summed)

    reducer.start()
    rows = Between.apply(torch.tanh(model.before(x)), wait)
    (model.after(x + model.moe(rows).output) * dy).sum().backward()
    reducer.finish()
    return found


def test_sums_while_backward_is_under_way(seed):
    for (summed,) in run_ranks(2, beside, seed):
        assert summed >= 2
