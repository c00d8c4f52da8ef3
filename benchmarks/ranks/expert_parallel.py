#!/usr/bin/env python3
"""The layer over the GPUs of a host as Python calls it, bf16, forward and backward apart: TFLOP/s of a GPU, beside the
same layer by torch.distributed's all_to_all_single and torch._grouped_mm, in turns.

    PYTHONPATH=build/release/python torchrun --nproc-per-node 2 benchmarks/ranks/expert_parallel.py

Rows travel in turn, beside the products, or as `auto` finds it. The last two shapes are those of Megatron-Core's table of
layers. Each rank has the same number of tokens and computes a share of the experts. `alone` is a rank that computes its
tokens by itself, all experts at hand: in balance the same products without an exchange, so that what a step takes longer
is communication that shows. `exchange` are its rows' ways alone, there and back, for both passes.
"""

import argparse
import dataclasses
import inspect
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))
import anabranch  # noqa: E402
import anabranch.functional as F  # noqa: E402
from layer import FINE, MIXTRAL, OLMOE, QWEN3, SEED, Case, far, make_layer, provenance  # noqa: E402
from peers import choose, grouped_experts, leaf  # noqa: E402

TOKENS = 8192  # of a rank, as LigerCute's figures have them
ROUNDS = 9
STEPS = 3  # timed in a round
WARM = 18  # steps, behind which auto has chosen
MEGATRON = [
    Case("Mixtral proxy, 4,096 tokens", 4096, 4096, 14336, 8, 2, False),
    Case("DeepSeek proxy, 4,096 tokens", 4096, 7168, 2048, 32, 8, False, shared=2048),
]


class AllToAll(torch.autograd.Function):
    """Rows in the order of the ranks they go to; the gradient takes the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, there: list[int], back: list[int]) -> Tensor:
        ctx.sizes = there, back
        received = rows.new_empty(sum(back), rows.shape[1])
        dist.all_to_all_single(received, rows.contiguous(), back, there)
        return received

    @staticmethod
    def backward(ctx, drows: Tensor):
        there, back = ctx.sizes
        return AllToAll.apply(drows, back, there), None, None


def by_torch(case: Case, gate: Tensor, up: Tensor, down: Tensor, *shared: Tensor):
    """What one writes by hand: a row an assignment through all_to_all_single, the experts by torch._grouped_mm."""
    gate, up, down, *shared = parameters = [leaf(each) for each in (gate, up, down, *shared)]
    ranks, local = dist.get_world_size(), up.shape[0]

    def forward(x: Tensor) -> Tensor:
        weights, ids = choose(x, gate, case.top_k)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        token = order // case.top_k
        counts = torch.bincount(flat, minlength=case.experts)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts)
        sizes = torch.stack([counts.view(ranks, local).sum(1), received.view(ranks, local).sum(1)]).tolist()
        rows = AllToAll.apply(x[token], sizes[0], sizes[1])
        expert = torch.arange(local, device=x.device).repeat(ranks).repeat_interleave(received, output_size=sum(sizes[1]))
        by_expert = expert.argsort(stable=True)
        ends = received.view(ranks, local).sum(0).cumsum(0).int()
        results = grouped_experts(case, rows[by_expert], up, down, ends)
        back = AllToAll.apply(results[by_expert.argsort()], sizes[1], sizes[0])
        y = torch.zeros_like(x).index_add(0, token, back * weights.flatten()[order, None].to(x.dtype))
        return y + grouped_experts(case, x, *shared, ends=torch.tensor([len(x)]).to(ends)) if shared else y

    return forward, parameters


class Clock:
    """Milliseconds between marks: of the stream on a GPU, of the host without one."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def mark(self) -> None:
        if self.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]
        return [(b - a) * 1e3 for a, b in zip(self.marks, self.marks[1:])]


class Step:
    """Forward and backward of a way to compute y from x."""

    def __init__(self, forward, parameters, x: Tensor, dy: Tensor):
        self.forward, self.parameters, self.x, self.dy = forward, list(parameters), x, dy

    def __call__(self, clock: Clock) -> None:
        clock.mark()
        y = self.forward(self.x)
        clock.mark()
        y.backward(self.dy)
        clock.mark()
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None


class Exchange:
    """The rows' ways of a step without its products: there and back, and in backward again."""

    def __init__(self, layer, case: Case, x: Tensor):
        with torch.no_grad():
            weights, ids = choose(x, layer.router.weight.to(x.dtype), case.top_k)
            self.plan = F.plan(ids, weights, case.experts)
        self.x = x.detach()

    def __call__(self, clock: Clock) -> None:
        with torch.no_grad():
            for _ in range(2):
                clock.mark()
                F.combine(F.dispatch(self.x, self.plan)[0], self.plan)
        clock.mark()


