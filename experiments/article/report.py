"""The Markdown report, generated from article.json."""

import json
import os
import re
import statistics
from collections import Counter, defaultdict

from . import claims, plots
from .cases import PASSES, TYPES
from .measure import SLOW_MS, VERY_SLOW_MS
from .questions import QUESTIONS, unit_label
from .registry import DESCRIPTIONS
from .tables import (
    GIB, SETTLED, commit_of, comparable, grid_table, methods_in, milliseconds, select, table,
)  # fmt: skip


def about(whole):
    """Where, when and with what it was measured."""
    runs = whole["runs"]

    def distinct(name):
        return ", ".join(dict.fromkeys(str(run[name]) for run in runs if run.get(name) is not None))

    versions = {name: version for run in runs for name, version in run["versions"].items()}
    others = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    dates = [run["date"] for run in runs]
    small = (
        "\n**This is the small grid, on a machine without a GPU: it shows that everything runs, not what is fast.**\n"
    )
    return f"""## What is measured, and how

Every way to run the experts of one layer, on the article's grid: an MLP with tanh-GELU, without biases, its gate
included; `(sequences × length, hidden, E experts, k of them for a token)`. Outputs and every gradient are checked
against an fp64 oracle before anything is timed. Each time is the median of turns, each the median of its steps; the
cases take their turns one after another, and in each the methods, so that what drifts meets all alike. Steps of
{SLOW_MS:g} ms or more have one turn; of those of {VERY_SLOW_MS:g} ms or more it may be the step that was checked. A
step is launched by Python: one of a few milliseconds takes the time of the host, not of the GPU, and hosts change their
pace. A time is called settled where its longest turn is at most {SETTLED:g} times its shortest. Peak memory counts
inputs, parameters, gradients and everything alive between, without workspaces that are kept from step to step. Routing
is by a learned gate, or in a given split: even, or the article's uneven one; where every token goes to every expert
(k = E) these are one, and measured as learned. Written by `launch/article.sh`.
{small if any(run["small"] for run in runs) else ""}
- device: {distinct("device")}; host processor {distinct("processor")}, {distinct("cores").replace(", ", " or ")} cores
- PyTorch {distinct("torch")}, CUDA {distinct("cuda") or "none"}; {others}
- expert hidden size: {distinct("expert_hidden_factor")} × hidden
- {dates[0]} to {dates[-1]}, by the runs listed at the end
- all rows: `article.csv`, `article.json` beside the plots
"""


def runs(whole, which=""):
    """Which command, at which commit and when, gave how many of the rows."""
    counts = Counter(row["run"] for row in whole["rows"])
    lines = []
    for run in whole["runs"]:
        lines.append((run["date"], commit_of(run), str(run["cores"]), f"`{run['command']}`", str(counts[run["run"]])))
    return f"## {' '.join(filter(None, ('Runs', which)))}\n\n{table(('date', 'commit', 'cores', 'command', 'rows'), lines)}\n"


def methods(whole, heading="## Methods"):
    rows = whole["rows"]
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = select(rows, method=method)
        counts = Counter(row["status"] for row in own if row["status"] != "impossible")
        padded = [row["padding_rows"] / row["assignments"] for row in own if row["padding_rows"] is not None]
        most = f"{max(padded):.0%}" if padded else ""
        states = ", ".join(f"{count} {status}" for status, count in counts.items())
        lines.append((method, DESCRIPTIONS.get(method, "peer, behind the plain gate"), most, states))
    header = ("method", "what it does", "padding rows, most, of the assignments", "rows of the results")
    return f"{heading}\n\n{table(header, lines)}\n\n{troubles(rows)}"


def troubles(rows):
    """What kept methods from a time: each kind of reason, or case that was too large, once."""
    found = defaultdict(list)
    for row in rows:
        if row["status"] not in ("ok", "impossible"):
            kind = row["unit"] if row["status"] == "out of memory" else re.sub(r"\d+", "#", cause(row))
            found[row["status"], row["memory_limit"], kind].append(row)
    lines = []
    for (status, limit, _), those in found.items():
        methods = ", ".join(dict.fromkeys(row["method"] for row in those))
        status += f", {limit / 2**30:g} GiB allowed" if limit else ""
        first = f"{unit_label(those[0]['unit'])}, {those[0]['pass']}"
        lines.append((methods, status, str(len(those)), first, cause(those[0]).replace("|", "\\|")))
    if not lines:
        return "Every method ran everywhere and was right.\n"
    return "What has no time, and why:\n\n" + table(("methods", "what", "rows", "the first", "its reason"), lines) + "\n"


def cause(row):
    """A row's reason, without the state of the allocator that LibTorch adds to an out of memory."""
    return re.split(r" GPU \d+ has a total", row["reason"] or "")[0]


def geometric_mean(values):
    return statistics.geometric_mean(values) if values else None


