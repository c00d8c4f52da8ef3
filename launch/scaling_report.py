"""Plots and the Markdown report of a scaling study (launch/scaling.py)."""

from collections import defaultdict
from fractions import Fraction

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

STAGES = {
    "route": "route",
    "plan": "plan",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "combine",
    "dispatch_backward": "dispatch of dy",
    "experts_backward": "experts, backward",
    "combine_backward": "combine of dx",
}
MIB = 1 << 20


def tokens_per_second(record):
    return record["ranks"] * record["tokens_per_rank"] / record["step_ms"] * 1e3


def rank_imbalance(record):
    """Assignments of the fullest rank over the mean."""
    loads = record["assignments"]
    return max(loads) * len(loads) / max(1, sum(loads))


def link_bytes(record):
    """(bytes between ranks of a node, bytes between nodes, most bytes one rank sends), of a step."""
    nodes = record["nodes"]
    within = between = 0
    for source, row in enumerate(record["link_bytes"]):
        for target, count in enumerate(row):
            if nodes[source] == nodes[target]:
                within += count
            else:
                between += count
    return within, between, max(map(sum, record["link_bytes"]))


def flat(record):
    """One row of the table."""
    within, between, most = link_bytes(record)
    row = {**record["point"], "nodes": len(set(record["nodes"])), "step_ms": record["step_ms"]}
    row["tokens_per_second"] = tokens_per_second(record)
    row.update({f"{stage}_ms": record["stage_ms"][stage] for stage in STAGES})
    row.update(
        bytes_within_nodes=within,
        bytes_between_nodes=between,
        most_bytes_of_a_rank=most,
        expert_imbalance=record["expert_imbalance"],
        rank_imbalance=rank_imbalance(record),
        commit=record["provenance"]["commit"],
        date=record["provenance"]["date"],
    )
    return row


def series_key(record):
    """What points that are compared have in common: experts, top-k, skew and balance. In weak scaling the experts of a
    rank, in strong scaling those of all, so that an expert has the same work at any number of ranks."""
    ranks = record["ranks"] if record["point"]["scaling"] == "weak" else 1
    return Fraction(record["experts"], ranks), *load_of(record)


def load_of(record):
    """Top-k, skew, and what travels."""
    return record["top_k"], record["skew"], record["point"]["balance"]


def series_of(records, scaling):
    """Points that are compared with each other, over ranks."""
    series = defaultdict(list)
    for record in records:
        if record["point"]["scaling"] == scaling:
            series[series_key(record)].append(record)
    return {key: sorted(points, key=lambda r: r["ranks"]) for key, points in sorted(series.items())}


def label(key, scaling="strong"):
    experts, top_k, skew, balance = key
    text = f"E {experts}{' a rank' if scaling == 'weak' else ''}, k {top_k}, skew {skew:g}"
    return text if balance == "off" else f"{text}, {balance}"


def efficiency(points):
    """Throughput of a rank over that at the fewest ranks, of each point: 1 is perfect scaling. Of a point alone
    nothing can be said: None."""
    if len(points) == 1:
        return [None]
    first = tokens_per_second(points[0]) / points[0]["ranks"]
    return [tokens_per_second(point) / point["ranks"] / first for point in points]


def ranks_axis(axes, ranks):
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(ranks)), [str(rank) for rank in sorted(set(ranks))])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.grid(alpha=0.3)


def styles(count):
    """Colours and markers that tell `count` lines apart."""
    colours = plt.get_cmap("tab10").colors
    markers = "osD^vP*X"
    return [{"color": colours[i % 10], "marker": markers[i % 8], "ls": "-" if i < 10 else "--"} for i in range(count)]


