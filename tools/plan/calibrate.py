"""A machine's description, measured: benchmark_step at a few sizes, and the costs that explain its times.

The shortest of a stage's times count, in calibration and checks alike: what others do on the machine only
makes them longer.
"""

import itertools
import json
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy

import routing
import timeline
from machine import Refused
from network import take_turns

# tokens of a rank, hidden, expert hidden, experts, top-k
SIZES = [
    (128, 128, 256, 8, 1),
    (512, 128, 256, 8, 2),
    (256, 256, 512, 8, 2),
    (1024, 256, 512, 8, 1),
    (1024, 128, 256, 32, 2),
    (512, 256, 512, 32, 4),
    (1024, 256, 256, 8, 2),
    (1024, 128, 512, 16, 2),
    (2048, 256, 512, 16, 1),
]
EXCHANGES = ("dispatch", "combine", "dispatch_backward", "combine_backward")
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


def measure(program, launcher, ranks, sizes, rounds, skew=0.0, **more):
    """One record of benchmark_step, with `more` options, for each of `sizes`. Throws Refused with what a run printed."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        for tokens, hidden, expert_hidden, experts, top_k in sizes:
            options = f"--tokens {tokens} --hidden {hidden} --expert-hidden {expert_hidden}"
            options += f" --experts {experts} --top-k {top_k} --rounds {rounds} --skew {skew} --json {file}"
            options += "".join(f" --{name} {value}" for name, value in more.items())
            command = [*shlex.split(launcher.format(ranks=ranks)), str(program), *options.split()]
            result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
            if result.returncode != 0:
                raise Refused(f"{shlex.join(command)} ended with {result.returncode}:\n{result.stdout}{result.stderr}")
        records = [json.loads(line) for line in file.read_text().splitlines()]
    if any(record["ranks"] != ranks for record in records):
        raise Refused(f"'{launcher}' started {records[0]['ranks']} ranks instead of {ranks}")
    return records


def nonnegative_fit(features, targets, rounds=20):
    """x ≥ 0 for which features · x is off by the smallest factors: least absolute relative errors, of either
    side alike, by reweighted least squares. Outliers, as a busy machine makes them, count little."""
    weights = 1 / targets
    for _ in range(rounds):
        x = _least_squares(features * weights[:, None], targets * weights)
        found = numpy.maximum(features @ x, 1e-3 * targets)
        size = numpy.sqrt(found * targets)
        weights = 1 / size / numpy.sqrt(numpy.maximum(numpy.abs(found - targets) / size, 1e-3))
    return x


def _least_squares(features, targets):
    """x ≥ 0 that minimises |features · x − targets|: the best of all choices of zeros."""
    scale = numpy.maximum(numpy.abs(features).max(axis=0), 1e-300)
    best, least = numpy.zeros(features.shape[1]), numpy.inf
    for count in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), count):
            columns = list(chosen)
            part = features[:, columns] / scale[columns]
            x = numpy.linalg.lstsq(part, targets, rcond=None)[0]
            error = ((part @ x - targets) ** 2).sum()
            if (x >= 0).all() and error < least:
                least = error
                best = numpy.zeros(features.shape[1])
                best[columns] = x / scale[columns]
    return best


def element_bytes(record):
    return ELEMENT_BYTES[record.get("dtype", "fp32")]


def port_load(record):
    """(bytes, messages) of the busiest port in one exchange: an adapter shared by a node where there are
    several nodes, else a rank's own."""
    links = numpy.asarray(record["link_bytes"], dtype=float) / 4
    names = sorted(set(record["nodes"]))
    node = numpy.asarray([names.index(name) for name in record["nodes"]])
    if len(names) == 1:
        return max(links.sum(axis=0).max(), links.sum(axis=1).max()), record["ranks"] - 1
    across = links * (node[:, None] != node[None, :])
    out = numpy.asarray([across[node == i].sum() for i in range(len(names))])
    into = numpy.asarray([across[:, node == i].sum() for i in range(len(names))])
    size = (node == 0).sum()
    return max(out.max(), into.max()), size * (record["ranks"] - size)


