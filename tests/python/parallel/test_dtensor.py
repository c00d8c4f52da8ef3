"""Experts as DTensors, MoE(dtensor=True): what torch's own tools make of them, against one process with all experts."""

import anabranch
import pytest
import torch
from ranks import run_ranks
from small import EXPERTS, Small, assert_gradients, batch_of, expected_gradients, whole_parameters
from torch import nn
from torch.distributed.tensor import DTensor

CLOSE = dict(rtol=1e-11, atol=1e-12)  # fp64, sums of fewer than 100 terms


def mesh_of(*sizes):
    from torch.distributed.device_mesh import init_device_mesh

    names = ("replicas", "experts")[2 - len(sizes) :]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def backward(model, seed, rank, size):
    x, dy = batch_of(seed, rank, size)
    (model(x) * dy).sum().backward()


def global_experts(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, DTensor) and ".experts." in name}


def seen_whole(rank, size, seed, given):
    group = mesh_of(size) if given == "mesh" else None
    model = Small(seed, group=group, dtensor=True)
    expected = whole_parameters(seed)
    experts = global_experts(model)
    assert len(experts) == 2
    for name, p in experts.items():
        assert p.shape[0] == EXPERTS and p.to_local().shape[0] == EXPERTS // size
        assert torch.equal(p.full_tensor(), expected[name])
    assert model.moe.get_extra_state().tolist() == [0, EXPERTS, EXPERTS]
    backward(model, seed, rank, size)
    anabranch.finish_gradients(model)
    expected = expected_gradients(expected, [batch_of(seed, 0, 1)], size)
    assert_gradients(model, expected, 0, 1)
    norm = anabranch.clip_gradient_norm(model, 0.5)
    assert norm == pytest.approx(sum(g.square().sum().item() for g in expected.values()) ** 0.5, rel=1e-12)
    model.moe.reset_parameters()
    for name, p in global_experts(model).items():
        assert torch.equal(p.full_tensor(), whole_parameters(seed)[name])
    with pytest.raises(ValueError, match="finished already"):
        anabranch.finish_gradients(model)
    model.zero_grad()
    backward(torch.compile(model, backend="aot_eager", fullgraph=True), seed, rank, size)
    anabranch.finish_gradients(model)
    assert_gradients(model, expected, 0, 1)


@pytest.mark.parametrize("given, size", [("mesh", 2), ("nothing", 4)])
def test_they_are_whole_and_learn(given, size, seed):
    run_ranks(size, seen_whole, seed, given)


def trained(model, optimizer, seed, rank, size, steps=2):
    for step in range(steps):
        x, dy = batch_of(seed + step, rank, size)
        ((model(x) * dy).sum() * size).backward()  # the whole batch's sum, at any number of ranks
        anabranch.finish_gradients(model)
        optimizer.step()
        optimizer.zero_grad()


def values_of(model):
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).tolist() for name, p in model.named_parameters()}


def converted(seed, **options):
    from models import make_model

    return anabranch.convert(make_model("olmoe", seed, experts=4), dtensor=True, **options)


def converted_written(folder, seed):
    from models import make_model
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    model = converted(seed, group=mesh_of(torch.distributed.get_world_size()))
    checkpoint.save(get_model_state_dict(model), checkpoint_id=f"{folder}/converted")
    model.save_pretrained(f"{folder}/saved")
    again = anabranch.from_pretrained(f"{folder}/saved", dtensor=True)
    plain = dict(make_model("olmoe", seed, experts=4).named_parameters())
    for each in (model, again):
        assert len(global_experts(each)) == 4
        for name, p in global_experts(each).items():
            whole = plain[name.replace("moe.experts.up_weight", "gate_up_proj").replace("moe.experts.down_weight", "down_proj")]
            assert torch.equal(p.full_tensor(), whole)