def slowest_rank(milliseconds: list[float]) -> list[float]:
    slowest = torch.tensor(milliseconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.tolist()


def measure_ways(ways: dict, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Of each way the time of its two halves on the slowest rank: medians over rounds in which all take turns."""
    times: dict[str, list[list[float]]] = {name: [] for name in ways}
    order, shuffled = list(ways), random.Random(1)  # the same on all ranks
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            ways[name](Clock(device))  # warm for those that are timed
            clock = Clock(device)
            dist.barrier()
            for _ in range(STEPS):
                ways[name](clock)
            intervals = clock.read()
            halves = [statistics.mean(intervals[half::3]) for half in (0, 1)]  # the third lies between two steps
            times[name].append(slowest_rank(halves))
    return {name: [statistics.median(half) for half in zip(*of_way)] for name, of_way in times.items()}


def same_layer(case: Case, x: Tensor, **options):
    torch.manual_seed(1)  # the same popular experts on every rank
    return make_layer(case, x, **options)


def agreeing(case: Case, x: Tensor, dy: Tensor, variants: dict[str, dict]) -> dict[str, Step]:
    """The ways of a case, which have been seen to compute the same layer."""
    layers = {name: same_layer(case, x, **options) for name, options in variants.items()}
    layers["alone"] = same_layer(case, x, group=anabranch.groups.alone())
    x.requires_grad_()
    ways = {
        name: Step(lambda x, layer=layer: layer(x).output, layer.parameters(), x, dy) for name, layer in layers.items()
    }
    ours = next(iter(layers.values()))
    parameters = [ours.router.weight.to(x.dtype), ours.experts.up_weight, ours.experts.down_weight]
    if case.shared:
        parameters += [ours.shared_expert.up_weight, ours.shared_expert.down_weight]
    ways["torch"] = Step(*by_torch(case, *(each.detach() for each in parameters)), x, dy)
    with torch.no_grad():
        expected = ways["alone"].forward(x)
        for name, way in ways.items():
            error = far(way.forward(x), expected) if len(x) else 0.0
            if not error < 2e-2:
                raise RuntimeError(f"{case.shape}: the output of {name} is {error:.2e} away from that of a rank alone")
    ways["exchange"] = Exchange(ours, case, x)
    return ways


def measure(case: Case, device: torch.device, variants: dict[str, dict], rounds: int):
    torch.manual_seed(dist.get_rank() + 2)
    x, dy = (torch.randn(case.tokens, case.hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    ways = agreeing(case, x, dy, variants)
    share = case.flops / 3 / 1e9  # of a rank, forward
    about = {**dataclasses.asdict(case), "ranks": dist.get_world_size()}
    for _ in range(WARM):
        for way in ways.values():
            way(Clock(device))
    times = measure_ways(ways, device, rounds)
    alone = sum(times["alone"])
    for name, (forward, backward) in times.items():
        row = {**about, "way": name, "forward_ms": forward, "backward_ms": backward}
        if name != "exchange":
            row["forward_TFLOP_per_s"] = share / forward
            row["backward_TFLOP_per_s"] = 2 * share / backward
            row["TFLOP_per_s"] = 3 * share / (forward + backward)
        if name in variants:
            row["exposed_of_exchange"] = (forward + backward - alone) / sum(times["exchange"])
        if dist.get_rank() == 0:
            print(f"{case.shape}, zipf {case.zipf:g}, {name}: "
                  + ", ".join(f"{key} {row[key]:.4g}" for key in list(row)[len(about) + 1 :]), flush=True)  # fmt: skip
        yield row


def variant(text: str) -> tuple[str, dict]:
    """`anabranch`, or with options of the layer behind it: anabranch,overlap=2."""
    options = {}
    known = inspect.signature(anabranch.MoE).parameters
    for part in text.split(",")[1:]:
        name, _, value = part.partition("=")
        if name not in known:
            raise argparse.ArgumentTypeError(f"MoE has no option {name}")
        options[name] = value if isinstance(known[name].default, str) else json.loads(value)
    return text, options


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--commit", default="unknown", help="of the measured sources")
    parser.add_argument("--quick", action="store_true", help="the first case only, small, in one round")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="shapes, by what their names begin with")
    parser.add_argument(
        "--layers",
        nargs="+",
        type=variant,
        default=[variant("anabranch"), variant("anabranch,overlap=2"), variant("anabranch,overlap=auto")],
        help="with options: anabranch,overlap=2",
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    arguments = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl" if arguments.device == "cuda" else "gloo")
    device = torch.device(arguments.device, dist.get_node_local_rank() if arguments.device == "cuda" else None)
    if arguments.device == "cuda":
        torch.cuda.set_device(device)
    shapes = [dataclasses.replace(shape, tokens=TOKENS) for shape in (QWEN3, OLMOE, MIXTRAL, FINE)]
    cases = [dataclasses.replace(shape, zipf=zipf) for zipf in (0.0, 1.0) for shape in shapes] + MEGATRON
    if arguments.quick:
        cases = [dataclasses.replace(SEED, tokens=64, hidden=32, inner=16)]
    results = []
    for case in cases:
        if arguments.cases and not case.shape.startswith(tuple(arguments.cases)):
            continue
        rounds = 1 if arguments.quick else ROUNDS
        results += measure(case, device, dict(arguments.layers), rounds)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    anabranch.check()
    if arguments.json and dist.get_rank() == 0:
        lines = ",\n  ".join(map(json.dumps, results))
        about = json.dumps(provenance(arguments.commit))
        Path(arguments.json).write_text(f'{{"provenance": {about},\n "results": [\n  {lines}\n]}}\n')
    anabranch.groups.release_groups()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
