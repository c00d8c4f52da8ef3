"""Predicts training steps of Mixture-of-Experts models on clusters of 8 to 16,384 GPUs.

    anabranch-plan layouts   --machine M.json --model N.json --gpus 512 [--skew 1 | --trace metrics.jsonl]
    anabranch-plan step      ... --expert-parallel 64 --all-to-all hierarchical --overlap 2 --plot timeline.png
    anabranch-plan scale     ... --gpus 8,64,512,4096,16384 --output DIR
    anabranch-plan calibrate --ranks 2 --launcher "launch/mpirun.sh -n {ranks}" --output M.json
    anabranch-plan check     [--machine M.json --points DIR/points]

It simulates a layer's forward and backward on every rank of an expert-parallel group: who computes, and which
message holds which link when; then adds the sum of gradients. docs/planner.md says what is in the model and
what is not, and how far its predictions were off. Machines and models: tools/plan/machines and models.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy

import calibrate
import check
import plots
import routing
from machine import Refused, machine_from, read_machine, read_model
from timeline import Layout, Planner

NAME = os.environ.get("ANABRANCH_PROGRAM", "anabranch-plan")
HERE = Path(__file__).resolve().parent
STDOUT = object()
ROOT = HERE.parents[1]
# Networks of a node against which `scale` holds the machine's own.
BANDWIDTHS = [0.1e9 / 8, 1e9 / 8, 10e9 / 8, 100e9 / 8, 400e9 / 8]
LATENCIES = [5e-6, 5e-4, 5e-3, 5e-2]
INTERNET = (1e9 / 8, 2e-2)


def chosen_of(arguments, model):
    """Experts of sampled tokens, layer by layer."""
    generator = numpy.random.default_rng(arguments.seed)
    if arguments.trace:
        popularities = routing.from_metrics(arguments.trace, model.experts)
    else:
        popularities = [routing.zipf(model.experts, arguments.skew, generator)]
    return [routing.draw_tokens(popularity, model.top_k, generator) for popularity in popularities]


def planner_of(arguments):
    machine, model = read_machine(arguments.machine), read_model(arguments.model)
    return Planner(machine, model, chosen_of(arguments, model), arguments.seed)


def table(predictions, machine):
    lines = [
        "  GPUs   EP    DP  all-to-all    overlap   step, s  compute  exchange  all-reduce  memory, GB  imbalance",
    ]
    for p in predictions:
        layout = p.layout
        fits = " " if p.memory <= machine.memory else "!"
        lines.append(
            f"{layout.gpus:6d} {layout.expert_parallel:4d} {layout.gpus // layout.expert_parallel:5d}  "
            f"{layout.all_to_all:12s} {layout.overlap or 'off':>8} {p.step:9.4f} {p.compute / p.step:8.0%} "
            f"{p.exchange / p.step:9.0%} {p.all_reduce / p.step:11.0%} {p.memory / 1e9:10.1f}{fits} {p.rank_imbalance:9.2f}"
        )
    if any(p.memory > machine.memory for p in predictions):
        lines.append(f"!: more than the {machine.memory / 1e9:.0f} GB of a GPU")
    return "\n".join(lines)


def write_json(path, values):
    Path(path).write_text(json.dumps(values, indent=1, default=float) + "\n")


def tell(arguments, text, values):
    """The text for people, or, with --json, the values; with --json FILE both, the values in the file."""
    if arguments.json is STDOUT:
        print(json.dumps(values, indent=1, default=float))
        return
    print(text)
    if arguments.json:
        write_json(arguments.json, values)


def run_layouts(arguments):
    planner = planner_of(arguments)
    texts, values = [], []
    for gpus in arguments.gpus:
        check_gpus(gpus, planner.machine)
        found = planner.layouts(gpus, balance=arguments.balance)
        texts.append(table(found[: arguments.top], planner.machine))
        values += [prediction.summary() for prediction in found]
    tell(arguments, "\n".join(texts), values)


def check_gpus(gpus, machine):
    if gpus < 1 or (gpus > machine.gpus_per_node and gpus % machine.gpus_per_node):
        raise Refused(f"--gpus {gpus}: expected whole nodes of {machine.gpus_per_node}")


def run_step(arguments):
    planner = planner_of(arguments)
    gpus = arguments.gpus[0]
    check_gpus(gpus, planner.machine)
    group = arguments.expert_parallel or min(gpus, planner.model.experts)
    size = planner.machine.gpus_per_node
    if gpus % group or (group % size and size % group) or group > planner.model.experts:
        raise Refused(
            f"--expert-parallel {group}: expected at most {planner.model.experts} GPUs, whole nodes or a part of "
            f"one that divides it, and a divisor of {gpus}"
        )
    overlap = 0 if arguments.overlap == "off" else int(arguments.overlap)
    prediction = planner.predict(Layout(gpus, group, arguments.all_to_all, overlap, arguments.balance))
    tell(arguments, table([prediction], planner.machine), prediction.summary())
    if arguments.plot:
        plots.timeline(prediction, arguments.plot)


def best(planner, gpus, balance):
    return planner.layouts(gpus, balance=balance)[0]


def run_scale(arguments):
    machine, model = read_machine(arguments.machine), read_model(arguments.model)
    chosen = chosen_of(arguments, model)
    networks = {
        machine.name: machine,
        "100 Gb/s and 30 µs a node": plots.slower(machine, 100e9 / 8, 3e-5),
        "the internet: 1 Gb/s and 20 ms a node": plots.slower(machine, *INTERNET),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    by_machine, texts = {}, []
    for name, described in networks.items():
        planner = Planner(described, model, chosen, arguments.seed)
        by_machine[name] = []
        for gpus in arguments.gpus:
            check_gpus(gpus, described)
            by_machine[name].append(best(planner, gpus, arguments.balance))
        texts += [name, table(by_machine[name], described)]
    plots.scale(by_machine, arguments.output / "scale.png")

    gpus = arguments.gpus[-1]
    shares = []
    for latency in LATENCIES:
        row = [Planner(plots.slower(machine, b, latency), model, chosen, arguments.seed) for b in BANDWIDTHS]
        found = [best(planner, gpus, arguments.balance) for planner in row]
        shares.append([p.compute / p.step for p in found])
    plots.internet(BANDWIDTHS, LATENCIES, shares, gpus, arguments.output / "internet.png")
    plots.timeline(by_machine[machine.name][-1], arguments.output / "timeline.png")
    values = {
        "machine": dataclasses.asdict(machine),
        "model": dataclasses.asdict(model),
        "best": {name: [p.summary() for p in found] for name, found in by_machine.items()},
        "internet": {"bandwidths": BANDWIDTHS, "latencies": LATENCIES, "compute_share": shares, "gpus": gpus},
    }
    write_json(arguments.output / "scale.json", values)
    tell(arguments, "\n".join(texts), values)


def run_calibrate(arguments):
    records = calibrate.measure(
        arguments.program, arguments.launcher, arguments.ranks, calibrate.SIZES, arguments.rounds
    )
    values = calibrate.fit(records, arguments.name, arguments.cores_per_node)
    machine_from(values, "calibrate")
    write_json(arguments.output, values)
    tell(arguments, json.dumps(values, indent=1, default=float), values)


def run_check(arguments):
    if arguments.points:
        machine = read_machine(arguments.machine)
        files = sorted(Path(arguments.points).glob("*.json"))
        if not files:
            raise Refused(f"--points {arguments.points}: no records there")
        rows = list(check.measured(machine, [json.loads(file.read_text()) for file in files]))
        of = "measured"
    else:
        rows = list(check.published())
        of = "published"
    values = [{"what": what, "unit": unit, of: known, "predicted": predicted} for what, unit, known, predicted in rows]
    tell(arguments, f"{check.table(rows, of)}\n\n{check.verdict(rows)}", values)


def numbers(text):
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers such as 8,64") from error


def parse(argv):
    parser = argparse.ArgumentParser(NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text, machine=HERE / "machines/h100_infiniband.json"):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", nargs="?", type=Path, const=STDOUT, metavar="FILE", help="JSON in the place of text, or in FILE beside it")
        if machine:
            sub.add_argument("--machine", type=Path, default=machine, help="JSON (see tools/plan/machines)")
        return sub

    def of_a_model(sub, gpus):
        sub.add_argument("--model", type=Path, default=HERE / "models/olmoe.json", help="JSON (see tools/plan/models)")
        sub.add_argument("--gpus", type=numbers, default=gpus)
        load = sub.add_mutually_exclusive_group()
        load.add_argument("--skew", type=float, default=0.5, help="s of Zipf's law for the experts' popularity")
        load.add_argument("--trace", type=Path, help="metrics.jsonl of train_lm, whose last load counts")
        sub.add_argument("--balance", default="off", help="what travels where load is skewed (MoEOptions::balance)")
        sub.add_argument("--seed", type=int, default=0)

    sub = command("layouts", run_layouts, "all layouts, the best first")
    of_a_model(sub, [64])
    sub.add_argument("--top", type=int, default=10, help="how many to print")

    sub = command("step", run_step, "one layout")
    of_a_model(sub, [64])
    sub.add_argument("--expert-parallel", type=int, help="GPUs of a group (default: as many as possible)")
    sub.add_argument("--all-to-all", choices=["flat", "hierarchical"], default="flat")
    sub.add_argument("--overlap", choices=["off", "1", "2", "4", "8"], default="off", help="MoEOptions::overlap")
    sub.add_argument("--plot", type=Path, help="file for the timeline")

    sub = command("scale", run_scale, "best layouts over GPUs and networks, with plots")
    of_a_model(sub, [8, 64, 512, 4096, 16384])
    sub.add_argument("--output", type=Path, default=Path("runs/plan"), metavar="DIR")

    sub = command("calibrate", run_calibrate, "measures this machine and writes its description", machine=None)
    sub.add_argument("--ranks", type=int, default=1)
    sub.add_argument("--launcher", default=f"{ROOT}/launch/mpirun.sh -n {{ranks}}", help="with {ranks} in it")
    sub.add_argument("--program", type=Path, default=ROOT / "build/release/benchmarks/benchmark_step")
    sub.add_argument("--rounds", type=int, default=7)
    sub.add_argument("--cores-per-node", type=float, default=0.0, help="where a node has more ranks than cores")
    sub.add_argument("--name", default="calibrated")
    sub.add_argument("--output", type=Path, required=True)

    sub = command("check", run_check, "predictions beside published results, or beside measured times of --machine")
    sub.add_argument("--points", type=Path, help="records of launch/scaling.py")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    try:
        arguments.run(arguments)
    except Refused as problem:
        print(f"{NAME}: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
