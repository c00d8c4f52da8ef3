"""The rate of one GEMM against its rows: x [rows, k] times a weight [n, k]ᵀ."""

import statistics

import torch

from .cases import ARTICLE_SPLIT, TYPES
from .measure import Clock, steps_within

HIDDEN = 512
ROUNDS = 3
IN_A_ROW = 10


def rows_to_measure(small):
    """Powers of two, the article's own counts, and the even share of their sum."""
    if small:
        return [1 << power for power in range(4, 12)]
    even = sum(ARTICLE_SPLIT) // len(ARTICLE_SPLIT)
    return sorted({*(1 << power for power in range(7, 20)), *ARTICLE_SPLIT, even})


def in_a_row(product, cuda):
    """IN_A_ROW of a product; on a GPU as one launch, for the host launches more slowly than small ones run."""

    def all_of_them():
        for _ in range(IN_A_ROW):
            product()

    if not cuda:
        return all_of_them
    product()  # sets up what must not be set up while recording
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return graph.replay


def measure(device, dtype, factor, small, seconds):
    """Records {dtype, k, n, rows, ms, tflops}, all sizes in turns."""
    k = 64 if small else HIDDEN
    n, sizes, clock = factor * k, rows_to_measure(small), Clock(device)
    x = torch.randn(max(sizes), k, device=device, dtype=TYPES[dtype])
    weight = torch.randn(n, k, device=device, dtype=TYPES[dtype])
    out = torch.empty(max(sizes), n, device=device, dtype=TYPES[dtype])
    products = {
        rows: in_a_row(lambda rows=rows: torch.mm(x[:rows], weight.t(), out=out[:rows]), clock.cuda) for rows in sizes
    }
    times = {rows: [] for rows in sizes}
    for _ in range(ROUNDS):
        for rows, step in products.items():
            warm = clock.milliseconds(step, 1)[0]
            count = steps_within(seconds * 1e3 / ROUNDS, warm, least=3)
            times[rows] += [ms / IN_A_ROW for ms in clock.milliseconds(step, count)]
    for rows in sizes:
        ms = statistics.median(times[rows])
        yield dict(dtype=dtype, k=k, n=n, rows=rows, ms=ms, tflops=2 * rows * k * n / ms / 1e9)
