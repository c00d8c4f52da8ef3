"""Predictions against what others have published, and against measurements of this project."""

import dataclasses
from pathlib import Path

import numpy

import calibrate
import routing
from machine import Model, read_machine
from network import Fabric
from timeline import Layout, Planner

MACHINES = Path(__file__).resolve().parent / "machines"

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




@dataclasses.dataclass(frozen=True)
class Training:
    """A published training run on H100 nodes of eight, without tensor parallelism, experts forced into
    balance: at random, or each token's one after another."""

    name: str
    model: Model  # `tokens`: of a micro-batch; `layers`: of a pipeline stage
    gpus: int
    expert_parallel: int
    micro_batches: int
    published: float  # tokens/s of a GPU
    in_order: bool = False
    stages: int = 1  # of the pipeline
    chunks: int = 1  # of the layers of a stage that take turns in it (virtual pipeline)


# Mixtral 8x7B: 468 TFLOP/s of a GPU, megatron/core/transformer/moe/README.md of github.com/NVIDIA/Megatron-LM
# at 022bcb5 (v0.9), which gives mapping and nodes as well. Megatron counts 82.9 GFLOP a token: 6 times the
# parameters that compute, and 12 · layers · hidden · sequence for attention.
# The others: docs/performance-summary.md of github.com/NVIDIA-NeMo/Automodel at 01926a5 (DGX H100, BF16),
# expert-parallel size and recomputation from examples/benchmark/configs there (092af93, 037e04a); its gate for
# benchmarks (FakeBalancedGate) gives token t the experts t · k to t · k + k − 1, modulo their number. gpt-oss:
# every other layer sees 128 tokens back; 2176 is the mean of 4096 and 2 · 128. DeepSeek-V3: all 61 layers as
# MoE layers, at most 16 a stage, latent attention and shared expert among the dense parameters.
TRAINING = [
    Training(
        "Megatron-Core, Mixtral 8x7B, 64 GPUs, EP 8, PP 4",
        Model(8, 4096, 14336, 8, 2, 4096, dense_parameters_per_layer=41943040, sequence=4096, vocabulary=32000),
        gpus=64, expert_parallel=8, micro_batches=16, published=468e12 / 82.9e9, stages=4, chunks=8,
    ),
    Training(
        "NeMo AutoModel, Qwen3 30B-A3B, 8 GPUs, EP 8",
        Model(48, 2048, 768, 128, 8, 16384, dense_parameters_per_layer=18874368, sequence=4096,
              attention_hidden=4096, vocabulary=151936, recompute=True),
        gpus=8, expert_parallel=8, micro_batches=16, published=12040, in_order=True,
    ),
    Training(
        "NeMo AutoModel, gpt-oss 120B, 64 GPUs, EP 64",
        Model(36, 2880, 2880, 128, 4, 8192, dense_parameters_per_layer=26542080, sequence=2176,
              attention_hidden=4096, vocabulary=201088),
        gpus=64, expert_parallel=64, micro_batches=4, published=7626, in_order=True,
    ),
    Training(
        "NeMo AutoModel, DeepSeek-V3, 256 GPUs, EP 64, PP 4",
        Model(16, 7168, 2048, 256, 8, 4096, dense_parameters_per_layer=231000000, sequence=4096,
              attention_hidden=20480, vocabulary=129280, recompute=True),
        gpus=256, expert_parallel=64, micro_batches=8, published=1002, in_order=True, stages=4, chunks=8,
    ),
]  # fmt: skip