def save(figure, path):
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def plot_scaling(records, scaling, path):
    """Throughput and efficiency over ranks, one line a configuration."""
    series = series_of(records, scaling)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for style, (key, points) in zip(styles(len(series)), series.items()):
        ranks = [point["ranks"] for point in points]
        left.plot(ranks, [tokens_per_second(point) / 1e3 for point in points], label=label(key, scaling), **style)
        if len(points) > 1:
            right.plot(ranks, efficiency(points), **style)
    all_ranks = [point["ranks"] for points in series.values() for point in points]
    for axes in (left, right):
        ranks_axis(axes, all_ranks)
    right.axhline(1, color="grey", lw=1, ls=":", label="perfect")
    # As many times the ranks as the tokens: a straight line, whatever a configuration's own speed.
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylabel("thousand tokens a second, all ranks")
    right.set_ylabel("efficiency: throughput of a rank\nover that at the fewest ranks")
    right.set_ylim(bottom=0)
    right.legend()
    figure.suptitle(f"{scaling.capitalize()} scaling, forward and backward of one layer")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    save(figure, path)


def plot_stages(records, scaling, path):
    """Stacked times of the stages over ranks, for the least and the most skewed routing."""
    series = series_of(records, scaling)
    experts, top_k = max(series, key=lambda key: (len(series[key]), key))[:2]
    chosen = {key: points for key, points in series.items() if key[:2] == (experts, top_k)}
    figure, all_axes = plt.subplots(
        1, len(chosen), figsize=(4.6 * len(chosen) + 2, 4), layout="constrained", sharey=True, squeeze=False
    )
    for axes, (key, points) in zip(all_axes[0], chosen.items()):
        bottom = [0.0] * len(points)
        names = [str(point["ranks"]) for point in points]
        for colour, (stage, title) in zip(plt.get_cmap("tab10").colors, STAGES.items()):
            heights = [point["stage_ms"][stage] for point in points]
            axes.bar(names, heights, bottom=bottom, color=colour, label=title, width=0.6)
            bottom = [low + height for low, height in zip(bottom, heights)]
        axes.set_title(label(key, scaling))
        axes.set_xlabel("ranks")
        axes.grid(axis="y", alpha=0.3)
    all_axes[0][0].set_ylabel("ms, slowest rank")
    figure.suptitle(f"Time per stage ({scaling} scaling)")
    figure.legend(*all_axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    save(figure, path)


def plot_links(records, path):
    """MiB from each rank to each other in a step, at the most ranks: the least and the most skew."""
    most = max(record["ranks"] for record in records)
    largest = [record for record in records if record["ranks"] == most]
    key = max((r["experts"], r["top_k"]) for r in largest)
    same = [r for r in largest if (r["experts"], r["top_k"]) == key and r["point"]["scaling"] == largest[0]["point"]["scaling"]]
    chosen = [min(same, key=lambda r: r["skew"]), max(same, key=lambda r: r["skew"])]
    chosen = chosen[: len({r["skew"] for r in chosen})]
    top = max(max(map(max, r["link_bytes"])) for r in chosen) / MIB
    figure, all_axes = plt.subplots(
        1, len(chosen), figsize=(4.8 * len(chosen), 4.2), layout="constrained", squeeze=False
    )
    for axes, record in zip(all_axes[0], chosen):
        values = [[count / MIB for count in row] for row in record["link_bytes"]]
        image = axes.imshow(values, vmin=0, vmax=max(top, 1e-9), cmap="viridis")
        axes.set_title(label((record["experts"], *load_of(record))))
        axes.set_xlabel("to rank")
        axes.set_ylabel("from rank")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        if most <= 8:
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    colour = "white" if value < top / 2 else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="small")
    figure.colorbar(image, ax=all_axes[0].tolist(), label="MiB of rows in a step")
    figure.suptitle(f"Bytes per link, {most} ranks")
    save(figure, path)


