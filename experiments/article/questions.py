"""What the article left open: a section a question, from the same rows."""

import itertools
import math
import os
import statistics
from collections import defaultdict
from pathlib import Path

from . import plots, sanitize
from .cases import ARTICLE_SPLIT, PASSES, TYPES
from .oracle import unit_roundoff
from .stages import STAGES
from .tables import case_label, commit_of, methods_in, select, settled, table, tuple_of

ARTICLE_SUM = sum(ARTICLE_SPLIT)
TESTS = Path(__file__).resolve().parents[2] / "tests/gemm"


def against_even(rows):
    """Rows of the uneven split, with their time over the even one's as `ratio_to_even`, where both are settled."""
    rows = [row for row in rows if settled(row)]
    even = {(tuple_of(r), r["dtype"], r["method"], r["pass"]): r["ms"] for r in select(rows, routing="even")}
    found = []
    for row in select(rows, routing="uneven"):
        other = even.get((tuple_of(row), row["dtype"], row["method"], row["pass"]))
        if other and row["experts"] > 1:
            found.append({**row, "ratio_to_even": row["ms"] / other})
    return found


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}; {len(values)})"


def interpolated(points, rows):
    """Milliseconds of a GEMM of so many rows, between measured ones by the logarithm of both."""
    if rows == 0:
        return 0.0
    points = sorted(points)
    if rows <= points[0][0]:
        return points[0][1]
    for (left, left_ms), (right, right_ms) in itertools.pairwise(points):
        if rows <= right:
            part = math.log(rows / left) / math.log(right / left)
            return left_ms ** (1 - part) * right_ms**part
    return points[-1][1] * rows / points[-1][0]


def predicted_ratio(rates, counts):
    """Of the uneven split's products, one GEMM an expert, to the even one's."""
    points = [(rate["rows"], rate["ms"]) for rate in rates]
    even = sum(counts) / len(counts)
    return sum(interpolated(points, count) for count in counts) / (len(counts) * interpolated(points, even))


def uneven(whole, image):
    rows, rates = select(whole["rows"], memory_limit=None), whole["rates"]
    ratios = against_even(rows)
    text = f"""### 1. Is an uneven split faster than an even one?

The article's split {list(ARTICLE_SPLIT)} has {ARTICLE_SUM:,}
rows and was compared with an even one of {64 * 1024 * 8:,}.
"""
    sums = [row for row in rows if row["sequences"] == 1 and row["top_k"] == 1]
    if sums:
        text += equal_sums(sums)
    for dtype in TYPES:
        here = select(ratios, dtype=dtype)
        if not here:
            continue
        lines = [
            (
                method,
                *(
                    spread(v) if (v := [r["ratio_to_even"] for r in own if r["pass"] == which]) else ""
                    for which in PASSES
                ),
            )
            for method in methods_in(here)
            if (own := select(here, method=method))
        ]
        text += (
            f"\nTime of the uneven split over the even one's, {dtype}: median (least to most; over how many cases) of "
            "those where both are settled\n\n"
        )
        text += table(("method", *PASSES), lines) + "\n"
        image(plots.splits, here, dtype)
        text += image.take()
    impossible = {row["reason"] for row in rows if row["status"] == "impossible"}
    if impossible:
        text += "\nWhere a case has no such split: " + "; ".join(sorted(impossible)) + ".\n"
    return text + why_uneven(rates, ratios, image)


