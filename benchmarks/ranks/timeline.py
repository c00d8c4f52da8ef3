#!/usr/bin/env python3
"""Draws when a layer's rows travel and when its experts compute, in turn and beside each other, from a trace.

    benchmarks/ranks/timeline.py                    # as root, on an idle machine; half a minute

Two virtual hosts of one rank each, whose links a token bucket slows. Each way takes several steps under torch.profiler;
the one whose time is the median is drawn, as rank 0 saw it. Writes benchmarks/results/timeline.json and timeline.png.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tools/plan", "tests/support", "launch", "benchmarks/ranks")]

WAYS = {"off": "in turn", "4": "in 4 chunks, beside the products"}
# Ranges of torch.profiler within which rows set out or are waited for, by trip; and the products.
TRIPS = {
    "rows to the experts": ("plan", "dispatch"),
    "results back": ("combine",),
    "dy to the experts": ("combine.backward",),
    "dx back": ("dispatch.backward",),
}
PRODUCTS = ("up", "down", "down.backward", "up.backward")
WAITING = "exchange.exposed"
COLOURS = {"products": "#2563eb", "under way": "#cbd5e1", "waited for": "#f59e0b"}


def arguments_of(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    parser.add_argument("--draw", action="store_true", help="only draws what timeline.json has")
    parser.add_argument("--megabits", type=int, default=100, help="of a host's link, a second")
    parser.add_argument("--tokens", type=int, default=1024, help="of a rank")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--expert-hidden", type=int, default=3104)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--trace", type=Path, help=argparse.SUPPRESS)  # of a rank: where its steps go
    return parser.parse_args(words)


def trace(arguments):
    """A rank: {way: steps}, each a list of (range, begin, end) in ms since the step's begin."""
    import anabranch
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["OMPI_COMM_WORLD_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{arguments.trace}.meeting", rank=rank, world_size=2)
    torch.manual_seed(rank)
    x = torch.randn(arguments.tokens, arguments.hidden, requires_grad=True)
    dy = torch.randn_like(x)
    size = (arguments.hidden, arguments.expert_hidden, arguments.experts, arguments.top_k)
    found = {}
    for way in WAYS:
        layer = anabranch.MoE(*size, seed=1, overlap=way)
        steps = []
        for _ in range(arguments.steps + 1):
            dist.barrier()
            activities = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function("step"):
                layer(x).output.backward(dy)
            events = [e for e in profile.events() if e.name == "step" or e.name.startswith("anabranch.")]
            begin = next(e.time_range.start for e in events if e.name == "step")
            ranges = [(e.name, e.time_range.start - begin, e.time_range.end - begin) for e in events]
            steps.append([(n.removeprefix("anabranch."), round(b / 1e3, 3), round(e / 1e3, 3)) for n, b, e in ranges])
        found[way] = steps[1:]  # the first one allocates
    if rank == 0:
        arguments.trace.write_text(json.dumps(found))
    dist.barrier()


def measure(arguments):
    import all_to_all_hosts
    import planner

    hosts = planner.launcher_for(2, 1, arguments.megabits)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder, hosts as launcher:
        file = Path(folder) / "trace.json"
        words = [*shlex.split(launcher), sys.executable, __file__, "--trace", file]
        for name in ("megabits", "tokens", "hidden", "expert_hidden", "experts", "top_k", "steps"):
            words += [f"--{name.replace('_', '-')}", getattr(arguments, name)]
        environment = {**all_to_all_hosts.ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"}
        subprocess.run(list(map(str, words)), env=environment, check=True, timeout=300)
        return json.loads(file.read_text())


def duration(step):
    return next(end for name, _, end in step if name == "step")


def typical(steps):
    median = statistics.median_low(map(duration, steps))
    return next(step for step in steps if duration(step) == median)


def rows_of(step):
    """(lane, what, begin, end) of a step."""
    for lane, names in TRIPS.items():
        ranges = sorted((begin, end) for name, begin, end in step if name in names)
        waits = [
            (b, e) for name, b, e in step if name == WAITING and any(begin <= b and e <= end for begin, end in ranges)
        ]
        set_out = min(begin for name, begin, _ in step if name == names[-1])
        yield lane, "under way", min(set_out, *(begin for begin, _ in waits)), max(end for _, end in waits)
        yield from ((lane, "waited for", begin, end) for begin, end in waits)
    yield from (("experts", "products", begin, end) for name, begin, end in step if name in PRODUCTS)


def draw(measured, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lanes = ["experts", *TRIPS]
    figure, all_axes = plt.subplots(len(WAYS), 1, figsize=(9, 4.6), layout="constrained", sharex=True)
    for axes, (way, title) in zip(all_axes, WAYS.items()):
        step = typical(measured["steps"][way])
        for lane, what, begin, end in rows_of(step):
            axes.barh(lanes.index(lane), end - begin, left=begin, height=0.6, color=COLOURS[what], label=what)
        waited = sum(end - begin for name, begin, end in step if name == WAITING)
        axes.set_title(
            f"{title}: {duration(step):.0f} ms, {waited:.0f} of them waiting for rows", loc="left", fontsize=10
        )
        axes.set_yticks(range(len(lanes)), lanes, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(all_axes[0].get_legend_handles_labels())))
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    all_axes[-1].set_xlabel("ms of a step, forward and backward")
    about, size = measured["provenance"], measured["size"]
    words = (
        f"2 virtual hosts, {size['megabits']} Mb/s; T {size['tokens']}, h {size['hidden']}, n {size['expert_hidden']}, "
    )
    words += f"E {size['experts']}, k {size['top_k']}, fp32. {about['processor']}, {about['commit'][:10]}, {about['date'][:10]}"
    figure.supxlabel(words, fontsize=7, color="#667085")
    figure.savefig(path, dpi=150, metadata={"Software": None})


def main():
    arguments = arguments_of()
    if arguments.trace:
        trace(arguments)
        return
    file = arguments.output / "timeline.json"
    if not arguments.draw:
        import scaling

        os.environ["PYTHONPATH"] = f"{ROOT / 'build/release/python'}:{os.environ.get('PYTHONPATH', '')}"
        size = {
            name: getattr(arguments, name)
            for name in ("megabits", "tokens", "hidden", "expert_hidden", "experts", "top_k")
        }
        provenance = scaling.provenance(["benchmarks/ranks/timeline.py", *sys.argv[1:]])
        measured = {"provenance": provenance, "size": size, "steps": measure(arguments)}
        file.write_text(json.dumps(measured) + "\n")
    draw(json.loads(file.read_text()), arguments.output / "timeline.png")


if __name__ == "__main__":
    try:
        main()
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        sys.exit(f"timeline: {error}")
