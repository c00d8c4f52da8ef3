"""The report's plots, from the rows of article.json."""

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

from .cases import ARTICLE_SPLIT, PASSES, TYPES  # noqa: E402
from .registry import DESCRIPTIONS  # noqa: E402
from .stages import STAGES  # noqa: E402
from .tables import GIB, case_label, cases_in, methods_in, select, tuple_of  # noqa: E402

MARKERS = "osD^vP*Xdph<>"


def styles(methods):
    """The same in every picture, whichever methods it shows."""
    colours = plt.get_cmap("tab20").colors
    order = [*colours[::2], *colours[1::2]]  # strong colours first
    known = dict.fromkeys([*DESCRIPTIONS, *methods])
    return {
        method: {"color": order[i % 20], "marker": MARKERS[i % len(MARKERS)], "label": method}
        for i, method in enumerate(known)
    }


def save(figure, folder, name):
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


def legend_below(figure, axes):
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")


def case_axis(axes, cases):
    axes.set_xticks(range(len(cases)), [case_label(case) for case in cases], rotation=60, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    axes.grid(axis="y", alpha=0.3)
    for x in range(0, len(cases), 2):
        axes.axvspan(x - 0.5, x + 0.5, color="grey", alpha=0.1, lw=0, zorder=0)


def over_cases(rows, folder, name, title, panels):
    """One panel a (title, y label, log scale, rows' filter, value): methods as markers, cases along x."""
    cases, methods = cases_in(rows), methods_in(rows)
    size = (max(7.0, 2.5 + 0.6 * len(cases)), 1.5 + 3.8 * len(panels))
    figure, grid = plt.subplots(len(panels), 1, figsize=size, squeeze=False, sharex=True, layout="constrained")
    look = styles(methods)
    for axes, (panel, label, log, chosen, value) in zip(grid[:, 0], panels):
        for i, method in enumerate(methods):
            offset = 0.7 * ((i + 0.5) / len(methods) - 0.5)
            points = [
                (cases.index(tuple_of(row)) + offset, value(row))
                for row in rows
                if row["method"] == method and chosen(row)
            ]
            points = [(x, y) for x, y in points if y is not None]
            axes.plot(*(zip(*points) if points else ((), ())), ls="", markersize=5, **look[method])
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(panel)
        axes.set_ylabel(label)
        case_axis(axes, cases)
    figure.suptitle(title)
    legend_below(figure, grid[0][0])
    return save(figure, folder, name)


def times(rows, folder, dtype, routing):
    rows = select(rows, dtype=dtype, routing=routing, memory_limit=None)
    panels = [
        (which, "milliseconds", True, lambda row, which=which: row["pass"] == which, lambda row: row["ms"])
        for which in PASSES
    ]
    return over_cases(rows, folder, f"time_{dtype}", f"Time of a layer, {dtype}, {routing} routing", panels)


def ratios(rows, folder, dtype, routing):
    rows = select(rows, dtype=dtype, routing=routing, memory_limit=None)
    label = "time / that of the fastest"
    panels = [
        (which, label, True, lambda row, which=which: row["pass"] == which, lambda row: row["ratio"])
        for which in PASSES
    ]
    return over_cases(
        rows, folder, f"ratio_{dtype}", f"Time over the fastest method's, {dtype}, {routing} routing", panels
    )


def memory(rows, folder, dtype, routing):
    rows = select(rows, dtype=dtype, routing=routing, memory_limit=None)
    gib = lambda row: row["peak_bytes"] and row["peak_bytes"] / GIB  # noqa: E731
    panels = [(which, "GiB", True, lambda row, which=which: row["pass"] == which, gib) for which in PASSES]
    title = f"Peak memory of a layer with its inputs and parameters, {dtype}, {routing} routing"
    return over_cases(rows, folder, f"memory_{dtype}", title, panels)


def splits(ratios, folder, dtype):
    """`ratios`: rows with `ratio_to_even`."""
    label = "time of the uneven split / of the even one"
    panels = [
        (which, label, False, lambda row, which=which: row["pass"] == which, lambda row: row["ratio_to_even"])
        for which in PASSES
    ]  # fmt: skip
    return over_cases(
        ratios, folder, f"split_{dtype}", f"The article's split over the even one, {dtype} (1: equal)", panels
    )


def survivors(rows, folder, limit):
    """Which method ran within the limit, at each case."""
    cases, methods = cases_in(rows), methods_in(rows)
    types = sorted({row["dtype"] for row in rows})
    columns = [(dtype, which) for dtype in types for which in PASSES]
    figure, grid = plt.subplots(
        1, len(columns), figsize=(3 + len(columns) * (1.2 + 0.42 * len(methods)), 1.8 + 0.3 * len(cases)),
        squeeze=False, sharey=True, layout="constrained",
    )  # fmt: skip
    colours = ListedColormap(["#d9d9d9", "#d6604d", "#92c5de"])  # not measured, too large, ran
    for axes, (dtype, which) in zip(grid[0], columns):
        shown = [[0] * len(methods) for _ in cases]
        for row in select(rows, dtype=dtype):
            if row["pass"] == which:
                i, j = cases.index(tuple_of(row)), methods.index(row["method"])
                state = {"ok": 2, "out of memory": 1}.get(row["status"], 0)
                shown[i][j] = state
                text = f"{row['peak_bytes'] / GIB:.1f}" if state == 2 else "OOM" if state == 1 else "–"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if state == 1 else "black")
        axes.imshow(shown, cmap=colours, vmin=0, vmax=2, aspect="auto")
        axes.set_xticks(range(len(methods)), methods, rotation=60, ha="right", fontsize=8)
        axes.set_title(f"{dtype}, {which}", fontsize=10)
    grid[0][0].set_yticks(range(len(cases)), [case_label(case) for case in cases], fontsize=8)
    figure.suptitle(
        f"Who runs in {limit / GIB:g} GiB (numbers: peak GiB; OOM: out of memory; –: not for other reasons)"
    )
    return save(figure, folder, "survivors")


