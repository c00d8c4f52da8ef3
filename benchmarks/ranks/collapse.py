#!/usr/bin/env python3
"""train_lm on a text with gates that collapse onto one expert: its losses and its speed, whatever travels.

    benchmarks/ranks/collapse.py --data TEXT    # minutes, on an idle machine

A balance loss of negative weight makes every token choose the same expert within a few steps. Beside a run on one rank
train ranks whose tokens travel, and ranks whose weights do (--balance), each with one thread; and ranks whose gates are
balanced as usual, for their speed. All take turns. A loss is the same in all turns of a way, but for what "auto"
chooses. A speed is that which a tenth of the pairs of steps in the last halves of all turns exceeds: what others do on the
machine only makes them slower. How much that is a fixed piece of work on all cores says, before and after each run. Options that are not this script's are train_lm's, of all runs. Writes
benchmarks/results/collapse.json and collapse.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tools/plan", "tests/support", "launch", "benchmarks", "benchmarks/ranks")]
import planner  # noqa: E402
import scaling  # noqa: E402
import train_runs  # noqa: E402

COLLAPSE = "--balance-loss -0.1"
ALONE, TOKENS, BALANCED = "one rank", "tokens travel", "balanced gates, tokens travel"
WAYS = {
    ALONE: COLLAPSE,
    TOKENS: COLLAPSE,
    "shadow": f"{COLLAPSE} --balance shadow",
    "replicas": f"{COLLAPSE} --balance replicas",
    "auto": f"{COLLAPSE} --balance auto",
    BALANCED: "",
}
# Of a model most of whose products are the experts'.
MODEL = "--preset tiny --top-k 1 --expert-hidden 512 --batch-size 32 --sequence-length 64"


def train(name, arguments, further, directory):
    words = [
        *MODEL.split(), "--data", arguments.data, "--output", directory, "--steps", arguments.steps, "--log-interval", 2,
        "--validation-interval", arguments.steps, "--sample-length", 0, "--no-save", *WAYS[name].split(), *further,
    ]  # fmt: skip
    train_runs.train(arguments.program, words, 0 if name == ALONE else arguments.ranks)
    return train_runs.metrics_of(directory)


def speed_of(turns):
    speeds = [line["tokens_per_second"] for lines in turns for line in lines[len(lines) // 2 :]]
    return statistics.quantiles(speeds, n=10)[-1]


def largest_difference(turns, others):
    """Of the losses of any turn from those of the others' first one, relative."""
    return max(
        abs(line["loss"] / other["loss"] - 1) for lines in turns for line, other in zip(lines, others[0], strict=True)
    )


def result_of(name, runs, slowdowns):
    turns, first = runs[name], runs[name][0]
    return {
        "way": name,
        "options": WAYS[name],
        "losses": {line["step"]: line["loss"] for line in first},
        "imbalance": {line["step"]: line["imbalance"] for line in first},
        "validation_loss": first[-1]["validation_loss"],
        "largest_difference": None if name == BALANCED else largest_difference(turns, runs[ALONE]),
        "tokens_per_second": speed_of(turns),
        "tokens_per_second_of_turns": [speed_of([lines]) for lines in turns],
        "slowdown_of_turns": slowdowns[name],
    }


def write(measured, file):
    about, results = measured["provenance"], measured["results"]
    balanced = next(result["tokens_per_second"] for result in results if result["way"] == BALANCED)
    last = list(results[0]["losses"])[-1]
    text = "# Collapsed gates, measured\n\n"
    text += f"`train_lm {MODEL}`, {measured['ranks']} ranks of a thread each on one host, {last} steps.\n\n"
    text += "| way | imbalance, step 2 | last | loss, last | held out | largest difference of a loss from one rank's "
    text += "| tokens/s | / balanced | fixed work, / idle |\n|---|---|---|---|---|---|---|---|---|\n"
    for result in results:
        imbalance = list(result["imbalance"].values())
        difference = result["largest_difference"]
        text += f"| {result['way']} | {imbalance[0]:.2f} | {imbalance[-1]:.2f} | {result['losses'][last]:.4f} "
        text += f"| {result['validation_loss']:.4f} | {'' if difference is None else f'{difference:.1e}'} "
        text += f"| {result['tokens_per_second']:.0f} | {result['tokens_per_second'] / balanced:.2f} "
        text += f"| {min(result['slowdown_of_turns']):.2f} |\n"
    turns = len(results[0]["tokens_per_second_of_turns"])
    text += f"\nSpeeds: the upper tenth of {turns} turns; fixed work: of the most idle one. {about['processor']}, {about['cores']} cores, "
    text += f"commit {about['commit'][:10]}, {about['date']}: `{about['command']}`\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n")
    file.with_suffix(".md").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a text")
    parser.add_argument("--program", default=ROOT / "build/release/examples/train_lm")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    parser.add_argument("--ranks", type=int, default=2, help="as many as there are cores: more would share them")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--turns", type=int, default=3)
    arguments, further = parser.parse_known_args()
    runs, slowdowns = {name: [] for name in WAYS}, {name: [] for name in WAYS}
    idleness = planner.Idleness()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.turns):
            for number, name in enumerate(WAYS):
                before = idleness.slowdown()
                runs[name].append(train(name, arguments, further, Path(folder) / f"{turn}_{number}"))
                slowdowns[name].append(max(before, idleness.slowdown()))
                last = runs[name][-1][-1]
                print(f"{name}: loss {last['loss']:.4f}, {speed_of(runs[name][-1:]):.0f} tokens/s", flush=True)
    measured = {
        "provenance": scaling.provenance(["benchmarks/ranks/collapse.py", *sys.argv[1:]]),
        "ranks": arguments.ranks,
        "results": [result_of(name, runs, slowdowns) for name in WAYS],
    }
    write(measured, arguments.output / "collapse")


if __name__ == "__main__":
    main()
