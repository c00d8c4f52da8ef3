"""Where the time of a step goes: routing, permutation, topology, GEMM, activation, combination; from one trace."""

import re
import warnings
from collections import Counter

import torch

STAGES = ("routing", "permutation", "topology", "GEMM", "activation", "combination", "other")
# What record_function ranges say; others, such as of a whole layer, say nothing.
RANGES = {
    "routing": ("route", "router", "gate", "losses"),
    "permutation": ("plan", "permute", "dispatch"),
    "topology": ("topology",),
    "GEMM": ("up", "down", "grouped_gemm", "gemm"),
    "activation": ("activation", "activate"),
    "combination": ("unpermute", "combine"),
}
RANGE_STAGE = {name: stage for stage, names in RANGES.items() for name in names}
# What the names of kernels and operations hold, outside such ranges; the first that fits.
KERNELS = (
    ("GEMM", r"gemm|cutlass|nvjet|xmma|sum_parts"),  # whatever else such a name holds, such as NoPermute
    ("topology", r"topology|first_rows_kernel|row_indices"),
    ("routing", r"route_|softmax|topk|top_k|sbtopk|bitonic"),
    ("combination", r"sum_rows|unpermute|index_add|indexFunc|padded_scatter|_scatter_kernel|decode|moe_gather"),
    ("permutation", r"gather|scatter_rows|permute|sort|histogram|cumsum|scan|digits|plac|segment|order_|token_|send_|"
     r"offsets|bincount|index|encode|padded_copy|_group\b|argsort"),
    ("GEMM", r"gemv|sdd|dsd|dds|block_sparse|matmul|scatter2scatter|groupXtY|\bmm\b|addmm|bmm|splitK|"
     r"reduce_kernel_split"),
    ("activation", r"gelu|silu|activat"),
)  # fmt: skip


def stage_of_range(name):
    words = re.split(r"[^a-z_]+", name.lower())
    return next((RANGE_STAGE[word] for word in reversed(words) if word in RANGE_STAGE), None)


def stage_of_kernel(name):
    return next((stage for stage, pattern in KERNELS if re.search(pattern, name, re.IGNORECASE)), "other")


def ancestors(event):
    while event is not None:
        yield event
        event = event.cpu_parent


class Trace:
    """Milliseconds by stage of a profiled step; on a GPU of its kernels, otherwise of the operations themselves."""

    def __init__(self, events):
        self.events = events
        # Backward knows no ranges, but the number of the forward operation that it undoes.
        self.by_sequence = {}
        for event in events:
            stage = self.range_of(event)
            if stage and event.sequence_nr >= 0:
                self.by_sequence.setdefault(event.sequence_nr, stage)

    @staticmethod
    def range_of(event):
        ranges = (stage_of_range(each.name) for each in ancestors(event) if getattr(each, "is_user_annotation", False))
        return next((stage for stage in ranges if stage), None)

    def stage_of(self, event, name):
        stage = self.range_of(event)
        if stage is None:
            numbers = (e.sequence_nr for e in ancestors(event) if e.name.startswith("autograd::engine"))
            stage = next((self.by_sequence[n] for n in numbers if n in self.by_sequence), None)
        # A product stays one wherever its backward was found, except the gate's.
        by_name = stage_of_kernel(name)
        return by_name if stage is None or (by_name != "other" and stage == "GEMM") else stage

    def parts(self, cuda):
        """(stage, kernel or operation, milliseconds)"""
        for event in self.events:
            if not cuda:
                if event.name != "[memory]":
                    yield self.stage_of(event, event.name), event.name, event.self_cpu_time_total / 1e3
                continue
            for kernel in event.kernels:
                moved = kernel.name.startswith(("Memset", "Memcpy HtoD", "Memcpy DtoH"))
                yield "other" if moved else self.stage_of(event, kernel.name), kernel.name, kernel.duration / 1e3

    def stages(self, cuda):
        """Milliseconds by stage, and the part of each stage that takes most of it."""
        times = {stage: Counter() for stage in STAGES}
        for stage, name, ms in self.parts(cuda):
            times[stage][name] += ms
        longest = {stage: max(names, key=names.get) for stage, names in times.items() if names}
        return {stage: sum(names.values()) for stage, names in times.items()}, longest


def profile(step, cuda):
    """Trace.stages of a step, which has run before."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what the profiler keeps from one cycle to the next
        with torch.profiler.profile(activities=activities) as trace:
            step()
            if cuda:
                torch.cuda.synchronize()
        return Trace(trace.events()).stages(cuda)