def rates(records, folder):
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for dtype in TYPES:
        points = sorted((r["rows"], r["tflops"]) for r in records if r["dtype"] == dtype)
        if points:
            axes.plot(*zip(*points), marker="o", markersize=4, label=dtype)
    largest = max(record["rows"] for record in records)
    marked = [count for count in ARTICLE_SPLIT if count <= largest]
    for count in marked:
        axes.axvline(count, color="grey", ls=":", lw=1, label="the article's experts" if count == marked[0] else None)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rows of one GEMM")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Rate of one GEMM, rows × {records[0]['k']} → {records[0]['n']}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return save(figure, folder, "rate")


OFF_SCALE = 5  # times the fastest method


def stages(records, folder, label_of):
    """Stacked milliseconds of each method, one panel a case."""
    units = list(dict.fromkeys(record["unit"] for record in records))
    methods = list(dict.fromkeys(record["method"] for record in records))
    columns = min(2, len(units))
    lines = -(-len(units) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(6.5 * columns, lines * (1.4 + 0.3 * len(methods))), squeeze=False, layout="constrained"
    )
    colours = dict(zip(STAGES, plt.get_cmap("tab10").colors))
    for axes, unit in zip(grid.flat, units):
        here = {record["method"]: record["ms"] for record in records if record["unit"] == unit}
        left = [0.0] * len(here)
        for stage in STAGES:
            values = [ms[stage] for ms in here.values()]
            axes.barh(list(here), values, left=left, color=colours[stage], label=stage)
            left = [a + b for a, b in zip(left, values)]
        # A few methods may take many times as long: their bars are cut, and say so.
        most = 1.05 * max(total for total in left if total <= OFF_SCALE * min(left))
        axes.set_xlim(0, most)
        for method, total in zip(here, left):
            if total > most:
                text = f"{total:,.{0 if total >= 100 else 1}f} ms →"
                axes.text(0.98 * most, method, text, ha="right", va="center", color="white", fontsize=8)
        axes.invert_yaxis()
        axes.set_title(label_of(unit), fontsize=10)
        axes.set_xlabel("milliseconds")
        axes.tick_params(axis="y", labelsize=8)
    for axes in list(grid.flat)[len(units) :]:
        axes.axis("off")
    figure.suptitle("Forward and backward of a layer, by stage")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STAGES), fontsize="small")
    return save(figure, folder, "stages")
