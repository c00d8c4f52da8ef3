#!/usr/bin/env python3
"""Learning curves of examples/train_lm beside each other: fp32, bf16, bf16 that was resumed in the middle, and Muon; on a
CPU also one that goes on at another number of ranks, and one model at several ways to lay its experts over ranks.

    python benchmarks/gpu/learning_curves.py --program build/release/examples/train_lm --data TEXT [--device cpu]

One small model, seed and order of the data; 2,000 steps. In bf16 with fp32 masters, AdamW's means and squares rounded
stochastically to bf16 in one of the runs. Options that are not this script's are train_lm's, of all runs.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_runs
from layer import provenance as gpu_provenance

WINDOW = 100  # steps, of which a point of a curve is the mean loss


@dataclasses.dataclass(frozen=True)
class Way:
    options: list
    beside: str = "fp32"  # the way that it is compared with
    ranks: int = 0  # 0: without mpirun
    then: int | None = None  # ranks of its second half, if it is resumed there


# Balanced by the experts' biases: a loss would be each group's own.
BIASES = "--dtype float32 --router-score sigmoid --bias-rate 0.001 --balance-loss 0 --z-loss 0".split()
WAYS = {
    "fp32": Way(["--dtype", "float32"]),
    "bf16": Way(["--dtype", "bfloat16"]),
    "bf16, states in bf16": Way(["--dtype", "bfloat16", "--optimizer-state", "bfloat16"]),
    "bf16, resumed": Way(["--dtype", "bfloat16"], then=0),
    "bf16, Muon": Way(["--dtype", "bfloat16", "--optimizer", "muon"]),
}
ON_RANKS = {
    "fp32, from the middle on 2 ranks": Way(["--dtype", "float32"], then=2),
    "fp32, biases": Way(BIASES, beside="fp32, biases"),
    **{
        f"fp32, biases, 4 ranks, expert parallel {size}": Way(
            [*BIASES, "--expert-parallel", size], beside="fp32, biases", ranks=4
        )
        for size in (1, 2, 4)
    },
}


def trained(name, way, arguments, further, runs):
    """The metrics of a run, which is made unless it is there."""
    directory = runs / re.sub(r"[^a-z0-9]+", "_", name.lower())
    if not (directory / "metrics.jsonl").exists() or train_runs.metrics_of(directory)[-1]["step"] < arguments.steps:
        shutil.rmtree(directory, ignore_errors=True)
        train(way, arguments, further, directory)
    return train_runs.metrics_of(directory)


def train(way, arguments, further, directory):
    every = max(arguments.steps // 400, 1)
    options = [
        "--preset", "tiny", "--data", arguments.data, "--device", arguments.device, "--output", directory,
        "--steps", arguments.steps, "--log-interval", every, "--validation-interval", arguments.steps, "--sample-length", 0,
        *way.options, *further,
    ]  # fmt: skip
    if way.then is None:
        train_runs.train(arguments.program, [*options, "--no-save"], way.ranks)
    else:
        options += ["--checkpoint-interval", 0]
        train_runs.train(arguments.program, [*options, "--stop-at", arguments.steps // 2], way.ranks)
        train_runs.train(arguments.program, [*options, "--resume"], way.then)


def result_of(name, way, runs):
    """A run beside the one that it is compared with."""
    lines, others = runs[name], runs[way.beside]
    curve, other = (train_runs.curve_of(of, "loss", WINDOW) for of in (lines, others))
    held_out, held_out_other = (of[-1]["validation_loss"] for of in (lines, others))
    return {
        "way": name,
        "beside": way.beside,
        "steps": lines[-1]["step"],
        "curve": curve,
        "validation_loss": held_out,
        "validation_difference": held_out / held_out_other - 1,
        "largest_difference": max(abs(loss / other[step] - 1) for step, loss in curve.items()),
        "imbalance": lines[-1]["imbalance"],
        "largest_imbalance": max(train_runs.curve_of(lines, "imbalance", WINDOW).values()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="train_lm")
    parser.add_argument("--data", required=True, help="a text")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--quick", action="store_const", dest="steps", const=20, help="20 steps, to see whether it runs")
    parser.add_argument("--ways", type=lambda text: text.split("|"), help="some of them, by name, with | between them")
    parser.add_argument("--runs", type=Path, help="folder for the runs; those that are there, of the same options, are not made again")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--commit", default="unknown", help="of the measured sources")
    arguments, further = parser.parse_known_args()
    on_cpu = arguments.device == "cpu"
    ways = WAYS | (ON_RANKS if on_cpu else {})
    if arguments.ways:
        ways = {name: ways[name] for name in arguments.ways}
    runs, results = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, way in ways.items():
            runs[name] = trained(name, way, arguments, further, arguments.runs or Path(folder))
            results.append(result_of(name, way, runs))
            row = results[-1]
            losses = list(row["curve"].values())
            print(
                f"{name}: {losses[0]:.3f} to {losses[-1]:.3f}, held out {row['validation_loss']:.4f} "
                f"({100 * row['validation_difference']:+.2f} %), of the curve at most {100 * row['largest_difference']:.2f} % "
                f"from {way.beside}",
                flush=True,
            )
    same = None
    if {"bf16", "bf16, resumed"} <= runs.keys():
        whole, resumed = ([line["loss"] for line in runs[name]] for name in ("bf16", "bf16, resumed"))
        same = whole == resumed
        print("the resumed run is " + ("the very same" if same else "another") + " curve")
    if arguments.json:
        about = (train_runs.provenance if on_cpu else gpu_provenance)(arguments.commit)
        measured = {"provenance": about, "resumed_is_the_same": same, "results": results}
        Path(arguments.json).write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
