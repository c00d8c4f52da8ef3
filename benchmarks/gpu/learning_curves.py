#!/usr/bin/env python3
"""Learning curves of examples/train_lm beside each other: fp32, bf16, bf16 that was resumed in the middle, and Muon.

    python benchmarks/gpu/learning_curves.py --program build/release/examples/train_lm --data TEXT

One small model, seed and order of the data; 2,000 steps. In bf16 with fp32 masters, AdamW's means and squares rounded
stochastically to bf16 in one of the runs.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from layer import provenance

WINDOW = 100  # steps, of which a point of a curve is the mean loss
WAYS = {
    "fp32": ["--dtype", "float32"],
    "bf16": ["--dtype", "bfloat16"],
    "bf16, states in bf16": ["--dtype", "bfloat16", "--optimizer-state", "bfloat16"],
    "bf16, resumed": ["--dtype", "bfloat16"],
    "bf16, Muon": ["--dtype", "bfloat16", "--optimizer", "muon"],
}


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def train(name, arguments, directory):
    every = max(arguments.steps // 400, 1)
    command = [
        arguments.program, "--preset", "tiny", "--data", arguments.data, "--device", arguments.device, "--output", directory,
        "--steps", arguments.steps, "--log-interval", every, "--validation-interval", arguments.steps, "--sample-length", 0,
        *WAYS[name],
    ]  # fmt: skip
    if name.endswith("resumed"):
        command += ["--checkpoint-interval", 0]
        half = arguments.steps // 2
        subprocess.run([*map(str, command), "--stop-at", str(half)], check=True, stdout=subprocess.DEVNULL)
        command.append("--resume")
    else:
        command.append("--no-save")
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return metrics_of(directory)


def curve_of(lines):
    """{step: mean loss of the lines in the window that ends there}."""
    windows = {}
    for line in lines:
        windows.setdefault(-(-line["step"] // WINDOW) * WINDOW, []).append(line["loss"])
    return {step: statistics.mean(losses) for step, losses in windows.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="train_lm")
    parser.add_argument("--data", required=True, help="a text")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--quick", action="store_const", dest="steps", const=20, help="20 steps, to see whether it runs")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--commit", default="unknown", help="of the measured sources")
    arguments = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(WAYS):
            runs[name] = train(name, arguments, Path(folder) / str(number))
    fp32, results = curve_of(runs["fp32"]), []
    for name, lines in runs.items():
        curve, last = curve_of(lines), lines[-1]
        row = {"way": name, "steps": last["step"], "curve": curve, "validation_loss": last["validation_loss"]}
        row["validation_over_fp32"] = last["validation_loss"] / runs["fp32"][-1]["validation_loss"] - 1
        row["largest_over_fp32"] = max(abs(loss / fp32[step] - 1) for step, loss in curve.items())
        row["imbalance"] = last["imbalance"]
        results.append(row)
        print(
            f"{name}: {next(iter(curve.values())):.3f} to {list(curve.values())[-1]:.3f}, held out {row['validation_loss']:.4f} "
            f"({100 * row['validation_over_fp32']:+.2f} %), of the curve at most {100 * row['largest_over_fp32']:.2f} % from fp32"
        )
    whole, resumed = ([line["loss"] for line in runs[name]] for name in ("bf16", "bf16, resumed"))
    same = whole == resumed
    print("the resumed run is " + ("the very same" if same else "another") + " curve")
    if arguments.json:
        measured = {"provenance": provenance(arguments.commit), "resumed_is_the_same": same, "results": results}
        Path(arguments.json).write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
