"""The report's opening: what the article claims, what the packages that it compares do here, and why."""

from collections import Counter

from . import plots, sanitize
from .cases import PASSES, TYPES
from .questions import sanitizer_results, spread, stage_tables, unit_label
from .tables import (
    GIB, busy_settled, case_label, cases_in, grid_table, methods_in, milliseconds, select, settled, table,
)  # fmt: skip

LOOPS = ("cublas_loop_1", "cublas_loop_2", "cublas_loop_4", "cublas_loop_8")
SPARSE = ("MegaBlocks sparse", "MegaBlocks sparse lean")
GROUPED = ("MegaBlocks grouped", "MegaBlocks grouped lean")
ARTICLE_LIMIT = 16 * GIB
PACKAGES = """MegaBlocks 0.10.0, stanford-stk 0.7.1 and grouped_gemm 0.3.0 are PyPI's. MegaBlocks' own operators do not compile with
CUDA 13 as they come (`csrc/cumsum.h` gives CUB's DeviceScan a `debug_synchronous` that it no longer takes): that argument
was left out, in two calls, and both packages' sources were compiled by nvcc 13.0 for sm_90. Its sparse products refuse
Triton 3.2 and newer, so all methods ran beside Triton 3.1.0, in a folder of PYTHONPATH before the machine's own;
LibTorch's products and ours do not use it. ScatterMoE is not on PyPI: its repository's 47b5e15 was tried, and
does not compile beside that Triton but for one forward.
"""
# How a pair of times is known: (its word, where in a row, whether it is settled).
WALL = ("wall", "ms", settled)
BUSY = ("GPU busy", "busy_ms", busy_settled)


def known(whole):
    return any(row["method"] in (*SPARSE, *GROUPED) and row["status"] == "ok" for row in whole["rows"])


def fastest(rows, methods, which):
    """(unit, pass) → the shortest settled time that any of the methods has there."""
    _, value, is_settled = which
    found = {}
    for row in rows:
        if row["method"] in methods and is_settled(row):
            key = (row["unit"], row["pass"])
            found[key] = min(found.get(key, row[value]), row[value])
    return found


def ratios(rows, methods, others, which):
    """Of each unit and pass: the time of the faster of `methods` over that of the fastest of `others`."""
    ours, theirs = fastest(rows, methods, which), fastest(rows, others, which)
    return {key: ours[key] / theirs[key] for key in ours if key in theirs}


def compared(rows, methods, others):
    """For a cell: ratios by type and pass, by wall time and by the GPU's."""
    said = []
    for dtype in TYPES:
        for which in PASSES:
            own = [row for row in select(rows, dtype=dtype, memory_limit=None) if row["pass"] == which]
            for basis in (WALL, BUSY):
                found = list(ratios(own, methods, others, basis).values())
                if found:
                    said.append(f"{dtype} {which}, {basis[0]}: {spread(found)}")
    return "<br>".join(said) or "not measured"


def without_routing(stages, methods):
    """For a cell: a step's milliseconds in its trace but for routing, over cublas_loop_1's, which overlaps nothing."""
    found = {}
    for record in stages:
        rest = sum(ms for stage, ms in record["ms"].items() if stage != "routing")
        found[record["unit"], record["method"]] = rest, record["ms"]["GEMM"]
    said = []
    for (unit, method), (rest, products_alone) in found.items():
        loop = found.get((unit, "cublas_loop_1"))
        if loop and method == methods[0]:
            said.append(
                f"{unit_label(unit).partition(',')[0]}: all but routing {rest / loop[0]:.2f}, products alone {products_alone / loop[1]:.2f}"
            )
    return "<br>".join(said)


def out_of_memory(rows, method):
    """Cases that a method cannot run within the article's memory, forward and backward, of those tried."""
    held = select(rows, method=method, memory_limit=ARTICLE_LIMIT, routing="learned")
    own = [row for row in held if row["pass"] == "forward+backward"]
    counts = Counter(row["status"] for row in own)
    return counts["out of memory"], len(own)


