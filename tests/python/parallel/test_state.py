"""A layer's state says which experts it holds, and another rank's is refused."""

import warnings

import anabranch
import pytest
import torch
from ranks import run_ranks
from small import Small, batch_of


def changed(seed):
    """A model that training has moved away from what its seed gives."""
    model = Small(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def through_one_file(rank, size, folder, seed):
    model, other = changed(seed), Small(seed)
    untouched = other.moe.experts.up_weight.detach().clone()
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/model.pt")
    torch.distributed.barrier()
    state = torch.load(f"{folder}/model.pt")
    if rank == 0:
        other.load_state_dict(state)
        return same(model, other), ""
    with pytest.raises(ValueError, match=r"holds experts \[0, 2\) of 4, this rank has \[2, 4\) of 4") as raised:
        other.load_state_dict(state)
    with pytest.raises(ValueError, match="holds experts"):
        other.load_state_dict(state, strict=False)
    return torch.equal(other.moe.experts.up_weight, untouched), str(raised.value)


def test_the_file_of_rank_0_alone(tmp_path, seed):
    (equal, _), (kept, text) = run_ranks(2, through_one_file, str(tmp_path), seed)
    assert equal and kept and "anabranch.save_checkpoint keeps all ranks' experts" in text


def through_own_files(rank, size, folder, seed):
    model, other = changed(seed), Small(seed)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(torch.load(f"{folder}/{rank}.pt"))
    assert same(model, other)
    x, _ = batch_of(seed, rank, size)
    assert torch.equal(model(x), other(x))
    with pytest.raises(ValueError, match="saved by another rank"):
        other.load_state_dict(torch.load(f"{folder}/{1 - rank}.pt"))


def test_a_file_of_each_rank(tmp_path, seed):
    run_ranks(2, through_own_files, str(tmp_path), seed)


def at_another_number_of_ranks(rank, size, folder):
    with pytest.raises(ValueError, match=r"holds experts \[0, 2\) of 4, this rank has \[0, 4\) of 4"):
        Small(1).load_state_dict(torch.load(f"{folder}/0.pt"))


def test_another_number_of_ranks(tmp_path, seed):
    run_ranks(2, through_own_files, str(tmp_path), seed)
    run_ranks(1, at_another_number_of_ranks, str(tmp_path))


def through_distributed_checkpoint(rank, size, folder, seed):
    from torch.distributed import checkpoint

    model, other = changed(seed), Small(seed)
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=folder)
    state = {"model": other.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    try:
        other.load_state_dict(state["model"])
    except ValueError as error:
        return str(error)
    return ""


def test_distributed_checkpoint_of_a_plain_state(tmp_path, seed):
    # It keeps one rank's of each name, and some rank is the one.
    refusals = [text for text in run_ranks(2, through_distributed_checkpoint, str(tmp_path), seed) if text]
    assert refusals and all("another rank" in text for text in refusals)


def of_earlier_versions(rank, size, seed):
    model, other = changed(seed), Small(seed)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}
    with pytest.warns(UserWarning, match="the state of moe does not say which experts it holds"):
        other.load_state_dict(state)
    assert same(model, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict({"before.bias": state["before.bias"]}, strict=False)
    alone, another = (Small(seed, group=anabranch.groups.alone()) for _ in range(2))
    state = {name: value for name, value in alone.state_dict().items() if not name.endswith("_extra_state")}
    with warnings.catch_warnings():  # there is nobody else whose they could be
        warnings.simplefilter("error")
        another.load_state_dict(state)


def test_states_of_earlier_versions(seed):
    run_ranks(2, of_earlier_versions, seed)


def test_a_state_is_of_tensors_alone(seed):
    state = Small(seed).state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert state["moe._extra_state"].tolist() == [0, 4, 4]
    with torch.device("meta"):
        assert Small(seed).state_dict()["moe._extra_state"].tolist() == [0, 4, 4]
