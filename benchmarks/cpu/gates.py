#!/usr/bin/env python3
"""Every gate of examples/train_lm on one text: the loss that it comes to, and the load of its experts.

    python benchmarks/cpu/gates.py --program build/release/examples/train_lm --data TEXT --json FILE [--picture FILE]

`--preset tiny`, one seed and order of the data for all. Options that are not this script's are train_lm's, of all runs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_runs  # noqa: E402

WINDOW = 50  # steps, of which a point of a curve is the mean
NO_LOSS = "--balance-loss 0"
BIASES = f"{NO_LOSS} --bias-rate 0.001"
WAYS = {
    "softmax, balance loss": "",
    "softmax, nothing balances": NO_LOSS,
    "softmax, sequence's balance loss": f"{NO_LOSS} --sequence-balance-loss 0.01",
    "softmax, whole step's balance loss": f"{NO_LOSS} --global-balance-loss 0.01 --micro-batch 4",
    "softmax in fp64, top 1, jitter": "--top-k 1 --jitter 0.01 --router-fp64",
    "sigmoid, biases": f"--router-score sigmoid {BIASES}",
    "sigmoid, biases, 2 of 4 groups": f"--router-score sigmoid {BIASES} --expert-groups 4 --top-groups 2",
    "sigmoid, biases by quantile": f"--router-score sigmoid {NO_LOSS} --bias-rate 1 --bias-update quantile",
    "sqrt_softplus, biases": f"--router-score sqrt_softplus {BIASES}",
    "noisy_top_k": f"--gate noisy_top_k {NO_LOSS} --importance-loss 0.1 --load-loss 0.1",
    "gshard": "--gate gshard",
    "sinkhorn": f"--gate sinkhorn {NO_LOSS}",
    "expert_choice": f"--gate expert_choice --renormalize no {NO_LOSS}",
}


def train(options, arguments, further, directory):
    words = [
        "--preset", "tiny", "--data", arguments.data, "--output", directory, "--steps", arguments.steps, "--log-interval", 5,
        "--validation-interval", arguments.steps, "--sample-length", 0, "--no-save", *options.split(), *further,
    ]  # fmt: skip
    train_runs.train(arguments.program, words)
    return train_runs.metrics_of(directory)


def mean_load(lines):
    """[layers][experts] load over the mean, of the last quarter of the lines."""
    last = numpy.array([line["load"] for line in lines[-max(len(lines) // 4, 1) :]])
    return (last.mean(0) * last.shape[-1]).tolist()


def result_of(name, options, lines):
    return {
        "gate": name,
        "options": options,
        "steps": lines[-1]["step"],
        "curve": train_runs.curve_of(lines, "loss", WINDOW),
        "imbalance": train_runs.curve_of(lines, "imbalance", WINDOW),
        "validation_loss": lines[-1]["validation_loss"],
        "load": mean_load(lines),
    }


def draw(measured, path):
    """Of each gate the fullest expert over the mean as it trains, and beside it every expert's load in the end."""
    results, about = measured["results"], measured["provenance"]
    figure, grid = plt.subplots(
        len(results), 2, figsize=(9, 0.95 * len(results) + 1), layout="constrained", width_ratios=(3, 2), squeeze=False
    )
    for (curve, loads), result in zip(grid, results):
        steps = list(map(int, result["imbalance"]))
        curve.plot(steps, result["imbalance"].values(), color="#2563eb", linewidth=1.4)
        curve.axhline(1, color="grey", linestyle=":", linewidth=1)
        curve.set_ylim(0.9, max(max(of["imbalance"].values()) for of in results) * 1.05)
        curve.set_title(f"{result['gate']}: {result['validation_loss']:.3f} nats held out", fontsize=8, loc="left", pad=3)
        curve.tick_params(labelsize=7, labelbottom=result is results[-1])
        image = loads.imshow(result["load"], aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        for layer, row in enumerate(result["load"]):
            for expert, load in enumerate(row):
                colour = "black" if 0.4 < load < 1.6 else "white"
                loads.text(expert, layer, f"{load:.2f}", ha="center", va="center", fontsize=6, color=colour)
        loads.set_yticks(range(len(result["load"])), [f"layer {layer + 1}" for layer in range(len(result["load"]))], fontsize=7)
        loads.set_xticks([])
    grid[-1][0].set_xlabel("step", fontsize=8)
    grid[-1][1].set_xlabel("expert", fontsize=8)
    figure.colorbar(image, ax=grid[:, 1], fraction=0.03, aspect=60).ax.tick_params(labelsize=7)
    title = "Fullest expert over the mean, and each expert's load in the last quarter (1: balanced)"
    figure.suptitle(f"{title}\n{about['processor']}, {about['commit'][:10]}, {about['date']}", fontsize=9)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", help="train_lm; without it the picture alone is drawn, of what FILE of --json has")
    parser.add_argument("--data", help="a text")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--gates", type=lambda text: text.split("|"), default=list(WAYS), help="some of them, | between them")
    parser.add_argument("--json", required=True, type=Path, help="file for the results")
    parser.add_argument("--picture", help="file for the loads, drawn")
    parser.add_argument("--commit", default="unknown", help="of the measured sources")
    arguments, further = parser.parse_known_args()
    if arguments.program:
        results = []
        with tempfile.TemporaryDirectory() as folder:
            for number, name in enumerate(arguments.gates):
                lines = train(WAYS[name], arguments, further, Path(folder) / str(number))
                results.append(result_of(name, WAYS[name], lines))
                row = results[-1]
                losses = list(row["curve"].values())
                print(
                    f"{name}: {losses[0]:.3f} to {losses[-1]:.3f}, held out {row['validation_loss']:.4f}, "
                    f"imbalance {list(row['imbalance'].values())[-1]:.2f}",
                    flush=True,
                )
        measured = {"provenance": train_runs.provenance(arguments.commit), "results": results}
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")
    if arguments.picture:
        draw(json.loads(arguments.json.read_text()), arguments.picture)


if __name__ == "__main__":
    main()