def converted_read(folder, seed):
    """At another number of ranks; one of them alone has no DTensors."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, wanted = converted(seed + 1), converted(seed)
    state = get_model_state_dict(model)
    checkpoint.load(state, checkpoint_id=f"{folder}/converted")
    set_model_state_dict(model, state)
    assert values_of(model) == values_of(wanted)
    batch = torch.randint(3, 20, (2, 5), generator=torch.Generator().manual_seed(seed))
    loss = model(batch, labels=batch).loss
    loss.backward()
    anabranch.finish_gradients(model)
    assert all(p.grad.to_local().isfinite().all() for p in global_experts(model).values())
    assert torch.equal(loss, wanted(batch, labels=batch).loss)


def written(rank, size, folder, seed):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    model = Small(seed, dtensor=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer, seed, rank, size)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    before = values_of(model)
    if rank == 0:
        assert {name: value.tolist() for name, value in full.items() if "_extra" not in name} == before
    trained(model, optimizer, seed + 10, rank, size)
    converted_written(folder, seed)
    return before, values_of(model)


def read(rank, size, folder, seed):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = Small(seed + 77, dtensor=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    before = values_of(model)
    trained(model, optimizer, seed + 10, rank, size)
    converted_read(folder, seed)
    return before, values_of(model)


@pytest.mark.parametrize("writers, readers", [(2, 4), (2, 1)])
def test_distributed_checkpoint_at_another_number_of_ranks(writers, readers, tmp_path, seed):
    wrote = run_ranks(writers, written, str(tmp_path), seed)
    found = run_ranks(readers, read, str(tmp_path), seed)
    for before, after in found:
        assert before == wrote[0][0]
        for name, value in after.items():
            torch.testing.assert_close(torch.tensor(value), torch.tensor(wrote[0][1][name]), rtol=1e-5, atol=1e-6)


def the_library_files(rank, size, folder, seed):
    model, other = Small(seed, dtensor=True), Small(seed + 1, dtensor=True)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, other)]
    trained(model, optimizers[0], seed, rank, size)
    anabranch.save_checkpoint(folder, model, optimizers[0])
    anabranch.load_checkpoint(folder, other, optimizers[1])
    assert values_of(model) == values_of(other)
    plain = Small(seed + 2)
    anabranch.load_checkpoint(folder, plain)
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q.to_local() if isinstance(q, DTensor) else q), name
    trained(model, optimizers[0], seed + 5, rank, size)
    trained(other, optimizers[1], seed + 5, rank, size)
    assert values_of(model) == values_of(other)


def test_save_checkpoint_takes_them_too(tmp_path, seed):
    run_ranks(2, the_library_files, str(tmp_path), seed)


def clipped_by_torch(rank, size, seed):
    """FSDP2 over the rest on the same mesh: all are DTensors of one mesh, which torch's clipping takes."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(size)
    model = Small(seed, group=mesh, dtensor=True)
    experts = {p for _, p in anabranch.expert_parameters(model)}
    fully_shard(model, mesh=mesh, ignored_params=experts)
    expected = expected_gradients(whole_parameters(seed), [batch_of(seed, 0, 1)], size)
    whole = sum(g.square().sum().item() for g in expected.values()) ** 0.5
    for clip in ("torch", "anabranch"):
        model.zero_grad()
        backward(model, seed, rank, size)
        anabranch.finish_gradients(model)
        assert_gradients(model, expected, 0, 1)
        if clip == "torch":
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.25).full_tensor().item()
            scale = 0.25 / (whole + 1e-6)  # as it has it
        else:
            norm = anabranch.clip_gradient_norm(model, 0.25)
            scale = 0.25 / whole
        assert norm == pytest.approx(whole, rel=1e-12)
        assert_gradients(model, {name: scale * gradient for name, gradient in expected.items()}, 0, 1)
    torch.optim.AdamW(model.parameters(), lr=0.01).step()


def test_clipping_under_fsdp2(seed):
    run_ranks(2, clipped_by_torch, seed)


def sharded_over_replicas(rank, size, seed, way):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(size // 2, 2)
    groups = anabranch.ParallelGroups(None, mesh["experts"], mesh["replicas"])
    model = Small(seed, group=mesh["experts"], dtensor=True)
    fully_shard(model.moe.experts, mesh=mesh["replicas"])
    everything = mesh_of(size)
    if way == "all ranks":
        fully_shard(model, mesh=everything)
    elif way == "hybrid":
        fully_shard(model, mesh=mesh)
    for p in model.moe.experts.parameters():
        assert p.shape[0] == EXPERTS and p.to_local().shape[0] == EXPERTS // size
    whole = whole_parameters(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, foreach=False)
    for step in range(2):
        model.zero_grad()
        backward(model, seed + step, rank, size)
        anabranch.finish_gradients(model, groups)
        expected = expected_gradients(whole, [batch_of(seed + step, 0, 1)], size)
        assert_gradients(model, expected, 0, 1)
        if way == "all ranks":
            norm = anabranch.clip_gradient_norm(model, 1e9, groups)
            assert norm == pytest.approx(sum(g.square().sum().item() for g in expected.values()) ** 0.5, rel=1e-12)
        elif way == "hybrid":
            with pytest.raises(ValueError, match="experts.up_weight over 4|over 2"):
                anabranch.clip_gradient_norm(model, 1e9, groups)
        optimizer.step()
        whole = {name: value - 0.01 * expected[name] for name, value in whole.items()}
    for name, value in values_of(model).items():
        torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), whole[name], **CLOSE)