def turns(record, values, cores):
    """The longest of the ranks' values, where they share their node's cores."""
    values = numpy.broadcast_to(numpy.asarray(values, dtype=float), record["ranks"])
    if not cores:
        return values.max()
    names = numpy.asarray(record["nodes"])
    return max(take_turns(values[names == name], cores).max() for name in set(record["nodes"]))


def equations(record, cores=0.0):
    """(features, seconds) of each stage. Features: fixed cost, experts that have rows, FLOPs, bytes in memory,
    messages and bytes of the busiest port, bytes of weights. `cores` as in Machine.cores_per_node."""
    assigned = turns(record, record["assignments"], cores)
    owner = routing.owners(record["experts"], record["ranks"])
    local = turns(record, numpy.bincount(owner, minlength=record["ranks"]), cores)
    used = turns(record, numpy.bincount(owner, numpy.asarray(record["expert_load"]) > 0, record["ranks"]), cores)
    once = turns(record, 1.0, cores)
    hidden, inner = record["hidden"], record["expert_hidden"]
    element = element_bytes(record)
    flops = 2.0 * 2 * hidden * inner * assigned
    moved = timeline.ROW_PASSES * assigned * (hidden + inner) * element
    load, messages = port_load(record)
    rows = record["tokens_per_rank"] * min(record["top_k"], record["ranks"])
    gathered = timeline.GATHER_PASSES * rows * hidden * element if record["ranks"] > 1 else 0.0
    indices = 8.0 * timeline.PLAN_PASSES * (record["tokens_per_rank"] * record["top_k"] + assigned)
    seconds = {name: value / 1e3 for name, value in record["stage_ms_least"].items()}
    weights = 2 * hidden * inner * element
    with_gradients = (used + timeline.GRADIENT_PASSES * local) * weights
    yield [once, used, flops, moved, 0, 0, used * weights], seconds["experts"]
    yield [once, 2 * used, 2 * flops, 2 * moved, 0, 0, with_gradients], seconds["experts_backward"]
    yield [1, 0, 0, indices, messages, 0, 0], seconds["plan"]
    if record["ranks"] > 1:
        for name in EXCHANGES:
            yield [1, 0, 0, gathered, messages, load, 0], seconds[name]


def fit(records, name, cores=0.0):
    """The description, as JSON has it, of the machine on which `records` were measured."""
    pairs = [pair for record in records for pair in equations(record, cores)]
    features = numpy.asarray([pair[0] for pair in pairs], dtype=float)
    seconds = numpy.asarray([pair[1] for pair in pairs])
    found = nonnegative_fit(features, seconds)
    error = numpy.abs(features @ found / seconds - 1)
    stage, expert, per_flop, per_byte, message, per_link_byte, per_weight_byte = found
    first = records[0]
    nodes = len(set(first["nodes"]))
    size = first["ranks"] // nodes
    # What no measurement has shown to cost anything is given a rate that costs next to nothing.
    rate = 1 / max(per_link_byte, 1e-15)
    link = {"bandwidth": rate, "latency": 0.0, "message": message}
    free = {"bandwidth": 1e15, "latency": 0.0, "message": 0.0}
    return {
        "name": name,
        "gpus_per_node": size,
        "flops": 1 / max(per_flop, 1e-18),
        "copy": 1 / max(per_byte, 1e-15),
        "memory": 64e9,
        "node": free if nodes > 1 else link,
        "network": link if nodes > 1 else free,
        "gpus_per_nic": size,
        "stage": stage,
        "expert": expert,
        "weights": 1 / max(per_weight_byte, 1e-15),
        "cores_per_node": cores,
        "source": f"calibrated at {first['ranks']} ranks on {nodes} node(s), {first['threads']} thread(s) a rank, "
        f"median error of a stage {numpy.median(error):.0%}",
    }
