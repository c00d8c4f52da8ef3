#!/usr/bin/env python3
"""The layer on one GPU as Python calls it, forward and backward with its router, bf16: in turns with what else one would
use (peers.py). Of each: wall time, the time to issue a step, the GPU's busy time, launches, peak memory; and of the layer
also as a CUDA graph. Shapes, skewed routing and few tokens as in layer.cpp.

    PYTHONPATH=build/release/python benchmarks/gpu/layer.py [--cases OLMoE,...] [--peers grouped_mm,...|none] [--host]

--host tells where the host's time goes: the operators of a step by their own time, and CUDA's calls.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import random
import statistics
import time
import warnings

import torch
from peers import PEERS, Missing

import anabranch

ROUNDS = 9
BATCH_MS = 4.0


@dataclasses.dataclass(frozen=True)
class Case:
    shape: str
    tokens: int
    hidden: int
    inner: int
    experts: int
    top_k: int
    glu: bool
    zipf: float = 0.0
    shared: int = 0  # inner width of an expert that sees every token

    @property
    def flops(self):
        """Exact, forward and backward."""
        return 3 * 2 * self.tokens * (self.top_k * self.inner + self.shared) * self.hidden * (3 if self.glu else 2)


SEED = Case("seed 16x1024 h512 k3", 16384, 512, 2048, 8, 3, False)
OLMOE = Case("OLMoE", 32768, 2048, 1024, 64, 8, True)
QWEN3 = Case("Qwen3-30B", 32768, 2048, 768, 128, 8, True)
MIXTRAL = Case("Mixtral", 16384, 4096, 14336, 8, 2, True)
FINE = Case("fine", 24576, 1536, 256, 128, 8, True)
SHAPES = [
    SEED,
    Case("seed 64x1024 h512 k8", 65536, 512, 2048, 8, 8, False),
    Case("seed 64x1024 h1024 k3", 65536, 1024, 4096, 8, 3, False),
    MIXTRAL,
    OLMOE,
    QWEN3,
    FINE,
]
CASES = [
    *SHAPES,
    *(dataclasses.replace(shape, zipf=1.0) for shape in SHAPES if shape.glu),
    *(dataclasses.replace(shape, tokens=tokens) for shape in (SEED, OLMOE, QWEN3) for tokens in (64, 256, 512, 4096)),
]


def skew_router(weight, x, s):
    """Popularity by Zipf's law, as in layer.cpp: a column of ones meets the logarithms of the experts' shares."""
    if s == 0:
        return
    experts, hidden = weight.shape
    shares = torch.arange(1, experts + 1, dtype=torch.float64).pow(-s)[torch.randperm(experts)]
    with torch.no_grad():
        weight.mul_(math.pi / math.sqrt(6) / (weight.std().item() * math.sqrt(hidden)))
        weight[:, 0] = (shares / shares.sum()).log()
        x[:, 0] = 1


class Way:
    """A layer whose step is timed: `forward` from x to y."""

    def __init__(self, forward, parameters, x, dy):
        self.forward, self.parameters, self.x, self.dy = forward, parameters, x, dy

    def __call__(self):
        self.forward(self.x).backward(self.dy)
        self.clear()

    def clear(self):
        self.x.grad = None
        for parameter in self.parameters:
            parameter.grad = None


def recorded(step):
    """The step as a CUDA graph, after one on the stream that records."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def batch_ms(step, count):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def wall_ms(steps):
    """Of steps that follow one another, the median over rounds in which all take turns."""
    counts = {}
    for name, step in steps.items():
        batch_ms(step, 2)
        counts[name] = min(max(int(BATCH_MS / batch_ms(step, 2)), 1), 50)
    times = {name: [] for name in steps}
    order, shuffled = list(steps), random.Random(1)
    for _ in range(ROUNDS):
        shuffled.shuffle(order)
        for name in order:
            steps[name]()  # warm for those that are timed
            times[name].append(batch_ms(steps[name], counts[name]))
    return {name: statistics.median(of_way) for name, of_way in times.items()}


def issue_ms(step):
    """Until a step has returned, where the GPU had nothing to do."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append((time.perf_counter() - begin) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(times)


def traced(step, host=False):
    activities = [torch.profiler.ProfilerActivity.CUDA]
    if host:
        activities.append(torch.profiler.ProfilerActivity.CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what the profiler keeps from one cycle to the next
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
    return profile


def busy(step):
    """(milliseconds in which the GPU was busy, launches) of a step."""
    events = [e for e in traced(step).events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(event.device_time for event in events) / 1e3, len(events)


def peak_gib(step):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def far(y, expected):
    """How far the tokens' outputs are apart: the median, as a few of them have another expert by a tie."""
    y, expected = y.float(), expected.float()
    return ((y - expected).norm(dim=1) / expected.norm(dim=1)).median().item()