def plot_imbalance(records, path):
    """Fullest over mean, of experts and of ranks, over ranks."""
    scaling = records[0]["point"]["scaling"]
    series = series_of(records, scaling)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for style, (key, points) in zip(styles(len(series)), series.items()):
        ranks = [point["ranks"] for point in points]
        left.plot(ranks, [point["expert_imbalance"] for point in points], label=label(key, scaling), **style)
        right.plot(ranks, [rank_imbalance(point) for point in points], **style)
    all_ranks = [point["ranks"] for points in series.values() for point in points]
    for axes, what in ((left, "expert"), (right, "rank")):
        ranks_axis(axes, all_ranks)
        axes.set_ylabel(f"assignments of the fullest {what}\nover the mean")
        axes.set_ylim(bottom=0)
    figure.suptitle("Imbalance")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    save(figure, path)


def table(records):
    header = "| scaling | ranks | E | k | skew | balance | assignments an expert | step, ms | thousand tokens/s | efficiency |"
    header += " exchange, share of stages | between nodes, MiB | rank imbalance |"
    lines = [header, "|" + "---|" * 13]
    for scaling in ("weak", "strong"):
        for (_, top_k, skew, balance), points in series_of(records, scaling).items():
            for point, share in zip(points, efficiency(points)):
                mean = point["tokens_per_rank"] * point["ranks"] * top_k / point["experts"]
                share = "–" if share is None else f"{share:.2f}"
                stages = point["stage_ms"]
                exchange = sum(value for name, value in stages.items() if name.startswith(("dispatch", "combine", "plan")))
                lines.append(
                    f"| {scaling} | {point['ranks']} | {point['experts']} | {top_k} | {skew:g} | {balance} | {mean:.0f} "
                    f"| {point['step_ms']:.1f} | {tokens_per_second(point) / 1e3:.2f} | {share} | {exchange / sum(stages.values()):.0%} "
                    f"| {link_bytes(point)[1] / MIB:.2f} | {rank_imbalance(point):.2f} |"
                )
    return "\n".join(lines)


def distinct(records, name):
    values = {str(record["provenance"][name]) for record in records}
    return ", ".join(sorted(values))


def write(records, folder):
    """Draws DIR/*.png and writes DIR/report.md; returns the report's path."""
    plots = []
    for scaling in ("weak", "strong"):
        if series_of(records, scaling):
            plot_scaling(records, scaling, folder / f"{scaling}.png")
            plot_stages(records, scaling, folder / f"{scaling}_stages.png")
            plots += [f"{scaling}.png", f"{scaling}_stages.png"]
    plot_links(records, folder / "links.png")
    plot_imbalance(records, folder / "imbalance.png")
    plots += ["links.png", "imbalance.png"]

    first = records[0]
    commits = ", ".join(sorted({record["provenance"]["commit"][:10] for record in records}))
    dates = sorted(record["provenance"]["date"] for record in records)
    changed = " (with uncommitted changes)" if any(record["provenance"]["changed"] for record in records) else ""
    on = first["provenance"]["gpus"] if first["device"] == "cuda" else None
    text = f"""# Scaling study

One MoE layer in {first['dtype']}{f' on {on}' if on else ''}, forward and backward with routing of the given skew (Zipf's s), hidden {first['hidden']},
expert hidden {first['expert_hidden']}, {first['threads']} thread(s) a rank, medians of {first['rounds']} steps.
A step is timed as a whole; the stages in a second pass, each from a common start, by the slowest rank.
Weak scaling keeps the tokens and the experts of a rank, strong scaling those of all ranks together: in both an expert
has the same work at any number of ranks. Efficiency, throughput of a rank over that at the fewest ranks, compares
only such points ("–": there is no other to compare with). Stages, links and imbalance are those of tokens that travel,
whatever the balance of the step.

{table(records)}

"""
    text += "\n".join(f"![{name.removesuffix('.png').replace('_', ', ')}]({name})\n" for name in plots)
    text += f"""
## Provenance

- processor: {distinct(records, 'processor')}, {distinct(records, 'cores')} cores; host {distinct(records, 'host')}
- PyTorch {first['torch']}; commit {commits}{changed}
- {dates[0]} to {dates[-1]}
- command of a point: `{first['provenance']['command']}`
"""
    path = folder / "report.md"
    path.write_text(text)
    return path