def equal_sums(sums):
    lengths = sorted({row["length"] for row in sums})
    lines, ratios = [], defaultdict(list)
    for dtype, which, method in itertools.product(TYPES, PASSES, methods_in(sums)):
        own = [row for row in select(sums, dtype=dtype, method=method) if row["pass"] == which and row["ms"]]
        ms = {(row["length"], row["routing"]): row["ms"] for row in own}
        cells = []
        for length in lengths:
            even, uneven = ms.get((length, "even")), ms.get((length, "uneven"))
            cells += [f"{even:.3g}" if even else "", f"{uneven:.3g}" if uneven else "", ""]
            if even and uneven:
                ratios[method].append(uneven / even)
                cells[-1] = f"{uneven / even:.2f}"
        if ms:
            lines.append((dtype, which, method, *cells))
    columns = [name for length in lengths for name in (f"{length:,} even", f"{length:,} uneven", "u/e")]
    answers = ", ".join(f"{method} {min(found):.2f} to {max(found):.2f}" for method, found in ratios.items())
    return f"""
The same number of rows in both, one expert a token (E 8). Over types, passes and both sums the uneven split takes this
many times the even one's time: {answers}. In milliseconds (u/e: uneven over even):

{table(("type", "pass", "method", *columns), lines)}
"""


def why_uneven(rates, ratios, image):
    if not rates:
        return "\nThe rate of a GEMM against its rows has not been measured.\n"
    image(plots.rates, rates)
    first = rates[0]
    text = f"""
Why: the rate of one GEMM against its rows, {first["k"]} → {first["n"]}. Where the curve is flat, rows may lie as they
like; an expert on its rising part costs more than its share. From the curve, an uneven split's products, one after
another, would take this many times the even one's, beside what was measured (median over the cases):
"""
    measured_at = {rate["rows"] for rate in rates}
    shown = [1 << power for power in range(5, 20, 2) if 1 << power in measured_at]
    lines = []
    for dtype in TYPES:
        own = select(rates, dtype=dtype)
        if own:
            largest = max(rate["rows"] for rate in own)
            by_rows = {rate["rows"]: rate["tflops"] for rate in own}
            measured = [r["ratio_to_even"] for r in select(ratios, dtype=dtype) if r["pass"] == "forward"]
            scaled = [count * largest / ARTICLE_SUM for count in ARTICLE_SPLIT]
            expected = predicted_ratio(own, ARTICLE_SPLIT if largest >= max(ARTICLE_SPLIT) else scaled)
            cells = [f"{by_rows[rows]:.3g}" if rows in by_rows else "" for rows in shown]
            median = f"{statistics.median(measured):.2f}" if measured else ""
            lines.append((dtype, *cells, f"{expected:.2f}", median))
    header = ("type", *(f"TFLOP/s at {rows:,} rows" for rows in shown), "predicted", "measured, forward")
    return text + "\n" + table(header, lines) + "\n" + image.take()


def offsets(_whole, image):
    test = os.path.relpath(TESTS / "row_offsets_test.cpp", image.document.parent)
    return f"""### 2. The grouped batched kernel that was wrong for variable sizes

For the first row of expert e it took `e · counts[e]`, the expert times its own rows; it is
`counts[0] + ... + counts[e − 1]`, the rows of all experts before it. The two agree where all counts are equal, so that
an even split could not show it; otherwise products are wrong, or reach beyond the rows there are.
[row_offsets_test.cpp]({test}) tells them apart; the grouped GEMM suite runs `cublas_grouped` on experts of all sizes.
"""


def sanitizer(whole, image):
    test = os.path.relpath(TESTS / "grouped_gemm_test.cpp", image.document.parent)
    text = f"### 3. The illegal memory access at ({', '.join(map(str, sanitize.SIZES))})\n\n"
    text += f"`TheCaseOfTheIllegalAccess` in [grouped_gemm_test.cpp]({test}) has its every product against an oracle.\n"
    if not whole["sanitizer"]:
        return (
            text
            + "Under compute-sanitizer it has not been run here: `launch/article.sh --sanitize` does so.\n"
        )
    return text + sanitizer_results(whole)


def sanitizer_results(whole):
    if not whole["sanitizer"]:
        return ""
    text = f"Forward and backward of {sanitize.SIZES}, even and uneven, under compute-sanitizer:\n\n"
    lines = []
    for record in whole["sanitizer"]:
        text += f"- {record['device']}, commit {commit_of(record)}, {record['date']}: `{record['command']}`\n"
        for engine, found in record["engines"].items():
            lines.append((record["tool"], engine, "clean" if not found else f"{len(found)} findings: {found[0]}"))
    return f"{text}\n{table(('tool', 'method', 'result'), lines)}\n"