def make_layer(case, x, **options):
    """The case's layer for x, which its router may change; which experts are popular comes from torch's generator."""
    layer = anabranch.MoE(
        case.hidden,
        case.inner,
        case.experts,
        case.top_k,
        activation="silu" if case.glu else "gelu_tanh",
        glu=case.glu,
        shared_expert_hidden_size=case.shared,
        seed=1,
        device=x.device,
        dtype=x.dtype,
        **options,
    )
    skew_router(layer.router.weight, x, case.zipf)
    return layer


def layer_way(case, x, dy):
    layer = make_layer(case, x)
    return layer, Way(lambda x: layer(x).output, list(layer.parameters()), x, dy)


def ways_of(case, names, x, dy):
    """The layer, its ways by name, and why some peers have none."""
    layer, ours = layer_way(case, x, dy)
    x.requires_grad_()
    ways, missing = {"anabranch": ours}, {}
    given = (layer.router.weight.detach().bfloat16(), layer.experts.up_weight, layer.experts.down_weight)
    with torch.no_grad():
        expected = ours.forward(x)
    for name in names:
        try:
            way = Way(*PEERS[name](case, *given), x, dy)
            with torch.no_grad():
                error = far(way.forward(x), expected)
            if not error < 2e-2:
                raise Missing(f"its output is {error:.2e} away")
            way()
        except Missing as reason:
            missing[name] = str(reason)
        except Exception as error:  # a peer's trouble is its own
            missing[name] = f"{type(error).__name__}: {error}"
        else:
            ways[name] = way
    return layer, ways, missing


def measure(case, names, host):
    torch.manual_seed(1)
    x, dy = (torch.randn(case.tokens, case.hidden, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    layer, ways, missing = ways_of(case, names, x, dy)
    with torch.no_grad():
        load = layer(x).expert_load
    about = {**dataclasses.asdict(case), "imbalance": (load.max() / load.double().mean()).item()}
    for _ in range(3):
        ways["anabranch"]()
    peaks = {name: peak_gib(way) for name, way in ways.items()}
    times = wall_ms({**ways, "graph": recorded(ways["anabranch"])})
    for name, way in ways.items():
        busy_ms, launches = busy(way)
        row = {**about, "way": name, "ms": times[name], "issue_ms": issue_ms(way), "busy_ms": busy_ms}
        row.update(launches=launches, TFLOP_per_s=case.flops / times[name] / 1e9, peak_GiB=peaks[name])
        if name == "anabranch":
            row["graph_ms"] = times["graph"]
        print(
            f"{case.shape}, {case.tokens} tokens, zipf {case.zipf:g}, {name}: "
            + ", ".join(f"{key} {row[key]:.4g}" for key in list(row)[len(about) + 1 :]),
            flush=True,
        )
        yield row
    for name, reason in missing.items():
        print(f"{case.shape}, {name}: {reason}", flush=True)
        yield {**about, "way": name, "reason": reason}
    if host:
        table = traced(ways["anabranch"], host=True).key_averages()
        print(table.table(sort_by="self_cpu_time_total", row_limit=70, max_name_column_width=90))


def provenance(commit):
    try:
        cublas = importlib.metadata.version("nvidia-cublas")
    except importlib.metadata.PackageNotFoundError:
        cublas = "unknown"
    return {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda_runtime": torch.version.cuda,
        "cublas": cublas,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--commit", default="unknown", help="of the measured sources")
    parser.add_argument("--quick", action="store_true", help="the first case only")
    parser.add_argument("--cases", type=lambda text: text.split(","), help="shapes, by what their names begin with")
    parser.add_argument("--tokens", type=int, help="those cases with so many tokens alone")
    parser.add_argument("--peers", default=",".join(PEERS), help="of %(default)s; none: the layer alone")
    parser.add_argument("--host", action="store_true", help="print where the host's time goes")
    arguments = parser.parse_args()
    names = [] if arguments.peers == "none" else arguments.peers.split(",")
    if unknown := set(names) - set(PEERS):
        parser.error(f"there is no peer {unknown.pop()}: choose of {', '.join(PEERS)}")
    results = []
    for case in CASES[: 1 if arguments.quick else None]:
        if arguments.cases and not case.shape.startswith(tuple(arguments.cases)):
            continue
        if arguments.tokens and case.tokens != arguments.tokens:
            continue
        results += measure(case, names, arguments.host)
        torch.cuda.empty_cache()
    anabranch.check()
    if arguments.json:
        lines = ",\n  ".join(json.dumps(row) for row in results)
        with open(arguments.json, "w") as file:
            file.write(f'{{"provenance": {json.dumps(provenance(arguments.commit))},\n "results": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