def not_finite_on_one(rank, size, seed):
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(size // 2, 2)
    groups = anabranch.ParallelGroups(None, mesh["experts"], mesh["replicas"])
    model = Small(seed, group=mesh["experts"], dtensor=True)
    fully_shard(model.moe.experts, mesh=mesh["replicas"])
    backward(model, seed, rank, size)
    if rank == 1:
        model.moe.experts.up_weight.grad.to_local().view(-1)[3] = torch.inf
    anabranch.finish_gradients(model, groups)
    assert not all(rows.isfinite().all() for rows in (p.grad.to_local() for p in model.moe.experts.parameters()))


def hybrid_beside_plain_experts(rank, size, seed):
    """The rest sharded within each replica: as the experts are, which are plain."""
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(size // 2, 2)
    groups = anabranch.ParallelGroups(None, mesh["experts"], mesh["replicas"])
    model = Small(seed, group=mesh["experts"])
    fully_shard(model, mesh=mesh, ignored_params={p for _, p in anabranch.expert_parameters(model)})
    backward(model, seed, rank, size)
    anabranch.finish_gradients(model, groups)
    expected = expected_gradients(whole_parameters(seed), [batch_of(seed, 0, 1)], size)
    assert_gradients(model, expected, rank % 2, 2)
    norm = anabranch.clip_gradient_norm(model, 1e9, groups)
    assert norm == pytest.approx(sum(g.square().sum().item() for g in expected.values()) ** 0.5, rel=1e-12)


def within_replicas(rank, size, seed):
    for way in ("all ranks", "hybrid", "experts alone"):
        sharded_over_replicas(rank, size, seed, way)
    not_finite_on_one(rank, size, seed)
    hybrid_beside_plain_experts(rank, size, seed)


def test_fsdp2_within_replicas(seed):
    run_ranks(4, within_replicas, seed)


def in_mixed_precision(rank, size, seed):
    for over_experts in (False, True):
        mixed(rank, size, seed, over_experts)


def mixed(rank, size, seed, over_experts):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = mesh_of(1, size)
    model = Small(seed, torch.float32, group=mesh["experts"], dtensor=over_experts)
    if over_experts:
        fully_shard(model.moe.experts, mesh=mesh["replicas"], mp_policy=policy)
        fully_shard(model, mesh=mesh_of(size), mp_policy=policy)
    else:
        experts = {p for _, p in anabranch.expert_parameters(model)}
        fully_shard(model, mesh=mesh_of(size), mp_policy=policy, ignored_params=experts)
    x, dy = batch_of(seed, rank, size, dtype=torch.float32)
    found = model(x)
    assert found.dtype == torch.bfloat16
    (found * dy).sum().backward()
    anabranch.finish_gradients(model)
    reference = Small(seed, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference(x)
    (expected * dy).sum().backward()
    anabranch.finish_gradients(reference)
    # Both in bf16 with roundings at other places; of one another's size all the same.
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()
    for (name, p), q in zip(model.moe.experts.named_parameters(), reference.moe.experts.parameters(), strict=True):
        gradient = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        assert gradient.dtype == torch.float32, name
        assert (gradient - q.grad).norm() <= 0.1 * q.grad.norm(), name


def test_mixed_precision_of_fsdp2(seed):
    run_ranks(2, in_mixed_precision, seed)


def wrong(rank, size):
    with pytest.raises(ValueError, match="expected a DeviceMesh of one dimension or a torch.distributed process group"):
        Small(1, group=anabranch.make_parallel_groups(2).expert_parallel, dtensor=True)
    with pytest.raises(ValueError, match=r"5 experts over 4 ranks, which have \[2, 1, 1, 1\].*\[2, 2, 1, 0\]"):
        anabranch.MoE(8, 12, 5, 2, dtensor=True)


def test_what_cannot_be_dtensors():
    run_ranks(4, wrong)
    assert not global_experts(Small(1, dtensor=True))  # one process has all of them