RESULTS = ("y", "dx", "dup", "ddown", "dgate", "dlogits")


def gradients(whole, _image):
    text = """### 4. Every output and gradient against the oracle

The largest error as a part of what rounding allows there (1: the limit), over all cases and routings; in brackets the
error of the whole tensor by root mean squares, over the type's unit roundoff. `dup`, `ddown`: of both projections of
every expert; `dgate`: of the learned gate; `dlogits`: of given routing's logits. What is allowed is derived
element by element from the type and the lengths of the sums (`experiments/article/oracle.py`).

A check of the loss alone would not have seen what this one found, on an H200 on 2026-11-28: weight gradients of
`cublas_loop` that were wrong in fp16 and bf16 where an expert had 8193 or 8194 rows. cuBLAS 13.1 splits such long sums
among blocks and then loses rows at some lengths; PyTorch's `mm` gave the same wrong numbers at 512 × 512 from 8193 rows.
The library no longer takes algorithms that split a sum; `LosesNoRowOfALongSum` in the grouped GEMM suite holds every
engine to it.
"""
    for dtype, torch_type in TYPES.items():
        lines = []
        rows = [row for row in select(whole["rows"], dtype=dtype) if row["errors"]]
        for method in methods_in(rows):
            own = [row["errors"] for row in select(rows, method=method) if row["pass"] == "forward+backward"]
            wrong = sum(row["status"] == "wrong" for row in select(rows, method=method))
            cells = []
            for name in RESULTS:
                found = [errors[name] for errors in own if name in errors]
                used, relative = (max((error[key] for error in found), default=None) for key in ("used", "relative"))
                cells.append("" if used is None else f"{used:.2f} ({relative / unit_roundoff(torch_type):.2g})")
            lines.append((method, *cells, str(len(own)), str(wrong)))
        if lines:
            text += f"\n{dtype}:\n\n" + table(("method", *RESULTS, "checked", "wrong rows"), lines) + "\n"
    return text


def where_time_goes(whole, image):
    text = "### 5. Where the time of a layer goes\n\n"
    records = whole["stages"]
    if not records:
        return text + "No traces have been taken: the cases that they are taken at were not measured.\n"
    text += """Milliseconds of one forward and backward with the learned gate, from a trace: on a GPU
of its kernels, which may run side by side. Where an activation is in a product's epilogue it is counted there; a peer's
kernels are told apart by their names. Beside their sum stands the step's own time, measured without a trace: what it
has beyond the sum, the GPU waits for its host.
"""
    return text + stage_tables(whole, image)


def stage_tables(whole, image):
    records, text = whole["stages"], ""
    steps = {
        (row["unit"], row["method"]): row["ms"]
        for row in select(whole["rows"], memory_limit=None)
        if row["pass"] == "forward+backward" and row["ms"]
    }
    for unit in dict.fromkeys(record["unit"] for record in records):
        latest = {record["method"]: record["ms"] for record in records if record["unit"] == unit}
        lines = [
            (
                method,
                *(f"{ms[stage]:.3g}" for stage in STAGES),
                f"{sum(ms.values()):.3g}",
                f"{step:.3g}" if (step := steps.get((unit, method))) else "",
            )
            for method, ms in latest.items()
        ]
        text += f"\n{unit_label(unit)}:\n\n" + table(("method", *STAGES, "all", "step"), lines) + "\n"
    image(plots.stages, records, unit_label)
    return text + image.take()


def unit_label(unit):
    """Of a unit's name, for people."""
    sizes, dtype, routing = unit.split("/")
    return f"{case_label(map(int, sizes.split(',')))}, {dtype}, {routing} routing"


QUESTIONS = (uneven, offsets, sanitizer, gradients, where_time_goes)
