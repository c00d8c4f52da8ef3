"""Rows that go within each host first: what the C++ library promises of it, from Python."""

import anabranch
import pytest
import torch
from ranks import backend_for, run_ranks

OPTIONS = dict(hidden_size=8, expert_hidden_size=12, num_experts=6, top_k=2, seed=7)


def run_layer(rank, size, ways, device):
    node = str(rank // 2)
    groups = [None if way is None else anabranch.hierarchical(all_to_all=way, node=node) for way in ways]
    generator = torch.Generator().manual_seed(100 + rank)
    x, dy = (torch.randn(5 * rank, 8, generator=generator).to(device) for _ in range(2))
    results = []
    for group in groups:
        layer = anabranch.MoE(**OPTIONS, device=device, group=group)
        for _ in range(10):  # auto measures, and then has chosen
            inputs = x.clone().requires_grad_()
            out = layer(inputs).output
            out.backward(dy)
            results.append((out.detach().cpu(), inputs.grad.cpu()))
    return all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("size", [3, 4])
def test_every_way_gives_the_same_bits(size, device):
    ways = [None, "flat", "hierarchical", "auto"]
    assert all(run_ranks(size, run_layer, ways, device.type, backend=backend_for(device, size)))


def run_groups(rank, size):
    flat = anabranch.as_group()
    group = anabranch.hierarchical(flat, "hierarchical", str(rank % 2))
    assert (group.rank, group.size) == (rank, size)
    assert anabranch.hierarchical(flat, "hierarchical", str(rank % 2)) is group
    assert anabranch.hierarchical(flat, "hierarchical", f"{rank // 2} of others") is not group
    assert anabranch.as_group(group) is group and group.on(torch.device("cpu")) is group
    total = torch.ones(3)
    group.all_reduce(total)
    parallel = anabranch.make_parallel_groups(2, group)
    part = torch.full((2,), float(rank))
    parallel.expert_parallel.all_reduce(part)
    with pytest.raises(ValueError, match="all_to_all = 'both', expected auto, flat or hierarchical"):
        anabranch.hierarchical(flat, "both")
    return total.tolist(), part.tolist()


def test_it_is_a_group_like_others():
    results = run_ranks(4, run_groups)
    assert [total for total, _ in results] == [[4.0] * 3] * 4
    assert [part for _, part in results] == [[1.0] * 2] * 2 + [[5.0] * 2] * 2


def test_one_process_is_on_one_node():
    assert anabranch.hierarchical() is anabranch.as_group()
