"""Selections of rows and Markdown tables, for the report and its plots."""

from report import table  # benchmarks/report.py

from .cases import Case

GIB = 1 << 30
SETTLED = 1.1  # the longest turn over the shortest, at most
SHORT = {
    "out of memory": "OOM",
    "unsupported": "–",
    "missing": "–",
    "impossible": "",
    "wrong": "**wrong**",
    "failed": "failed",
}


def select(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def settled(row):
    """Whether a time is known well: its turns agree. A short step waits for its host, whose pace changes."""
    return row["ms"] is not None and max(row["turns"]) <= SETTLED * min(row["turns"])


def busy_settled(row):
    """The same of the GPU's time, of two turns at least."""
    turns = row.get("busy_turns") or []
    return len(turns) > 1 and max(turns) <= SETTLED * min(turns)


def comparable(rows):
    """Those with a settled time whose case has a settled fastest."""
    fastest = {(row["unit"], row["pass"]) for row in rows if row["ratio"] == 1 and settled(row)}
    return [row for row in rows if settled(row) and (row["unit"], row["pass"]) in fastest]


def commit_of(about):
    """Of a run's provenance: its commit, short, and whether the sources had been changed since."""
    return (about["commit"][:10] or "unknown") + (", changed" if about["changed"] else "")


def tuple_of(row):
    return tuple(row[name] for name in ("sequences", "length", "hidden", "experts", "top_k", "expert_hidden"))


def case_label(sizes):
    return Case(*sizes).label


def cases_in(rows):
    """Smallest first, in FLOPs."""
    return sorted({tuple_of(row) for row in rows}, key=lambda sizes: (Case(*sizes).flops("forward"), sizes))


def methods_in(rows):
    """In the rows' order, without those that were tried nowhere."""
    return list(dict.fromkeys(row["method"] for row in rows if row["status"] not in ("missing", "impossible")))


def grid_table(rows, cell):
    """Cases down, methods across; `cell` of a row gives its text."""
    methods = methods_in(rows)
    by_place = {(tuple_of(row), row["method"]): row for row in rows}
    lines = []
    for sizes in cases_in(rows):
        here = [by_place.get((sizes, method)) for method in methods]
        if any(row and row["status"] != "impossible" for row in here):
            cells = [
                "" if row is None else cell(row) if row["status"] == "ok" else SHORT[row["status"]] for row in here
            ]
            lines.append((case_label(sizes), *cells))
    return table(("case", *methods), lines) if lines else "Nothing was measured."


def milliseconds(row):
    text = f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}"
    if not settled(row):
        return f"~{text}"
    return f"**{text}**" if row["ratio"] == 1 else text
