#!/usr/bin/env python3
"""What a step of the layer asks of the host besides its kernels: operators of LibTorch's and nodes of autograd, by stage,
counted by the profiler in a tiny layer on the CPU; and the microseconds of such a step, of which little is arithmetic.

    PYTHONPATH=build/release/python benchmarks/cpu/host.py [--loss] [--gate gshard] [--all]

The stages before and behind the experts call the same operators on a GPU, but for what their kernels do. The experts, of
so few rows, are taken in one part, as there.
"""

import argparse
import collections
import statistics
import time
import warnings

import torch

import anabranch

STEPS = 200


def profiled(step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what the profiler keeps from one cycle to the next
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
    return profile.events()


def stage_of(event):
    """The innermost stage of the layer around an event."""
    while event is not None:
        if event.name.startswith("anabranch."):
            return event.name
        event = event.cpu_parent
    return "between"


def microseconds(step):
    times = []
    for _ in range(STEPS):
        begin = time.perf_counter()
        step()
        times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glu", action="store_true")
    parser.add_argument("--gate", default="top_k")
    parser.add_argument("--loss", action="store_true", help="the balance loss is used as well")
    parser.add_argument("--all", action="store_true", help="every operator by name")
    arguments = parser.parse_args()
    layer = anabranch.MoE(16, 16, 4, 2, glu=arguments.glu, gate=arguments.gate, seed=1)
    x, dy = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16)

    def step():
        out = layer(x)
        if arguments.loss:
            torch.autograd.backward([out.output, out.balance_loss], [dy, torch.ones_like(out.balance_loss)])
        else:
            out.output.backward(dy)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    for _ in range(20):
        step()
    events = profiled(step)
    nodes = [event.name for event in events if event.name.startswith("autograd::engine::evaluate_function")]
    operators = [event for event in events if event.name.startswith("aten::")]
    stages = collections.Counter(map(stage_of, operators))
    print(f"{len(operators)} operators, {len(nodes)} nodes of autograd, {microseconds(step):.0f} us a step")
    for stage, count in sorted(stages.items()):
        print(f"  {count:4}  {stage}")
    if arguments.all:
        for name, count in collections.Counter(event.name for event in operators).most_common():
            print(f"  {count:4}  {name}")


if __name__ == "__main__":
    main()
