"""Groups of ranks: what they may be made from, and that the ranks' number changes no answer."""

import contextlib
import copy
import datetime
import gc
import time
import weakref

import anabranch
import pytest
import torch
import torch.distributed as dist
from anabranch.features import transports
from jobs import ALONE, MPIRUN, TORCHRUN, run_job
from ranks import backend_for, run_ranks
from torch import nn

OPTIONS = dict(hidden_size=8, expert_hidden_size=12, num_experts=5, top_k=2, glu=True, bias=True, seed=7)
MORE = dict(shared_expert_hidden_size=6, dtype=torch.float64)


def tokens_of(rank, size, total=24):
    """Unequal parts of a batch, the last rank's empty where there are several."""
    if size == 1:
        return slice(0, total)
    share = total // (size - 1)
    return slice(rank * share, total if rank == size - 2 else (rank + 1) * share) if rank < size - 1 else slice(total, total)


def batch(total=24):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(total, 8, dtype=torch.float64, generator=generator)
    dy = torch.randn(total, 8, dtype=torch.float64, generator=generator)
    return x, dy


def run_layer(rank, size, freeze_experts, device, more=None):
    layer = anabranch.MoE(**OPTIONS, **MORE, **(more or {}), device=device)
    assert layer.group.size == size and layer.group.rank == rank
    layer.experts.requires_grad_(not freeze_experts)
    x, dy = (part[tokens_of(rank, size)].to(device) for part in batch())
    x = x.requires_grad_()
    out = layer(x)
    ((out.output * dy).sum() + 0.1 * (out.balance_loss + out.z_loss)).backward()
    anabranch.finish_gradients(layer)
    gradients = {name: p.grad.tolist() for name, p in layer.named_parameters() if p.requires_grad}
    stats = layer.stats()
    assert stats.forwards == 1 and (stats.bytes_sent > 0) == (size > 1)
    norm = anabranch.clip_gradient_norm(layer, 1e9)
    assert (" rounds" in layer.explain()) == (more is not None)
    return out.output.tolist(), x.grad.tolist(), out.balance_loss.item(), out.expert_load.tolist(), gradients, norm


@pytest.mark.parametrize(
    "size, freeze_experts, more", [(2, True, None), (2, False, {"receive_rows_limit": 5}), (4, False, None), (4, True, None)]
)
def test_any_number_of_ranks_gives_the_answer_of_one(size, freeze_experts, more, device):
    (one,) = run_ranks(1, run_layer, freeze_experts, "cpu")
    several = run_ranks(size, run_layer, freeze_experts, device.type, more, backend=backend_for(device, size))

    def close(actual, expected):
        torch.testing.assert_close(
            torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12
        )

    close(sum((rank[0] for rank in several), []), one[0])
    for rank in several:
        close(rank[2], one[2])
        assert rank[3] == one[3]
        close(rank[5], several[0][5])
    summed = {}
    for name in one[4]:
        if name.startswith("experts."):
            summed[name] = sum((rank[4][name] for rank in several), [])
        else:
            summed[name] = several[0][4][name]
            for rank in several:
                close(rank[4][name], summed[name])
    # The mean of the ranks' losses is 1 / W of the sum of ⟨y, dy⟩, plus the auxiliary losses.
    (other,) = run_ranks(1, run_scaled, size, freeze_experts)
    for name, expected in other.items():
        close(summed[name], expected)


def run_scaled(rank, size, ranks, freeze_experts):
    layer = anabranch.MoE(**OPTIONS, **MORE)
    layer.experts.requires_grad_(not freeze_experts)
    x, dy = batch()
    out = layer(x)
    ((out.output * dy).sum() / ranks + 0.1 * (out.balance_loss + out.z_loss)).backward()
    return {name: p.grad.tolist() for name, p in layer.named_parameters() if p.requires_grad}


class Model(nn.Module):
    def __init__(self, group=None):
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(8, 8, dtype=torch.float64)
        self.moe = anabranch.MoE(**OPTIONS, **MORE, group=group)
        self.outer = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, x):
        out = self.moe(torch.tanh(self.inner(x)))
        return self.outer(x + out.output), out.balance_loss


