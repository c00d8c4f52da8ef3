"""Experts in any order on any rank, whole or in slices of their hidden dimension: the layer stays the same."""

import anabranch
import pytest
import torch
from anabranch.layer.held import held_experts
from ranks import run_ranks
from small import EXPERTS, INNER, Small, batch_of, expected_gradients
from torch import nn

# By rank: (expert, slice, slices).
WHOLE = [[(2, 0, 1), (0, 0, 1), (3, 0, 1)], [(1, 0, 1)]]
HALVES = [[(0, 0, 2), (3, 0, 2), (1, 1, 2), (2, 1, 2)], [(2, 0, 2), (1, 0, 2), (0, 1, 2), (3, 1, 2)]]
UNEVEN = [[(1, 0, 1), (2, 0, 1)], [(0, 0, 2), (3, 1, 2)], [(3, 0, 2), (0, 1, 2)]]


def text_of(lists):
    return ";".join(
        ",".join(str(e) if slices == 1 else f"{e}/{slice}:{slices}" for e, slice, slices in of_rank) for of_rank in lists
    )


def part_of(name, whole, own):
    """What a rank has of all experts' `name`."""
    if ".experts." not in name:
        return whole
    parts = []
    for expert, slice, slices in own:
        width = INNER // slices
        units = torch.arange(width) + slice * width
        if name.endswith("down_weight"):
            parts.append(whole[expert][:, units])
        elif name.endswith("down_bias"):
            parts.append(whole[expert] * (slice == 0))
        else:  # gate and up
            parts.append(whole[expert][torch.cat([units, units + INNER])])
    return torch.stack(parts)


def gradients(rank, size, lists, seed):
    model = Small(seed, bias=True, placement=text_of(lists))
    whole = {name: p.detach() for name, p in Small(seed, bias=True, group=anabranch.groups.alone()).named_parameters()}
    for name, p in model.named_parameters():
        assert torch.equal(p, part_of(name, whole[name], lists[rank])), name
    x, dy = batch_of(seed, rank, size)
    (model(x) * dy).sum().backward()
    anabranch.finish_gradients(model)
    expected = expected_gradients(whole, [batch_of(seed, 0, 1)], size)
    for name, p in model.named_parameters():
        wanted = part_of(name, expected[name], lists[rank])
        error = (p.grad - wanted).abs().max().item()
        assert error <= 1000 * 2.0**-53 * max(1.0, expected[name].abs().max().item()), f"{name} is off by {error}"
    squares = sum(g.square().sum().item() for g in expected.values())
    assert anabranch.clip_gradient_norm(model, 1e9) == pytest.approx(squares**0.5)


@pytest.mark.parametrize("lists", [WHOLE, HALVES, UNEVEN])
def test_gradients_are_those_of_the_whole(lists, seed):
    run_ranks(len(lists), gradients, lists, seed)