def survivors(rows):
    counts = {m: out_of_memory(rows, m) for m in methods_in(select(rows, memory_limit=ARTICLE_LIMIT))}
    by_count = {}
    for method, (failed, tried) in counts.items():
        if tried:
            by_count.setdefault(f"{failed} of {tried} cases", []).append(method)
    types = ", ".join(dtype for dtype in TYPES if select(rows, memory_limit=ARTICLE_LIMIT, dtype=dtype))
    said = "; ".join(f"{count}: {', '.join(methods)}" for count, methods in by_count.items())
    return f"{types}: {said}" if said else "not measured"


def faults(whole):
    """What memcheck found in each of their methods."""
    found = {}
    for record in whole["sanitizer"]:
        for engine, lines in record["engines"].items():
            if engine in (*SPARSE, *GROUPED):
                found[engine] = "clean" if not lines else f"{len(lines)} findings"
    return ", ".join(f"{engine} {result}" for engine, result in found.items()) or "not run"


def claims(whole, limited):
    """`limited`: rows among which those within the article's memory are."""
    rows, stages = whole["rows"], whole["stages"]
    lines = [
        (
            "A loop of cuBLAS products beats MegaBlocks' sparse implementation",
            f"MegaBlocks sparse over the fastest loop:<br>{compared(rows, SPARSE, LOOPS)}<br>from traces, forward and "
            f"backward:<br>{without_routing(stages, SPARSE)}",
            "Not the method: ours of it (block_sparse, with TMA and warps that load for others) is quicker than the loop "
            "on small cases, where one expert's product does not fill the GPU, and as quick on the larger. stk's kernels "
            "have one tile, 128 × 128 × 32 with four warps, and load through pointers: they too are quicker than the "
            "loop's where products are small, and lose where they are large; what is around them in MegaBlocks loses on "
            "both. A V100 has no TMA: what Triton's compiler lost to cuBLAS there, nothing here can show.",
        ),
        (
            "The loop beats padded bmm",
            f"padded_bmm over the fastest loop:<br>{compared(rows, ('padded_bmm',), LOOPS)}",
            "Every expert has as many rows as the fullest, which are copied there and back. Where all counts are equal "
            "nothing is padded, and on the largest cases it is nearly as fast (Time, below).",
        ),
        (
            "The loop loses to MegaBlocks' grouped implementation",
            f"MegaBlocks grouped over the fastest loop:<br>{compared(rows, GROUPED, LOOPS)}<br>from traces, forward and "
            f"backward:<br>{without_routing(stages, GROUPED)}",
            "`grouped_gemm` as PyPI has it *is* a loop of cuBLAS products on one stream (its CUTLASS kernel is for who "
            "builds it with `GROUPED_GEMM_CUTLASS=1`). What differs is around the products: gate, permutation, and the "
            "host, which launches more. So the claim compares two programs, not two ways to multiply. Ours takes no "
            "algorithm of cuBLAS's that splits a sum, since such lost rows (question 4), which may cost it some speed.",
        ),
        (
            "bmm fails 30 % of the cases for memory",
            f"Out of memory within {ARTICLE_LIMIT / GIB:g} GiB, forward and backward, learned gate: {survivors(limited)}",
            "A learned gate at its start is nearly even, so that little is padded; what is beyond 16 GiB is beyond it for "
            "all, but for one case of bmm's. MegaBlocks takes more memory than bmm where both were measured (below): it "
            "keeps its gathered rows, and the outputs of all of them, for backward.",
        ),
        (
            f"Triton's kernels fault at ({', '.join(map(str, sanitize.SIZES))})",
            f"compute-sanitizer's memcheck, forward and backward, even and uneven: {faults(whole)}",
            "No index of that case comes near 32 bits. By what Triton compiles of it, which was not run there, stk will "
            "fail elsewhere: a block's place is its number times 128 × 128 in 32 bits (`shl.b32` by 14 in its PTX), so "
            "that S may have 131,072 blocks, and 64×1024 h8192 E8 k8 has 524,288.",
        ),
    ]
    return table(("the article", "found here", "why"), lines)


def busy(rows):
    """Milliseconds cell of the GPU's time."""
    mean = rows["busy_ms"]
    if mean is None:
        return ""
    text = f"{mean:.3g}"
    return text if busy_settled(rows) else f"~{text}"