def train(model, finish, rank, size, balance=0.01, steps=3):
    """Of the mean over ranks; returns losses and parameters, an expert's by its global number."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(steps):
        x = torch.randn(12, 8, dtype=torch.float64, generator=generator)
        target = torch.randn(12, 4, dtype=torch.float64, generator=generator)
        part = slice(rank * 12 // size, (rank + 1) * 12 // size)
        y, balance_loss = model(x[part])
        loss = (y - target[part]).square().mean() + balance * balance_loss
        optimizer.zero_grad()
        loss.backward()
        finish(model)
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_alone(rank, size, balance):
    model = Model()
    losses = train(model, lambda model: None, 0, 1, balance)
    return losses, {name: p.tolist() for name, p in model.named_parameters()}


def train_with(rank, size, kind):
    if kind == "replicas":
        groups = anabranch.make_parallel_groups(2)
        model = Model(groups.expert_parallel)
        losses = train(model, lambda model: anabranch.finish_gradients(model, groups), rank, size, balance=0.0)
    elif kind == "plain":
        model = Model()
        losses = train(model, anabranch.finish_gradients, rank, size)
    elif kind == "ddp":
        model = Model()
        wrapped = nn.parallel.DistributedDataParallel(anabranch.ignore_expert_parameters(model))
        losses = train(wrapped, anabranch.finish_gradients, rank, size)
    else:
        model = Model()
        losses = train(sharded(model), anabranch.finish_gradients, rank, size)
    values = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).tolist() for name, p in model.named_parameters()}
    return losses, values


def sharded(model):
    """FSDP2 on all but the experts."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    experts = {parameter for _, parameter in anabranch.expert_parameters(model)}
    return fully_shard(model, mesh=mesh, ignored_params=experts)


@pytest.mark.parametrize("kind, size", [("plain", 2), ("ddp", 2), ("fsdp2", 2), ("replicas", 4)])
def test_trains_as_one_process_does(kind, size):
    # Replicas each have a balance loss of their own batch.
    ((losses, expected),) = run_ranks(1, train_alone, 0.0 if kind == "replicas" else 0.01)
    ranks = run_ranks(size, train_with, kind)
    for i, loss in enumerate(losses):
        mean = sum(rank[0][i] for rank in ranks) / size
        assert mean == pytest.approx(loss, rel=1e-10)
    expert_parallel = 2
    for name, value in expected.items():
        held = [rank[1][name] for rank in ranks]
        if ".experts." in f".{name}":
            found = sum(held[:expert_parallel], [])
            assert sum(held[-expert_parallel:], []) == found
        else:
            found = held[0]
            assert all(each == found for each in held)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(value), rtol=1e-5, atol=1e-7)


