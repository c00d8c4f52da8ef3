"""The experts of all ranks in host memory on rank 0, whose device need not hold them."""

import anabranch
import pytest
import torch
from ranks import backend_for, run_ranks

WIDTH = 400_000  # 1.6 MB in fp32
COUNTS = [3, 90, 0]  # more of one rank than are moved at once
ALLOWED = 64 * 2**20


def rows_of(rank, seed):
    generator = torch.Generator().manual_seed(seed + rank)
    return torch.randn(COUNTS[rank], WIDTH, generator=generator)


def gather(rank, size, seed, device):
    rows = rows_of(rank, seed).to(device)
    group = anabranch.as_group().on(rows.device)
    on_gpu = rows.is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    gathered = torch.ops.anabranch.gather_rows(rows, group.name)
    taken = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    assert not gathered.is_cuda
    expected = torch.cat([rows_of(peer, seed) for peer in range(size)]) if rank == 0 else rows.cpu()[:0]
    return gathered.shape == expected.shape and torch.equal(gathered, expected), taken


def test_rows_of_all_ranks(seed, device):
    size = len(COUNTS)
    results = run_ranks(size, gather, seed, device.type, backend=backend_for(device, size))
    assert [equal for equal, _ in results] == [True] * size
    # The rows on their way, and what a transport keeps for them.
    assert max(taken for _, taken in results) <= 2 * ALLOWED


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (3, 2, 5)])
def test_rows_of_one_rank(shape):
    rows = torch.randn(shape)
    assert torch.equal(torch.ops.anabranch.gather_rows(rows, anabranch.as_group().name), rows)