def small_cases(rows):
    rows = [row for row in select(rows, memory_limit=None, routing="learned") if row.get("busy_ms")]
    if not rows:
        return ""
    wall, gpu = sum(map(settled, rows)), sum(map(busy_settled, rows))
    text = f"""
### Small cases: the host's time and the GPU's

A step that is launched in a millisecond or two takes as long as its host does. GPU busy: how long, in a trace of five
steps, a kernel or a copy runs, on one stream or several. Of {len(rows)} pairs of times with a learned gate {wall} are settled
by the clock and {gpu} by the GPU's time (longest turn over shortest at most 1.1; the others are marked ~).
"""
    for dtype in TYPES:
        for which in PASSES:
            here = [row for row in select(rows, dtype=dtype) if row["pass"] == which]
            if here:
                text += f"\n{dtype}, {which}, wall:\n\n{grid_table(here, milliseconds)}\n"
                text += f"\n{dtype}, {which}, GPU busy:\n\n{grid_table(here, busy)}\n"
    return text


def products(records):
    """Product by product, theirs beside ours."""
    if not records:
        return ""
    text = """
### The products with the sparse matrix, one by one

S [P, E n] in blocks of 128, D [P, h], W [E, n, h]: SDD is S = D Wᵀ, DSD is D = S W, DSᵀD and DDS are the weights' gradient
Sᵀ D, which read S column by column through an index of its blocks (BCSC), as MegaBlocks does in its backward pass; ours
has one kernel for both. The GPU's microseconds of the products' kernels alone, medians of three turns, each checked
against fp64 first; in brackets TFLOP/s without padding.
"""
    for unit in dict.fromkeys(record["unit"] for record in records):
        here = [record for record in records if record["unit"] == unit]
        sequences, length, hidden, _, top_k, inner = map(int, unit.split("/")[0].split(","))
        flops = 2 * sequences * length * top_k * hidden * inner
        forms = [form for form in dict.fromkeys(record["form"] for record in here) if form]
        by_place = {(record["method"], record["form"]): record for record in here}
        lines = []
        for method in dict.fromkeys(record["method"] for record in here):
            cells = [product_cell(by_place.get((method, form)), flops) for form in forms]
            lines.append((method, *cells))
        text += f"\n{unit_label(unit)}:\n\n{table(('method', *forms), lines)}\n"
    return text


def product_cell(record, flops):
    if record is None:
        return ""
    if record["status"] != "ok":
        return record["status"]
    return f"{record['ms'] * 1e3:.4g} ({flops / record['ms'] / 1e9:.3g})"


def peer_times(rows, image):
    """Times of every method that was in turns with the packages."""
    text = "\n### Times and memory beside ours\n"
    free = select(rows, memory_limit=None)
    for dtype in TYPES:
        own = select(free, dtype=dtype, routing="learned")
        if not own:
            continue
        image(plots.ratios, free, dtype, "learned")
        for which in PASSES:
            here = [row for row in own if row["pass"] == which]
            text += f"\nMilliseconds, {dtype}, {which}, learned routing:\n\n{grid_table(here, milliseconds)}\n"
            text += f"\nPeak GiB, {dtype}, {which}, learned routing:\n\n{grid_table(here, gib)}\n"
        text += image.take()
    return text


def gib(row):
    return f"{row['peak_bytes'] / GIB:.3g}"


def stages(whole, image):
    if not whole["stages"]:
        return ""
    text = """
### Where their time goes

As in question 5. MegaBlocks permutes and combines by one kernel, which is counted as permutation.
"""
    return text + stage_tables(whole, image)


def opening(whole, image, methods, limited):
    """`methods`: the report's section of methods, for these rows. `limited`: as for `claims`."""
    rows = whole["rows"]
    free = select(rows, memory_limit=None)
    names = ", ".join(map(case_label, cases_in(free)))
    kinds = ", ".join(dict.fromkeys(f"{row['dtype']} with {row['routing']} routing" for row in free))
    return f"""## The article's claims, with the packages themselves

Ratios are medians (least to most; over how many cases), of times that are settled; above 1 the loop is faster. The
packages stand behind a gate in plain PyTorch, the loop has its layer's router: what traces say leaves that out. Measured:
{names}, {kinds}; the rest of the grid has not been with the packages.

{claims(whole, limited)}

{PACKAGES}
{methods}
{sanitizer_results(whole)}{peer_times(rows, image)}{small_cases(rows)}{products(whole.get("products", []))}{stages(whole, image)}"""