def every_kind_of_group(rank, size):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "expert"))
    parts = [dist.new_group(list(ranks)) for ranks in ([0, 1], [2, 3])]
    found = {
        "none": anabranch.as_group(),
        "world": anabranch.as_group(dist.group.WORLD),
        "mesh": anabranch.as_group(mesh["expert"]),
        "part": anabranch.as_group(parts[rank // 2]),
    }
    assert found["none"] is found["world"]
    assert copy.deepcopy(found["mesh"]) is found["mesh"]
    # gloo moves a GPU's memory itself
    assert all(group.on(torch.device("cuda", 0)) is group for group in found.values())
    for group in found.values():
        layer = anabranch.MoE(**OPTIONS, group=group)
        layer(torch.randn(3 + rank, 8, requires_grad=True)).output.sum().backward()
    errors = []
    for wrong in (mesh, parts[1 - rank // 2]):
        with pytest.raises(ValueError) as raised:
            anabranch.as_group(wrong)
        errors.append(str(raised.value))
    return {name: (group.rank, group.size, group.kind) for name, group in found.items()}, errors


def test_groups_of_torch_distributed():
    for rank, (found, errors) in enumerate(run_ranks(4, every_kind_of_group)):
        assert found["none"] == found["world"] == (rank, 4, "process_group")
        assert found["mesh"] == found["part"] == (rank % 2, 2, "process_group")
        assert "2 dimensions" in errors[0] and "no member" in errors[1]


def started_again(rank, size, folder, device):
    """The process group is destroyed and made anew, with its ranks the other way round, under the same name."""
    before = anabranch.MoE(**OPTIONS, device=device)
    before(torch.randn(3, 8, device=device))
    mesh_before = anabranch.as_group(dist.device_mesh.init_device_mesh("cpu", (size,)))
    backend = dist.get_backend_config(dist.group.WORLD)
    dist.destroy_process_group()
    turned = size - 1 - rank
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=turned, world_size=size)

    layer = anabranch.MoE(**OPTIONS, device=device)
    assert (layer.group.rank, layer.group.size) == (turned, size)
    out = layer(torch.randn(3 + turned, 8, device=device))
    with pytest.raises((RuntimeError, ValueError), match="process group destroyed.*Make the layer anew"):
        before(torch.randn(3, 8, device=device))
    assert anabranch.as_group(dist.device_mesh.init_device_mesh("cpu", (size,))) is not mesh_before
    assert anabranch.as_group() is layer.group
    return out.expert_load.tolist()


def test_a_process_group_destroyed_and_made_anew(device, tmp_path):
    loads = run_ranks(2, started_again, str(tmp_path), device.type, backend=backend_for(device, 2))
    assert loads[0] == loads[1] and sum(loads[0]) == 2 * (3 + 4)


def test_gpu_groups_follow_the_process_group_they_were_made_of(monkeypatch):
    """The library's own communicator over GPUs has a name made of the process group's, which repeats."""
    made = []

    def nccl_group(name, group, device, deadline):
        made.append((name, group))
        return torch.ops.anabranch.self_group(name)

    monkeypatch.setattr(torch.ops.anabranch, "nccl_group", nccl_group)
    monkeypatch.setattr(anabranch.groups, "_by_nccl", lambda source: True)
    device = torch.device("cuda", 0)
    store = dist.HashStore()
    found = []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.PrefixStore(str(len(found)), store), rank=0, world_size=1)
        source = dist.group.WORLD
        group = anabranch.groups._named(f"process_group:{source.group_name}", source, torch.ops.anabranch.self_group)
        group._serves_gpus = False  # as a group of several ranks
        found.append(group.on(device))
        assert group.on(device) is found[-1]
        dist.destroy_process_group()
    assert found[0] is not found[1] and len(set(made)) == 2
    with pytest.raises((RuntimeError, ValueError), match="no group"):
        torch.ops.anabranch.describe_group(found[0].name)
    anabranch.groups.release_groups()


def test_an_exception_does_not_keep_a_group_that_is_left():
    """What ranks wait for where they leave a group over GPUs: one of them may have had an error that holds its frames."""

    class Kept(Exception):
        pass

    def step():
        layer = anabranch.MoE(**OPTIONS)
        output = layer(torch.randn(3, 8, requires_grad=True)).output
        kept.append(weakref.ref(output))  # and with it the graph
        error = Kept()
        raise error  # which this frame has, and it this frame

    kept = []
    gc.disable()
    try:
        with contextlib.suppress(Kept):
            step()
        assert kept[0]() is not None
        anabranch.groups.release_groups()
        assert kept[0]() is None
    finally:
        gc.enable()


def on_gpus(rank, size):
    device = torch.device("cuda", rank)
    group = anabranch.as_group()
    there = group.on(device)
    numbers = torch.full((5,), float(rank + 1), device=device)
    there.all_reduce(numbers)
    assert group.on(device) is there and there.on(device) is there and group.on(torch.device("cpu")) is group
    return group.kind, there.kind, (there.rank, there.size), numbers.tolist()


def test_gpus_of_a_group_by_nccl_are_tied_by_the_library_itself():
    if torch.cuda.device_count() < 2:
        pytest.skip("takes two GPUs")
    for backend in ("nccl", "cpu:gloo,cuda:nccl"):
        for rank, found in enumerate(run_ranks(2, on_gpus, backend=backend)):
            assert found == ("process_group", "nccl", (rank, 2), [3.0] * 5)


def differing(rank, size):
    errors = []
    for options in ({"top_k": 2 + rank}, {"seed": 7 + rank}):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            anabranch.MoE(**{**OPTIONS, **options})
        errors.append(str(raised.value))
    torch.manual_seed(rank)
    with pytest.raises(RuntimeError, match=r"has seed = .*torch\.manual_seed with one number on all ranks"):
        anabranch.MoE(**{**OPTIONS, "seed": None})
    layer = anabranch.MoE(**OPTIONS)
    x = torch.randn(3, 8)
    if rank == 1:
        x[2, 0] = float("nan")
    with pytest.raises((RuntimeError, ValueError)) as raised:
        layer(x)
    errors.append(str(raised.value))
    layer(torch.randn(3, 8))
    return errors


def test_ranks_that_differ_are_named():
    for rank, errors in enumerate(run_ranks(2, differing)):
        assert "top_k = 3" in errors[0] and "rank 1" in errors[0]
        assert "seed = 8" in errors[1] and "manual_seed" not in errors[1]
        assert "token 2" in errors[2] and ("rank 1" in errors[2] or rank == 1)


def waiting_in_vain(rank, size):
    anabranch.groups.DEADLINE = datetime.timedelta(seconds=2)
    layer = anabranch.MoE(**OPTIONS)
    if rank == 1:
        time.sleep(4)
        return None
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as raised:
        layer(torch.randn(3, 8))
    assert time.monotonic() - begin < 60
    return str(raised.value)


def test_a_rank_that_stays_away_is_named():
    assert "rank 1" in run_ranks(2, waiting_in_vain, together=False)[0]


def wrong_numbers(rank, size):
    layer = anabranch.MoE(8, 12, 4, 2)
    with pytest.raises(ValueError, match="max_norm = 0"):
        anabranch.clip_gradient_norm(layer, 0)
    with pytest.raises(ValueError, match="3 does not divide the 2 ranks"):
        anabranch.make_parallel_groups(3)


def test_wrong_numbers():
    run_ranks(2, wrong_numbers)


LAUNCHED = """
import sys
import anabranch, torch
layer = anabranch.MoE(8, 12, 5, 2, seed=7)
layer(torch.randn(3 + layer.group.rank, 8, requires_grad=True)).output.sum().backward()
anabranch.finish_gradients(layer)
info = anabranch.discover_rank()
assert (info.rank, info.size) == (layer.group.rank, layer.group.size), (info, layer.group)
found = [str(info.size), info.launcher, layer.group.kind]
assert found == sys.argv[1:], found
"""

OVER_MPI4PY = """
import anabranch, torch
from mpi4py import MPI
world = MPI.COMM_WORLD
alone = world.Split(world.rank, 0)
turned = world.Split(0, -world.rank)
for communicator in (world, alone, turned):
    layer = anabranch.MoE(8, 12, 5, 2, seed=7, group=communicator)
    assert (layer.group.rank, layer.group.size) == (communicator.rank, communicator.size), layer.group
    layer(torch.randn(3 + world.rank, 8, requires_grad=True)).output.sum().backward()
try:
    anabranch.as_group(MPI.COMM_WORLD.Get_group())
except TypeError as error:
    assert "Group of mpi4py" in str(error), error
else:
    raise AssertionError("taken for a communicator")
"""

MPI = "mpi" in transports()


def run_program(program, command, tmp_path, *arguments):
    path = tmp_path / "program.py"
    path.write_text(program)
    run_job(*command, path, *arguments)


def test_no_launcher(tmp_path):
    run_program(LAUNCHED, ALONE, tmp_path, "1", "", "self")


def test_torchrun(tmp_path):
    run_program(LAUNCHED, TORCHRUN, tmp_path, "2", "torchrun", "process_group")


@pytest.mark.skipif(not MPI, reason="anabranch was built without MPI")
def test_mpirun(tmp_path):
    run_program(LAUNCHED, MPIRUN, tmp_path, "2", "Open MPI", "mpi")


@pytest.mark.skipif(not MPI, reason="anabranch was built without MPI")
def test_mpi4py(tmp_path):
    pytest.importorskip("mpi4py")
    run_program(OVER_MPI4PY, MPIRUN, tmp_path)