def more_ranks_than_experts(rank, size, seed):
    options = dict(hidden_size=8, expert_hidden_size=12, num_experts=1, top_k=1, seed=seed, dtype=torch.float64)
    layer = anabranch.MoE(**options, placement="sliced")
    assert layer.experts.up_weight.shape == (1, 12 // size, 8) and layer.experts.down_weight.shape == (1, 8, 12 // size)
    alone = anabranch.MoE(**options, group=anabranch.groups.alone())
    x = torch.randn(5 * rank, 8, dtype=torch.float64)  # none on rank 0
    torch.testing.assert_close(layer(x).output, alone(x).output)
    assert layer.get_extra_state().tolist() == [[0, rank, size]]


def test_more_ranks_than_experts(seed):
    run_ranks(3, more_ranks_than_experts, seed)


def step(model, optimizer, seed, rank, size):
    x, dy = batch_of(seed, rank, size)
    ((model(x) * dy).sum() * size).backward()
    anabranch.finish_gradients(model)
    optimizer.step()
    optimizer.zero_grad()


def saved(rank, size, folder, options, seed):
    model = Small(seed, bias=True, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step(model, optimizer, seed, rank, size)
    anabranch.save_checkpoint(folder, model, optimizer)
    step(model, optimizer, seed + 1, rank, size)
    return {name: p.tolist() for name, p in model.named_parameters()}


def loaded(rank, size, folder, lists, seed, expected):
    model = Small(seed + 1, bias=True, placement=text_of(lists))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    anabranch.load_checkpoint(folder, model, optimizer)
    step(model, optimizer, seed + 1, rank, size)
    for name, p in model.named_parameters():
        wanted = part_of(name, torch.tensor(expected[name], dtype=torch.float64), lists[rank])
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-9, atol=1e-9, msg=name)


def test_checkpoints_load_at_any_placement(tmp_path, seed):
    (expected,) = run_ranks(1, saved, str(tmp_path / "blocks"), {}, seed)
    run_ranks(2, saved, str(tmp_path / "halves"), {"placement": text_of(HALVES)}, seed)
    for folder in ("blocks", "halves"):
        for lists in (WHOLE, UNEVEN):
            run_ranks(len(lists), loaded, str(tmp_path / folder), lists, seed, expected)


def refused(rank, size, seed):
    halves = text_of(HALVES)
    model = Small(seed, placement=halves)
    state = model.state_dict()
    Small(seed + 1, placement=halves).load_state_dict(state)
    for other in ({}, {"placement": text_of(WHOLE)}):
        with pytest.raises(ValueError, match="at another placement"):
            Small(seed, **other).load_state_dict(state)
    (model(batch_of(seed, rank, size)[0])).sum().backward()
    anabranch.finish_gradients(model)
    with pytest.raises(ValueError, match="Muon of experts in slices"):
        anabranch.Muon(model.moe.experts.parameters()).step()
    for options, text in (
        ({"placement": "0,1"}, "of 1 ranks, expected 2"),
        ({"placement": "0,1;2"}, "expert 3 is not there"),
        ({"placement": "fast"}, "expected blocks, sliced, movable or lists"),
        ({"placement": halves, "balance": "auto"}, "in slices, expected off"),
        ({"placement": halves, "dtensor": True}, "expected blocks"),
        ({"placement": halves, "experts": nn.Identity()}, "which are the core's experts'"),
    ):
        with pytest.raises(ValueError, match=text):
            Small(seed, **options)
    for options, text in (
        ({}, "placement is 'blocks'"),
        ({"placement": "sliced"}, "placement is 'sliced'"),
        ({"placement": halves}, "expected movable or lists of whole experts"),
    ):
        with pytest.raises(ValueError, match=text):
            mover = anabranch.ExpertMover(Small(seed, **options), interval=1)
            mover.after_step([torch.ones(EXPERTS, dtype=torch.int64)])
    movable = Small(seed, placement="movable")
    for options in ({"interval": 0}, {"least_gain": 1.0}):
        with pytest.raises(ValueError, match="ExpertMover"):
            anabranch.ExpertMover(movable, **options)
    with pytest.raises(ValueError, match="loads of 2 layers"):
        anabranch.ExpertMover(movable).after_step([torch.ones(EXPERTS)] * 2)


def test_what_does_not_go_together_is_refused(seed):
    run_ranks(2, refused, seed)


def trained(rank, size, placement, seed):
    """The experts' parameters and their optimizer's states by expert, and how often experts have moved."""
    model = Small(seed, bias=True, placement=placement)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    mover = anabranch.ExpertMover(model, optimizer, interval=2, least_gain=0) if placement == "movable" else None
    for i in range(6):
        step(model, optimizer, seed + i, rank, size)
        if mover is not None:
            # Another expert is the fullest each time, so that there is always something to move.
            mover.after_step([torch.arange(1, EXPERTS + 1).roll(i) ** 2])
    own = [expert for expert, *_ in held_experts(model.moe._options, model.moe.group)[1]]
    tensors = {}
    for name, p in model.moe.experts.named_parameters():
        for kind, value in {"": p.detach(), **optimizer.state[p]}.items():
            if value.shape == p.shape:
                tensors |= {(name, kind, expert): value[i].tolist() for i, expert in enumerate(own)}
    return tensors, 0 if mover is None else mover.moves.experts


@pytest.mark.parametrize("size", [1, 2, 3])
def test_experts_move_with_their_states(size, seed):
    ranks = run_ranks(size, trained, "movable", seed)
    still = run_ranks(size, trained, "0,1,2,3" if size == 1 else "0,1;2,3" if size == 2 else "0,1;2;3", seed)
    assert (ranks[0][1] > 0) == (size > 1)
    found = {key: value for tensors, _ in ranks for key, value in tensors.items()}
    wanted = {key: value for tensors, _ in still for key, value in tensors.items()}
    assert found.keys() == wanted.keys() and len(found) == EXPERTS * 4 * 3
    for key, value in wanted.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), rtol=1e-6, atol=1e-7, msg=str(key))
