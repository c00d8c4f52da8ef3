"""What the planner draws."""

import dataclasses

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy  # noqa: E402

COLOURS = {"compute": "tab:blue", "exchange": "tab:orange", "all-reduce": "tab:red"}


def save(figure, path):
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def timeline(prediction, path):
    """One layer, forward and backward, on the busiest and the idlest rank."""
    compute = sum(event.end - event.begin for event in prediction.events if event.kind == "compute")
    ranks = [int(numpy.argmax(compute)), int(numpy.argmin(compute))]
    figure, axes = plt.subplots(figsize=(12, 3.4), layout="constrained")
    labels = []
    for row, (rank, which) in enumerate(zip(ranks, ("busiest", "idlest"))):
        for lane, kind in enumerate(("compute", "exchange")):
            height = 2.4 * row + lane
            labels.append((height, f"{which} rank ({rank}): {kind}"))
            for event in prediction.events:
                if event.kind == kind:
                    width = (event.end[rank] - event.begin[rank]) * 1e3
                    axes.barh(height, width, left=event.begin[rank] * 1e3, color=COLOURS[kind], ec="white", height=0.8)
    end = max(event.end.max() for event in prediction.events) * 1e3
    for event in prediction.events:
        if event.end[ranks[0]] - event.begin[ranks[0]] > 0.035 * end / 1e3:
            middle = (event.begin[ranks[0]] + event.end[ranks[0]]) / 2 * 1e3
            height = 0 if event.kind == "compute" else 1
            axes.text(middle, height, event.name.replace(" ", "\n"), ha="center", va="center", fontsize=6, clip_on=True)
    axes.set_yticks([height for height, _ in labels], [text for _, text in labels])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    layout = prediction.layout
    axes.set_title(
        f"One layer, forward and backward: {layout.gpus} GPUs, expert parallel {layout.expert_parallel}, "
        f"{layout.all_to_all}, overlap {layout.overlap or 'off'}"
    )
    save(figure, path)


def scale(by_machine, path):
    """Best layouts over GPUs, one panel a network: where a step's time goes. Each panel has its own axis."""
    figure, all_axes = plt.subplots(
        1, len(by_machine), figsize=(4.3 * len(by_machine) + 1, 4.2), layout="constrained", squeeze=False
    )
    for axes, (name, predictions) in zip(all_axes[0], by_machine.items()):
        names = [f"{p.layout.gpus:,}\nEP {p.layout.expert_parallel}" for p in predictions]
        bottom = numpy.zeros(len(predictions))
        parts = {
            "compute": [p.compute for p in predictions],
            "exchange": [p.exchange for p in predictions],
            "all-reduce": [p.all_reduce for p in predictions],
        }
        for kind, seconds in parts.items():
            label = kind if kind == "compute" else f"exposed {kind}"
            axes.bar(names, seconds, bottom=bottom, color=COLOURS[kind], label=label, width=0.7)
            bottom += seconds
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel("GPUs, best expert-parallel size")
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0][0].set_ylabel("s a step")
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save(figure, path)


def internet(bandwidths, latencies, shares, gpus, path):
    """Share of a step in which the busiest GPU computes, over the network's bandwidth and latency."""
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    for row in range(len(latencies)):
        for column in range(len(bandwidths)):
            share = shares[row][column]
            colour = "white" if share < 0.5 else "black"
            axes.text(column, row, f"{share:.1%}" if share < 0.1 else f"{share:.0%}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(bandwidths)), [f"{b * 8 / 1e9:g}" for b in bandwidths])
    axes.set_yticks(range(len(latencies)), [f"{latency * 1e3:g}" for latency in latencies])
    axes.set_xlabel("network of a node, Gb/s")
    axes.set_ylabel("latency, ms")
    axes.set_title(f"Share of a step that the busiest GPU computes: {gpus:,} GPUs, best layout")
    figure.colorbar(image, label="compute / step")
    save(figure, path)


def slower(machine, bandwidth, latency):
    """The machine with one network connection of that kind for each node."""
    link = dataclasses.replace(machine.network, bandwidth=bandwidth, latency=latency)
    return dataclasses.replace(machine, network=link, gpus_per_nic=machine.gpus_per_node)