def training(machine, run, seed=0):
    """Tokens/s of a GPU: micro-batches follow one another, the pipeline fills and drains in between
    (its last stage, with the output layer, is the slowest), and gradients are summed once."""
    experts, top_k = run.model.experts, run.model.top_k
    if run.in_order:
        chosen = numpy.arange(routing.SAMPLES * top_k).reshape(-1, top_k) % experts
    else:
        chosen = routing.draw_tokens(numpy.full(experts, 1 / experts), top_k, numpy.random.default_rng(seed))
    planner = Planner(machine, run.model, [chosen], seed)
    one = planner.predict(Layout(run.gpus // run.stages, run.expert_parallel))
    turns = run.micro_batches + (run.stages - 1) / run.chunks
    seconds = turns * (one.step - one.all_reduce) + one.all_reduce
    return run.micro_batches * run.model.tokens / run.stages / seconds


def evenly_chosen(seed):
    generator = numpy.random.default_rng(seed)
    return routing.draw_tokens(numpy.full(EXPERTS, 1 / EXPERTS), TOP_K, generator), generator


def low_latency(machine, kind, gpus, seed=0):
    """Seconds of one exchange without forwarding: rows of all assignments, straight to their GPUs."""
    chosen, generator = evenly_chosen(seed)
    rows, _ = routing.traffic(chosen, EXPERTS, 128, gpus, generator, deduplicate=False)
    if kind == "combine":
        rows = rows.T
    done = Fabric(machine, gpus).all_to_all(rows * ROW_BYTES[kind], numpy.zeros(gpus))
    return done.max() + machine.stage


def throughput(machine, kind, nodes, tokens=8192, seed=0):
    """Bytes/s of rows to all nodes, over the time of the network: each GPU sends to its own place there."""
    chosen, generator = evenly_chosen(seed)
    size = machine.gpus_per_node
    gpus = nodes * size
    to_node, _ = routing.traffic(chosen, EXPERTS, tokens, nodes, generator)
    rows = numpy.zeros((gpus, gpus))
    for place in range(size):
        rows[place::size, place::size] = to_node
    done = Fabric(machine, gpus).all_to_all(rows * ROW_BYTES[kind], numpy.zeros(gpus))
    return to_node[0].sum() * ROW_BYTES[kind] / (done.max() + machine.stage)


def published():
    """Rows (what, unit, published, predicted)."""
    machine = read_machine(MACHINES / "h800_deepep.json")
    for kind, by_gpus in DEEPEP_LOW_LATENCY.items():
        for gpus, microseconds in by_gpus.items():
            yield f"DeepEP low-latency {kind}, {gpus} GPUs", "µs", microseconds, low_latency(machine, kind, gpus) * 1e6
    for kind, by_nodes in DEEPEP_THROUGHPUT.items():
        for nodes, rate in by_nodes.items():
            yield f"DeepEP EPv2 {kind}, 8 × {nodes} GPUs", "GB/s", rate, throughput(machine, kind, nodes) / 1e9
    machine = read_machine(MACHINES / "h100_infiniband.json")
    for run in TRAINING:
        yield run.name, "tokens/s of a GPU", run.published, training(machine, run)


def model_of(record):
    """The one layer that benchmark_step runs: fp32, no gate, no dense part."""
    names = ("hidden", "expert_hidden", "experts", "top_k")
    return Model(
        layers=1,
        tokens=record["tokens_per_rank"],
        glu=False,
        bytes=calibrate.element_bytes(record),
        dense_parameters_per_layer=0,
        routed=False,
        **{name: record[name] for name in names},
    )


def predict_record(machine, record, seed=0):
    """Seconds of the stages of a record of benchmark_step, given its experts' load alone; and, for what is lent, each
    rank's part of it."""
    popularity = numpy.asarray(record["expert_load"], dtype=float)
    chosen = routing.draw_tokens(popularity / popularity.sum(), record["top_k"], numpy.random.default_rng(seed))
    planner = Planner(machine, model_of(record), [chosen], seed, record.get("counts"))
    # One expert-parallel group of all ranks, whose gradients are nobody else's.
    overlap = record.get("overlap", "off")
    chunks = 0 if overlap == "off" else int(overlap)
    layout = Layout(record["ranks"], record["ranks"], record["all_to_all"], chunks, record.get("balance", "off"))
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
