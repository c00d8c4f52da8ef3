"""Predictions against what others have published, and against measurements of this project."""

import numpy

import routing
from machine import Model
from network import Fabric
from timeline import Layout, Planner

# docs/legacy.md of github.com/deepseek-ai/DeepEP at 0297fc8: low-latency kernels, µs, by GPUs. 128 tokens a
# GPU, hidden 7168, top-8 of 256 experts; dispatch in FP8 with a 4-byte scale for 128 values, combine in BF16;
# every (token, expert) pair travels by itself.
DEEPEP_LOW_LATENCY = {
    "dispatch": {8: 77, 16: 118, 32: 155, 64: 173, 128: 192, 256: 194},
    "combine": {8: 114, 16: 195, 32: 273, 64: 314, 128: 369, 256: 360},
}
# README.md there: EPv2 on SM90 with CX7, 8192 tokens a GPU, the same model: GB/s of all rows, those that stay
# on their node too, by nodes of 8 GPUs. A token crosses to a node once.
DEEPEP_THROUGHPUT = {"dispatch": {2: 90, 4: 61}, "combine": {2: 81, 4: 61}}
HIDDEN, TOP_K, EXPERTS = 7168, 8, 256
ROW_BYTES = {"dispatch": HIDDEN * (1 + 4 / 128), "combine": HIDDEN * 2.0}


def low_latency(machine, kind, gpus, seed=0):
    """Seconds of one exchange without forwarding: rows of all assignments, straight to their GPUs."""
    generator = numpy.random.default_rng(seed)
    popularity = numpy.full(EXPERTS, 1 / EXPERTS)
    rows, _ = routing.traffic(popularity, TOP_K, 128, gpus, generator, deduplicate=False)
    if kind == "combine":
        rows = rows.T
    done = Fabric(machine, gpus).all_to_all(rows * ROW_BYTES[kind], numpy.zeros(gpus))
    return done.max() + machine.stage


def throughput(machine, kind, nodes, tokens=8192, seed=0):
    """Bytes/s of rows to all nodes, over the time of the network: each GPU sends to its own place there."""
    generator = numpy.random.default_rng(seed)
    size = machine.gpus_per_node
    gpus = nodes * size
    popularity = numpy.full(EXPERTS, 1 / EXPERTS)
    to_node, _ = routing.traffic(popularity, TOP_K, tokens, nodes, generator)
    rows = numpy.zeros((gpus, gpus))
    for place in range(size):
        rows[place::size, place::size] = to_node
    done = Fabric(machine, gpus).all_to_all(rows * ROW_BYTES[kind], numpy.zeros(gpus))
    return to_node[0].sum() * ROW_BYTES[kind] / (done.max() + machine.stage)


def published(machine):
    """Rows (what, unit, published, predicted)."""
    for kind, by_gpus in DEEPEP_LOW_LATENCY.items():
        for gpus, microseconds in by_gpus.items():
            yield f"DeepEP low-latency {kind}, {gpus} GPUs", "µs", microseconds, low_latency(machine, kind, gpus) * 1e6
    for kind, by_nodes in DEEPEP_THROUGHPUT.items():
        for nodes, rate in by_nodes.items():
            yield f"DeepEP EPv2 {kind}, 8 × {nodes} GPUs", "GB/s", rate, throughput(machine, kind, nodes) / 1e9


def model_of(record):
    """The one layer that benchmark_step runs: fp32, no gate, no dense part."""
    names = ("hidden", "expert_hidden", "experts", "top_k")
    return Model(
        layers=1,
        tokens=record["tokens_per_rank"],
        glu=False,
        bytes=4,
        dense_parameters_per_layer=0,
        routed=False,
        **{name: record[name] for name in names},
    )


def predict_record(machine, record, seed=0):
    """Seconds of the stages of a record of benchmark_step, given its experts' load alone."""
    popularity = numpy.asarray(record["expert_load"], dtype=float)
    planner = Planner(machine, model_of(record), [popularity / popularity.sum()], seed)
    # One expert-parallel group of all ranks, whose gradients are nobody else's.
    layout = Layout(record["ranks"], record["ranks"], record["all_to_all"])
    return planner.predict(layout).step


def measured(machine, records):
    """Rows (what, unit, measured, predicted)."""
    for record in records:
        what = (
            f"{record['ranks']} ranks on {len(set(record['nodes']))} node(s), T {record['tokens_per_rank']}, "
            f"h {record['hidden']}, n {record['expert_hidden']}, E {record['experts']}, k {record['top_k']}, "
            f"skew {record['skew']:g}"
        )
        seconds = sum(value for name, value in record["stage_ms_least"].items() if name != "route") / 1e3
        yield what, "ms", seconds * 1e3, predict_record(machine, record) * 1e3


def table(rows, of):
    lines = [f"| what | {of} | predicted | predicted / {of} |", "|---|---|---|---|"]
    for what, unit, known, predicted in rows:
        lines.append(f"| {what} | {known:.4g} {unit} | {predicted:.4g} {unit} | {predicted / known:.2f} |")
    return "\n".join(lines)


def verdict(rows):
    ratios = [predicted / known for _, _, known, predicted in rows]
    within = sum(abs(ratio - 1) <= 0.2 for ratio in ratios)
    return f"{within} of {len(ratios)} within 20 %, from {min(ratios):.2f} to {max(ratios):.2f}."
