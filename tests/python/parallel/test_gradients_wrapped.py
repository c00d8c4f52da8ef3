"""Beside DistributedDataParallel, FSDP1 and FSDP2: right where the experts are left out, refused where they are not."""

import anabranch
import pytest
import torch
from ranks import run_ranks
from small import Small, assert_gradients, batch_of, expected_gradients, part_of, whole_parameters
from torch import nn


def backward(model, seed, rank, size):
    x, dy = batch_of(seed, rank, size)
    (model(x) * dy).sum().backward()


def mesh_of(size):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (size,))


def experts_averaged_by_ddp(rank, size, seed, compiled):
    inner = Small(seed)
    model = nn.parallel.DistributedDataParallel(inner)  # the shapes are the same on all ranks: it sees nothing
    model = torch.compile(model, backend="aot_eager") if compiled else model
    with pytest.raises(Exception, match="moe.experts, each rank's own experts") as raised:
        model(batch_of(seed, rank, size)[0])
    assert "ignore_expert_parameters" in str(raised.value)
    with pytest.raises(ValueError, match="ignore_expert_parameters"):
        anabranch.finish_gradients(nn.parallel.DistributedDataParallel(inner))


@pytest.mark.parametrize("compiled", [False, True])
def test_ddp_over_experts_is_refused(compiled, seed):
    run_ranks(2, experts_averaged_by_ddp, seed, compiled)


def inner_of_ddp(rank, size, seed, compiled):
    inner = Small(seed)
    model = torch.compile(inner, backend="aot_eager", fullgraph=True) if compiled == "within" else inner
    model = nn.parallel.DistributedDataParallel(anabranch.ignore_expert_parameters(model))
    model = torch.compile(model, backend="aot_eager") if compiled == "around" else model
    for step in range(2):
        inner.zero_grad()
        backward(model, seed + step, rank, size)
        anabranch.finish_gradients(inner)  # averages what is averaged: no change
        expected = expected_gradients(whole_parameters(seed), [batch_of(seed + step, 0, 1)], size)
        assert_gradients(inner, expected, rank, size)


@pytest.mark.parametrize("compiled", ["nothing", "around", "within"])
def test_the_inner_model_of_ddp(compiled, seed):
    run_ranks(2, inner_of_ddp, seed, compiled)


def experts_sharded_by_fsdp2(rank, size, seed, what):
    from torch.distributed.fsdp import fully_shard

    model = Small(seed)
    with pytest.raises(ValueError, match="FSDP would shard experts") as raised:
        fully_shard(model if what == "model" else model.moe, mesh=mesh_of(size))
    assert "ignored_params=experts" in str(raised.value)


@pytest.mark.parametrize("what", ["model", "layer"])
def test_fsdp2_over_experts_is_refused(what, seed):
    run_ranks(2, experts_sharded_by_fsdp2, seed, what)


def experts_as_dtensors(rank, size, seed):
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = Small(seed)
    weight = distribute_tensor(model.moe.experts.up_weight.detach(), mesh_of(size), [Replicate()])
    model.moe.experts.register_parameter("up_weight", nn.Parameter(weight))
    with pytest.raises(ValueError, match=r"FSDP would shard moe.experts.up_weight"):
        anabranch.finish_gradients(model)


def test_experts_that_have_become_dtensors_are_not_passed_over(seed):
    run_ranks(2, experts_as_dtensors, seed)


def whole_experts_under_fsdp2(rank, size, seed):
    from torch.distributed.fsdp import fully_shard

    model = Small(seed, group=anabranch.groups.alone())  # all experts on every rank: they are replicated
    fully_shard(model, mesh=mesh_of(size))
    backward(model, seed, rank, size)
    anabranch.finish_gradients(model, anabranch.make_parallel_groups(1))
    assert_gradients(model, expected_gradients(whole_parameters(seed), [batch_of(seed, 0, 1)], size), 0, 1)


def test_fsdp2_over_layers_that_are_whole_on_every_rank(seed):
    run_ranks(2, whole_experts_under_fsdp2, seed)


def whole_experts_under_ddp(rank, size, seed):
    model = nn.parallel.DistributedDataParallel(Small(seed, group=anabranch.groups.alone()))
    backward(model, seed, rank, size)
    anabranch.finish_gradients(model, anabranch.make_parallel_groups(1))
    assert_gradients(model, expected_gradients(whole_parameters(seed), [batch_of(seed, 0, 1)], size), 0, 1)


def test_ddp_over_layers_that_are_whole_on_every_rank(seed):
    run_ranks(2, whole_experts_under_ddp, seed)


def experts_sharded_by_fsdp1(rank, size, seed, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    with pytest.raises(ValueError, match="FSDP would shard experts") as raised:
        model = FullyShardedDataParallel(Small(seed), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        model(batch_of(seed, rank, size)[0])
    assert "ignored_states=experts" in str(raised.value)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_over_experts_is_refused(use_orig_params, seed):
    run_ranks(2, experts_sharded_by_fsdp1, seed, use_orig_params)


def beside_fsdp1(rank, size, seed, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    inner = Small(seed)
    experts = {p for _, p in anabranch.expert_parameters(inner)}
    model = FullyShardedDataParallel(
        inner, ignored_states=experts, use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    backward(model, seed, rank, size)
    if use_orig_params:
        with pytest.raises(ValueError, match="give the FullyShardedDataParallel model itself"):
            anabranch.finish_gradients(inner)
    anabranch.finish_gradients(model)
    expected = expected_gradients(whole_parameters(seed), [batch_of(seed, 0, 1)], size)
    for name, p in anabranch.expert_parameters(model):
        name = name.replace("_fsdp_wrapped_module.", "")
        torch.testing.assert_close(p.grad, part_of(name, expected[name], rank, size), rtol=1e-11, atol=1e-12)
    if use_orig_params:
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            assert_gradients(model, expected, rank, size)
    with pytest.raises(ValueError, match="clip_gradient_norm takes fully_shard's"):
        anabranch.clip_gradient_norm(model, 1.0)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_beside_experts(use_orig_params, seed):
    run_ranks(2, beside_fsdp1, seed, use_orig_params)
