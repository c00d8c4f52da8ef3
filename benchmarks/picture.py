"""README's picture: one layer on a GPU beside torch's grouped products, from benchmarks/results/gpu_layer.json: each shape
with all its tokens and load that is nearly even.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from report import few_tokens  # noqa: E402

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
WAYS = {"TFLOP_per_s": ("anabranch", "#2563eb"), "grouped_mm_TFLOP_per_s": ("torch._grouped_mm", "#98a2b3")}


def draw(measured, output):
    few, about = few_tokens(measured), measured["provenance"]
    cases = [case for case in measured["results"] if case not in few and case.get("zipf", 0) == 0]
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    for number, (field, (name, colour)) in enumerate(WAYS.items()):
        places = [place + 0.4 * (number - 0.5) for place in range(len(cases))]
        bars = axes.bar(places, [case[field] for case in cases], 0.4, label=name, color=colour)
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(cases)), [case["shape"].removeprefix("seed ").replace(" ", "\n") for case in cases], fontsize=8)
    axes.set_ylabel("TFLOP/s")
    axes.set_title("One layer, forward and backward with its router, bf16", fontsize=11, loc="left")
    axes.set_title(f"{about['gpu']}, torch {about['torch']}, {about['commit']}, {about['date']}", fontsize=8, loc="right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.legend(frameon=False, ncols=2, loc="upper left", fontsize=9)
    figure.savefig(output, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS / "gpu_layer.json")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "gpu_layer.png")
    arguments = parser.parse_args()
    draw(json.loads(arguments.results.read_text()), arguments.output)
