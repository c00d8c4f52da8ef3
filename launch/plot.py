#!/usr/bin/env python3
"""Draws what a training run measured: loss.png, load.png, speed.png and report.html in DIR from its metrics.jsonl.

metrics.jsonl holds one JSON object a logged step: `step` and `loss` (nats a token), where they were
measured `validation_loss` and `validation_bpb` (bits a byte of the text), `tokens_per_second` and what else
examples/train_lm/metrics/metrics.cpp writes, and per layer the experts' shares of the assignments in `load` and the
fullest expert over the mean in `imbalance_per_layer`. A step logged twice, as by a resumed run, counts
as it was logged last.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402
from run_report import flops_unit, write_report  # noqa: E402


def note(message):
    print(f"plot.py: {message}", file=sys.stderr)


def read_metrics(path):
    """The objects of a metrics.jsonl in the order of their steps; bad lines are named and left out."""
    by_step = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            by_step[int(record["step"])] = record
        except (ValueError, TypeError, KeyError):
            note(f"{path}:{number} is no metrics object with a step: left out")
    return [by_step[step] for step in sorted(by_step)]


def series(records, name):
    """(steps, values) of the records in which `name` is a finite number."""
    pairs = [
        (record["step"], record[name])
        for record in records
        if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
    ]
    return [step for step, _ in pairs], [value for _, value in pairs]


def title_of(records, what):
    ranks = sorted({record["ranks"] for record in records if "ranks" in record})
    if not ranks:
        return what
    return f"{what}, on {' then '.join(map(str, ranks))} rank{'s' if ranks != [1] else ''}"


def finish(figure, path):
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"    {path}")


def unit_of_loss(records):
    """Its name, and what a nat a token is of it: bits a byte where the bytes of a token are known."""
    for record in records:
        bits, nats = record.get("validation_bpb"), record.get("validation_loss")
        if all(isinstance(value, (int, float)) and math.isfinite(value) and value > 0 for value in (bits, nats)):
            return "bits per byte", bits / nats
    return "nats per token", 1.0


def plot_loss(records, path):
    unit, factor = unit_of_loss(records)
    steps, loss = series(records, "loss")
    loss = [value * factor for value in loss]
    validation_steps, validation = series(records, "validation_loss")
    validation = [value * factor for value in validation]
    if not steps and not validation_steps:
        note(f"no loss and no validation_loss in any record: no {path.name}")
        return False

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    if steps:
        axes.plot(steps, loss, color="tab:blue", linewidth=1.2, label="training")
    if validation_steps:
        axes.plot(
            validation_steps, validation, "o-", color="tab:red", markersize=4, linewidth=1.2,
            label="validation (held-out text)",
        )
        axes.annotate(
            f"{validation[-1]:.3f}", (validation_steps[-1], validation[-1]),
            xytext=(0, 8), textcoords="offset points", ha="right", color="tab:red",
        )
    else:
        note("no validation_loss in any record: loss.png shows training only")
    axes.set_title(title_of(records, "Loss"))
    label_steps(axes)
    axes.set_ylabel(unit)
    if factor != 1:
        nats = (lambda value: value / factor, lambda value: value * factor)
        axes.secondary_yaxis("right", functions=nats).set_ylabel("nats per token")
    axes.legend()
    finish(figure, path)
    return True


def label_steps(axes):
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.3)


def plot_speed(records, path):
    steps, speed = series(records, "tokens_per_second")
    if not steps:
        note(f"no tokens_per_second in any record: no {path.name}")
        return False
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), layout="constrained", sharex=True)
    figure.suptitle(title_of(records, "Speed"))
    top.plot(steps, speed, color="tab:blue", linewidth=1.2)
    top.set_ylim(0, 1.08 * max(speed))
    top.set_ylabel("tokens/s")
    top.grid(alpha=0.3)
    flops = [r["model_tflops"] / r["tokens_per_second"] for r in records if r.get("model_tflops") and r.get("ranks")]
    if flops and len({r.get("ranks") for r in records}) == 1:
        name, factor = flops_unit(records)
        per_token = flops[-1] * factor
        both_ways = (lambda value: value * per_token, lambda value: value / per_token)
        top.secondary_yaxis("right", functions=both_ways).set_ylabel(f"model {name} of a rank")
    names = {"step_seconds": "step", "data_seconds": "of it, until the batch is there"}
    names["exposed_communication_seconds"] = "of it, communication alone"
    for name, label in names.items():
        found, seconds = series(records, name)
        if found:
            bottom.plot(found, seconds, linewidth=1.2, label=label)
    label_steps(bottom)
    bottom.set_ylabel("seconds")
    if bottom.lines:
        bottom.set_yscale("log")
        # Below the axes: within them it would cover lines, whose ends lie decades apart.
        figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    finish(figure, path)
    return True


def mean_load(records):
    """([layers][experts] each expert's load over the mean, steps averaged) over the last quarter."""
    shaped = [record for record in records if is_matrix(record.get("load"))]
    if not shaped:
        return None, []
    shape = [len(layer) for layer in shaped[-1]["load"]]
    shaped = [record for record in shaped if [len(layer) for layer in record["load"]] == shape]
    last = shaped[-max(1, len(shaped) // 4) :]
    layers = [
        [sum(column) / len(last) * experts for column in zip(*(record["load"][layer] for record in last))]
        for layer, experts in enumerate(shape)
    ]
    return layers, [record["step"] for record in last]


def is_matrix(load):
    return (
        isinstance(load, list)
        and bool(load)
        and all(isinstance(layer, list) and layer for layer in load)
        and len({len(layer) for layer in load}) == 1
        and all(isinstance(share, (int, float)) for layer in load for share in layer)
    )


def draw_heat_map(figure, axes, layers, steps):
    experts = len(layers[0])
    highest = max(2.0, max(map(max, layers)))
    image = axes.imshow(
        layers, aspect="auto", interpolation="nearest", cmap="RdBu_r",
        norm=matplotlib.colors.TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=highest),
    )
    if experts <= 16 and len(layers) <= 16:
        for layer, row in enumerate(layers):
            for expert, value in enumerate(row):
                far = value > 1 + 0.6 * (highest - 1) or value < 0.3
                axes.text(
                    expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if far else "black",
                )
    axes.set_title(f"Load of each expert over the mean, steps {steps[0]} to {steps[-1]} (1: balanced)")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.colorbar(image, ax=axes, label="load / mean")


def draw_imbalance(axes, records):
    by_layer = [r for r in records if isinstance(r.get("imbalance_per_layer"), list)]
    layers = max((len(r["imbalance_per_layer"]) for r in by_layer), default=0)
    colours = plt.get_cmap("viridis")
    for layer in range(layers):
        points = [
            (r["step"], r["imbalance_per_layer"][layer])
            for r in by_layer
            if layer < len(r["imbalance_per_layer"])
        ]
        axes.plot(
            *zip(*points), color=colours(layer / max(1, layers - 1)), alpha=0.6, linewidth=1,
            label=f"layer {layer}" if layers <= 12 else None,
        )
    steps, mean = series(records, "imbalance")
    axes.plot(steps, mean, color="black", linewidth=1.8, label="mean")
    axes.axhline(1, color="grey", linestyle=":", linewidth=1)
    axes.set_title("Imbalance: the fullest expert's load over the mean")
    label_steps(axes)
    axes.set_ylabel("imbalance")
    axes.legend(ncols=2, fontsize="small")


def plot_load(records, path):
    layers, steps = mean_load(records)
    has_imbalance = bool(series(records, "imbalance")[0])
    if layers is None:
        note("no load per layer and expert in any record: load.png has no heat map")
    if not has_imbalance:
        note("no imbalance in any record: load.png does not show it")
    panels = [layers is not None, has_imbalance]
    if not any(panels):
        note(f"no {path.name}")
        return False
    heights = [h for h, wanted in zip((2 + 0.3 * len(layers or []), 3.5), panels) if wanted]
    figure, grid = plt.subplots(
        sum(panels), 1, figsize=(8, 0.8 + sum(heights)), squeeze=False, layout="constrained",
        height_ratios=heights,
    )
    rows = iter(grid[:, 0])
    figure.suptitle(title_of(records, "Expert load"))
    if layers is not None:
        draw_heat_map(figure, next(rows), layers, steps)
    if has_imbalance:
        draw_imbalance(next(rows), records)
    finish(figure, path)
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="a run's folder with metrics.jsonl")
    directory = parser.parse_args().directory
    metrics = directory / "metrics.jsonl"
    if not metrics.is_file():
        sys.exit(f"plot.py: there is no {metrics}")
    records = read_metrics(metrics)
    if not records:
        sys.exit(f"plot.py: {metrics} holds no metrics")
    drawn = [
        plot_loss(records, directory / "loss.png"),
        plot_load(records, directory / "load.png"),
        plot_speed(records, directory / "speed.png"),
    ]
    if write_report(records, unit_of_loss(records), *mean_load(records), directory):
        print(f"    {directory / 'report.html'}")
    else:
        note("plotly is not installed: no report.html")
    if not all(drawn):
        sys.exit(1)


if __name__ == "__main__":
    main()
