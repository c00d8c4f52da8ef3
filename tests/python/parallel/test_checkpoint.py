"""anabranch.save_checkpoint and load_checkpoint: at any number of ranks, optimizer included, all or nothing."""

from pathlib import Path

import anabranch
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from small import Small, batch_of
from torch import nn


class WithBuffers(nn.Module):
    """Buffers to keep and not to keep, a frozen and a tied parameter."""

    def __init__(self, seed):
        super().__init__()
        self.small = Small(seed, expert_bias=True)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.tied = self.small.before.weight
        self.register_buffer("count", torch.tensor(seed))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.small(x)


def optimizers_of(kind, model):
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "AdamW":
        return torch.optim.AdamW(trained, lr=0.01, amsgrad=True)
    if kind == "Adam":
        return torch.optim.Adam(trained, lr=0.01, foreach=False)
    if kind == "SGD":
        return torch.optim.SGD(trained, lr=0.01, momentum=0.9)
    if kind == "plain SGD":
        return torch.optim.SGD(trained, lr=0.01)
    matrices = [p for p in trained if p.dim() == 2]
    others = [p for p in trained if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01)]


def step(model, optimizers, seed, rank, size):
    x, dy = batch_of(seed, rank, size)
    ((model(x) * dy).sum() * size).backward()  # the whole batch's sum, at any number of ranks
    anabranch.finish_gradients(model)
    for each in optimizers if isinstance(optimizers, list) else [optimizers]:
        each.step()
        each.zero_grad()


def values_of(model):
    """By name; experts by this rank's part."""
    model = getattr(model, "module", model)
    return {name: value.tolist() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def saved(rank, size, folder, kind, seed, wrapped):
    model = WithBuffers(seed)
    optimizers = optimizers_of(kind, model)
    outer = nn.parallel.DistributedDataParallel(anabranch.ignore_expert_parameters(model)) if wrapped else model
    for each in range(3):
        step(outer, optimizers, seed + each, rank, size)
    model.small.moe.router.expert_bias.add_(0.25)
    anabranch.save_checkpoint(folder, outer, optimizers, metadata={"step": "3", "text": "ä \"b\""})
    before = values_of(model)
    for each in range(3, 5):
        step(outer, optimizers, seed + each, rank, size)
    return before, values_of(model)


def loaded(rank, size, folder, kind, seed):
    model = WithBuffers(seed + 77)
    optimizers = optimizers_of(kind, model)
    step(model, optimizers, seed + 50, rank, size)  # what it had is lost
    assert anabranch.load_checkpoint(folder, model, optimizers) == {"step": "3", "text": "ä \"b\""}
    after = values_of(model)
    for each in range(3, 5):
        step(model, optimizers, seed + each, rank, size)
    return after, values_of(model)


def whole(ranks, which):
    """The experts of all ranks one after another."""
    found = {}
    for name, value in ranks[0][which].items():
        found[name] = sum((rank[which][name] for rank in ranks), []) if ".experts." in name else value
    return found


@pytest.mark.parametrize(
    "kind, writers, readers, wrapped",
    [
        ("AdamW", 2, 2, True),
        ("AdamW", 2, 1, False),
        ("AdamW", 2, 4, False),
        ("Adam", 3, 2, False),
        ("SGD", 1, 3, False),
        ("plain SGD", 2, 2, False),
        ("Muon+AdamW", 2, 2, False),
    ],
)
def test_training_goes_on(kind, writers, readers, wrapped, tmp_path, seed):
    if "Muon" in kind and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    wrote = run_ranks(writers, saved, str(tmp_path), kind, seed, wrapped)
    read = run_ranks(readers, loaded, str(tmp_path), kind, seed)
    for name, value in whole(wrote, 0).items():
        if "scratch" not in name:
            assert whole(read, 0)[name] == value, name
    for name, value in whole(wrote, 1).items():
        found, expected = torch.tensor(whole(read, 1)[name]), torch.tensor(value)
        if readers == writers:
            assert torch.equal(found, expected), name
        else:  # fp64: the ranks' sums are added in another order
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_the_files_are_those_of_the_cpp_library(tmp_path, seed):
    run_ranks(2, saved, str(tmp_path), "AdamW", seed, False)
    files = sorted(tmp_path.glob("model-*-rank0000?-of-00002.safetensors"))
    assert len(files) == 2
    names = set().union(*(load_file(file) for file in files))
    assert {"small.moe.experts.3.up_weight", "optimizer.exp_avg.small.moe.experts.0.down_weight"} <= names
    assert {"optimizer.step.small.moe.experts.up_weight", "small.moe.router.expert_bias", "count"} <= names
    assert not any("scratch" in name or "_extra_state" in name for name in names)
    assert len({"tied", "small.before.weight"} & names) == 1


def unlike(rank, size, folder, seed):
    model = WithBuffers(seed + 1)
    before = values_of(model)

    def refused(error, match, *arguments):
        with pytest.raises(error, match=match):
            anabranch.load_checkpoint(*arguments)
        assert values_of(model) == before

    refused(RuntimeError, "holds AdamW, state was asked for SGD", folder, model, optimizers_of("SGD", model))
    refused(RuntimeError, r"checkpoint\.index\.json", folder + "/none", model)
    other = nn.ModuleDict({"small": model.small})
    refused(RuntimeError, "the checkpoint has no 'small.before.weight'", folder, other)  # it is stored as `tied`
    with pytest.raises(ValueError, match="no parameter of the model"):
        anabranch.save_checkpoint(folder, other, torch.optim.SGD([nn.Parameter(torch.zeros(3))]))
    torch.distributed.barrier()
    if rank == 0:
        file = next(path for path in sorted(Path(folder).iterdir()) if path.suffix == ".safetensors")
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    torch.distributed.barrier()
    refused(RuntimeError, "corrupt", folder, model, optimizers_of("AdamW", model))


def test_what_does_not_fit_is_refused_before_anything_is_touched(tmp_path, seed):
    run_ranks(2, saved, str(tmp_path), "AdamW", seed, False)
    run_ranks(2, unlike, str(tmp_path), seed)


def without_an_optimizer(rank, size, folder, seed):
    model = WithBuffers(seed + 1)
    anabranch.load_checkpoint(folder, model)
    anabranch.save_checkpoint(folder, model)
    other = WithBuffers(seed + 2)
    with pytest.raises(RuntimeError, match="holds no optimizer"):
        anabranch.load_checkpoint(folder, other, optimizers_of("SGD", other))
    assert anabranch.load_checkpoint(folder, other) == {}
    return values_of(model) == values_of(other)


def test_without_an_optimizer(tmp_path, seed):
    run_ranks(2, saved, str(tmp_path), "AdamW", seed, False)
    assert run_ranks(2, without_an_optimizer, str(tmp_path), seed) == [True, True]