def summary(rows):
    """Mean time over the fastest, by type and pass."""
    columns = [(dtype, which) for dtype in TYPES for which in PASSES if select(rows, dtype=dtype)]
    known = comparable(rows)
    lines = []
    for method in methods_in(rows):
        cells = []
        for dtype, which in columns:
            own = [row for row in select(known, dtype=dtype, method=method) if row["pass"] == which]
            mean = geometric_mean([row["ratio"] for row in own])
            cells.append(f"{mean:.2f} ({len(own)})" if mean else "")
        lines.append((method, *cells))
    return table(("method", *(f"{dtype}, {which}" for dtype, which in columns)), lines)


def times(rows, image):
    free = select(rows, memory_limit=None)
    text = f"""## Time

Time over the fastest method's at the same case, geometric mean over the cases and routings where both are settled (and
over how many):

{summary(free)}

In what follows the fastest is bold, and ~ marks a time that is not settled.
"""
    for dtype in TYPES:
        routing = next(
            (name for name in ("learned", "even", "uneven") if select(free, dtype=dtype, routing=name)), None
        )
        if routing is None:
            continue
        image(plots.times, free, dtype, routing)
        image(plots.ratios, free, dtype, routing)
        for which in PASSES:
            here = [row for row in select(free, dtype=dtype, routing=routing) if row["pass"] == which]
            text += f"\nMilliseconds, {dtype}, {which}, {routing} routing:\n\n{grid_table(here, milliseconds)}\n"
        text += image.take()
    return text


def memory(rows, image):
    text = "## Memory\n"
    free = select(rows, memory_limit=None)
    for dtype in TYPES:
        here = [row for row in select(free, dtype=dtype, routing="learned") if row["pass"] == "forward+backward"]
        if here:
            image(plots.memory, free, dtype, "learned")
            gib = lambda row: f"{row['peak_bytes'] / GIB:.3g}"  # noqa: E731
            text += f"\nPeak GiB, {dtype}, forward and backward, learned routing:\n\n{grid_table(here, gib)}\n"
            text += image.take()
    limits = sorted({row["memory_limit"] for row in rows if row["memory_limit"]})
    if not limits:
        return (
            text + "\nNothing has been measured under a memory limit yet: `launch/article.sh --memory-limit 16GiB`.\n"
        )
    for limit in limits:
        held = select(rows, memory_limit=limit)
        routing = max(("learned", "even", "uneven"), key=lambda name: len(select(held, routing=name)))
        counts = Counter((row["method"], row["status"]) for row in held)
        lines = [(m, str(counts[m, "ok"]), str(counts[m, "out of memory"])) for m in methods_in(held)]
        image(plots.survivors, select(held, routing=routing), limit)
        text += f"""
### Within {limit / GIB:g} GiB

Rows that ran, and that did not fit, over all cases, routings and passes measured under this limit ({routing} routing in
the plot):

{table(("method", "ran", "out of memory"), lines)}
{image.take()}"""
    return text


class Images:
    """Draws plots into a folder, and gives the Markdown that shows them in a document elsewhere."""

    def __init__(self, folder, document):
        self.folder, self.document, self.drawn = folder, document, []

    def __call__(self, draw, *arguments):
        rows, *others = arguments
        self.drawn.append(draw(rows, self.folder, *others))

    def take(self):
        paths = [os.path.relpath(path, self.document.parent) for path in self.drawn]
        self.drawn = []
        return "".join(
            f"\n![{os.path.basename(path).removesuffix('.png').replace('_', ', ')}]({path})\n" for path in paths
        )


def publish(results, document):
    """The published document, from RESULTS/article and, of the packages, RESULTS/article_peers."""
    whole, peers = (
        json.loads(path.read_text()) if (path := results / name / "article.json").exists() else None
        for name in ("article", "article_peers")
    )
    return write(whole, results / "article", document, peers and (peers, results / "article_peers"))


def write(whole, folder, document, peers=None):
    """Draws FOLDER/*.png and writes the document; returns its path. `peers`: (whole, folder) of the packages' run,
    unless they are in `whole`."""
    image = Images(folder, document)
    rows = whole["rows"]
    parts = ["# The article's experiment\n"]
    if peers or claims.known(whole):
        theirs, its_folder = peers or (whole, folder)
        of_methods = methods(theirs, "### The packages")
        known = theirs["rows"] + rows if peers else rows
        parts.append(claims.opening(theirs, Images(its_folder, document), of_methods, known))
    parts += [about(whole), methods(whole), times(rows, image), memory(rows, image), "## What the article left open"]
    parts += [question(whole, image) for question in QUESTIONS]
    parts.append(runs(whole))
    if peers:
        parts.append(runs(theirs, "with the packages"))
    document.write_text("\n".join(parts))
    return document
