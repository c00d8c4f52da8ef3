"""The report, its tables and its plots, from stored rows."""

import csv
import json

import pytest
from article import cases, measure, plots, questions, report, stages, store, tables

GRID = {case.tuple: case for case in cases.grid()}
SOME = [GRID["16,1024,512,8,3"], GRID["64,1024,1024,8,3"], GRID["16,1024,512,4,4"]]
METHODS = {"padded_bmm": 2.0, "auto": 1.0, "block_sparse": 4.0}  # and how much longer they take
PACKAGES = {"cublas_loop_1": 1.0, "padded_bmm": 2.0, "MegaBlocks sparse": 3.0, "MegaBlocks grouped": 0.5}
RUN = {
    "run": 0, "command": "launch/article.sh --budget 5", "commit": "0123456789abcdef", "changed": False,
    "date": "2026-11-25T19:00:00Z", "processor": "a processor", "cores": 16, "device": "a GPU", "cuda": "13.0",
    "python": "3.12", "torch": "2.11.0", "versions": {"numpy": "2.2.6"}, "small": False, "seed": 1,
    "expert_hidden_factor": 2,
}  # fmt: skip


def row(unit, which, method, memory_limit=None, **changes):
    """A row as if measured: 1 ms a TFLOP, twice as long in the uneven split, 1 GiB a 100,000 assignments."""
    settings = measure.Settings("cpu", memory_limit=memory_limit)
    ms = unit.case.flops(which) / 1e12 * {**METHODS, **PACKAGES}[method] * (2 if unit.routing == "uneven" else 1)
    gate = "dgate" if unit.routing == "learned" else "dlogits"
    errors = {n: {"error": 1e-3, "used": 0.25, "relative": 2e-3} for n in ("y", "dx", "dup", "ddown", gate)}
    values = dict(ms=ms, tflops=1.0, peak_bytes=unit.case.assignments * 10737, padding_rows=10, errors=errors, steps=9)
    values["turns"] = [ms, ms]
    return measure.row_of(unit, which, method, settings, **{"status": "ok", "reason": None, **values, **changes})


NOTHING = dict(ms=None, tflops=None, peak_bytes=None, errors={}, steps=0, turns=[])


@pytest.fixture
def without_pictures(monkeypatch):
    """For tests of the text: plots are made and not written, which takes most of a report's time."""

    def save(figure, folder, name):
        plots.plt.close(figure)
        return folder / f"{name}.png"

    monkeypatch.setattr(plots, "save", save)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("article")
    kept = store.Store(tmp_path)
    kept.add("run", **RUN)
    for unit in cases.units(SOME, cases.equal_sums(), ["bf16", "fp32"], list(cases.ROUTINGS)):
        for method in METHODS:
            for which in cases.PASSES:
                changes = {}
                if unit.routing == "uneven" and unit.case.experts == unit.case.top_k:
                    changes = dict(status="impossible", reason="only the even split exists", **NOTHING)
                elif (method, unit.dtype) == ("block_sparse", "fp32") and which == "forward+backward":
                    wrong = {name: {"error": 1.0, "used": 7.5, "relative": 0.3} for name in ("dup", "y")}
                    changes = dict(status="wrong", reason="dup errs by 1, 7.5 times", **{**NOTHING, "errors": wrong})
                kept.add("step", run=0, **row(unit, which, method, **changes))
                if unit.routing == "learned":
                    small = unit.case.tokens < 20000
                    changes = {} if small else dict(status="out of memory", reason="too much", **NOTHING)
                    kept.add("step", run=0, **row(unit, which, method, memory_limit=16 << 30, **changes))
    for rows in [128, 2048, 32768, 131072]:  # 10 us and 1 us a hundred rows: large GEMMs are more efficient
        kept.add("rate", run=0, dtype="bf16", k=512, n=1024, rows=rows, ms=0.01 + rows / 1e5, tflops=1.0)
    for method, scale in METHODS.items():
        times = {stage: scale * (i + 1) for i, stage in enumerate(stages.STAGES)}
        kept.add("stages", run=0, unit=cases.Unit(SOME[0], "bf16", "learned").name, method=method, ms=times)
    sanitized = [{"tool": "memcheck", "command": "compute-sanitizer --tool memcheck", "device": "a GPU",
                  "commit": "89abcdef0123", "changed": False, "date": "2026-11-25",
                  "exit_code": 0, "engines": {"auto": [], "padded_bmm": ["Invalid __global__ read"]}}]  # fmt: skip
    whole = store.write_tables(kept, sanitized, tmp_path)
    (tmp_path / "plots").mkdir()
    document = report.write(whole, tmp_path / "plots", tmp_path / "article.md")
    return whole, document.read_text(), tmp_path


def test_where_and_when(written):
    whole, text, _ = written
    for part in ("a GPU", "2026-11-25T19:00:00Z", "numpy 2.2.6"):
        assert part in text
    ran = "| 2026-11-25T19:00:00Z | 0123456789 | 16 | `launch/article.sh --budget 5` |"
    assert f"{ran} {len(whole['rows'])} |" in text
    assert "small grid" not in text


def test_tables_of_time(written):
    _, text, _ = written
    flops = SOME[0].flops("forward") / 1e12
    # In the report's own order of methods, not in that of their turns.
    assert f"| 16×1024 h512 E8 k3 | **{flops:.3g}** | {4 * flops:.3g} | {2 * flops:.3g} |" in text
    assert f"| 16×1024 h512 E8 k3 | **{3 * flops:.3g}** | **wrong** | {6 * flops:.3g} |" in text  # fp32
    assert "| block_sparse | 4.00 (11) | 4.00 (11) | 4.00 (11) |  |" in text
    assert "| block_sparse | wrong | 11 |" in text and "dup errs by 1, 7.5 times" in text


def test_times_that_are_not_settled(tmp_path, without_pictures):
    kept = store.Store(tmp_path)
    kept.add("run", **RUN)
    for case, routing in ((case, routing) for case in SOME[:2] for routing in cases.ROUTINGS):
        unit = cases.Unit(case, "bf16", routing)
        for method, which in ((method, which) for method in METHODS for which in cases.PASSES):
            wavers = case is SOME[0] and (method, routing) in {("block_sparse", "even"), ("auto", "learned")}
            ms = row(unit, which, method)["ms"]
            kept.add("step", run=0, **row(unit, which, method, turns=[ms, 1.2 * ms] if wavers else [ms, 1.05 * ms]))
    text = report.write(store.write_tables(kept, [], tmp_path), tmp_path, tmp_path / "article.md").read_text()
    auto, block_sparse, padded = (factor * SOME[0].flops("forward") / 1e12 for factor in (1, 4, 2))
    assert f"| 16×1024 h512 E8 k3 | ~{auto:.3g} | {block_sparse:.3g} | {padded:.3g} |" in text
    assert "| auto | 1.00 (5) | 1.00 (5) |" in text  # without the case whose fastest wavers
    assert "| block_sparse | 4.00 (4) | 4.00 (4) |" in text  # nor that where it does itself
    assert "| auto | 2.00 (2.00 to 2.00; 2) |" in text and "| block_sparse | 2.00 (2.00 to 2.00; 1) |" in text


def test_the_memory_limit(written):
    _, text, _ = written
    assert "### Within 16 GiB" in text and "| auto | 8 | 4 |" in text
    gib = SOME[0].assignments * 10737 / (1 << 30)
    assert f"| 16×1024 h512 E8 k3 | {gib:.3g} | {gib:.3g} | {gib:.3g} |" in text


def test_the_five_questions(written):
    _, text, _ = written
    assert [line for line in text.splitlines() if line.startswith("### ")][-5:] == [
        "### 1. Is an uneven split faster than an even one?",
        "### 2. The grouped batched kernel that was wrong for variable sizes",
        "### 3. The illegal memory access at (32, 512, 512, 8, 4)",
        "### 4. Every output and gradient against the oracle",
        "### 5. Where the time of a layer goes",
    ]
    cases_with_a_split = len(SOME) - 1 + len(cases.equal_sums())
    assert "| auto |" + f" 2.00 (2.00 to 2.00; {cases_with_a_split}) |" * 2 in text
    assert "auto 2.00 to 2.00, block_sparse 2.00 to 2.00, padded_bmm 2.00 to 2.00." in text
    sums = [case.flops("forward") / 1e12 for case in cases.equal_sums()]
    assert "| bf16 | forward | auto |" + "".join(f" {ms:.3g} | {2 * ms:.3g} | 2.00 |" for ms in sorted(sums)) in text
    assert (
        "- a GPU, commit 89abcdef01, 2026-11-25: `compute-sanitizer --tool memcheck`\n" in text
        and "| memcheck | auto | clean |" in text
        and "| memcheck | padded_bmm | 1 findings: Invalid __global__ read |" in text
    )
    assert "| auto | 0.25 (0.51) | 0.25 (0.51) |" in text  # 2e-3 over bf16's 2^-8
    step = 3 * SOME[0].flops("forward") / 1e12
    assert f"| auto | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 28 | {step:.3g} |" in text


def test_every_plot_is_there_and_shown(written):
    _, text, folder = written
    expected = {
        "time_bf16",
        "time_fp32",
        "memory_bf16",
        "memory_fp32",
        "survivors",
        "split_bf16",
        "split_fp32",
        "ratio_bf16",
    }
    assert {path.stem for path in (folder / "plots").glob("*.png")} == expected | {"ratio_fp32", "rate", "stages"}
    for path in (folder / "plots").glob("*.png"):
        assert f"](plots/{path.name})" in text and path.stat().st_size > 10_000


def test_csv_and_json(written):
    whole, _, folder = written
    assert json.loads((folder / "article.json").read_text()) == whole
    assert max(map(len, (folder / "article.json").read_text().splitlines())) < 2000
    lines = list(csv.DictReader(open(folder / "article.csv")))
    assert len(lines) == len(whole["rows"])
    line = next(r for r in lines if (r["method"], r["dtype"], r["pass"]) == ("padded_bmm", "bf16", "forward"))
    assert float(line["ratio"]) == 2 and line["commit"] == RUN["commit"] and line["device"] == "a GPU"
    assert float(line["largest_error_used"]) == 0.25 and line["padding_rows"] == "10"


def test_predicted_times_follow_the_curve():
    rates = [{"rows": rows, "ms": rows / 1e3} for rows in (128, 1024, 1 << 17)]
    # Where time is in proportion to rows, a split changes nothing.
    assert questions.predicted_ratio(rates, cases.ARTICLE_SPLIT) == pytest.approx(1, rel=0.02)
    flat = [{"rows": rows, "ms": 1.0} for rows in (128, 1 << 17)]
    assert questions.predicted_ratio(flat, [1, 2, 3]) == pytest.approx(1)
    assert questions.interpolated([(100, 1.0), (400, 4.0)], 200) == pytest.approx(2.0)
    assert questions.interpolated([(100, 1.0), (400, 4.0)], 800) == pytest.approx(8.0)
    assert questions.interpolated([(100, 1.0)], 0) == 0


def test_what_has_not_been_run_is_said(tmp_path, without_pictures):
    kept = store.Store(tmp_path)
    kept.add("run", **{**RUN, "small": True})
    unit = cases.Unit(SOME[0], "bf16", "learned")
    for which in cases.PASSES:
        kept.add("step", run=0, **row(unit, which, "auto"))
    text = report.write(store.write_tables(kept, [], tmp_path), tmp_path, tmp_path / "article.md").read_text()
    assert "has not been run here: `launch/article.sh --sanitize`" in text and "small grid" in text
    assert "Nothing has been measured under a memory limit yet" in text
    assert "No traces have been taken" in text and "has not been measured" in text


def test_labels():
    assert questions.unit_label("16,1024,512,8,3,1024/bf16/learned") == "16×1024 h512 E8 k3, bf16, learned routing"
    assert tables.methods_in([{"method": "a", "status": "missing"}, {"method": "b", "status": "ok"}]) == ["b"]


def test_troubles_of_a_kind_are_one_line():
    first, second = (cases.Unit(case, "fp16", "learned") for case in SOME[:2])
    full = "CUDA out of memory. Tried to allocate {} GiB. GPU 0 has a total capacity of 139 GiB"

    def lines(*rows):
        return report.troubles(list(rows)).splitlines()[4:]

    def without_memory(unit, method, size, **changes):
        reason = full.format(size)
        return row(unit, "forward", method, **{"status": "out of memory", "reason": reason, **NOTHING, **changes})

    (line,) = lines(without_memory(first, "auto", 1.5), without_memory(first, "padded_bmm", 16))
    assert "| auto, padded_bmm | out of memory | 2 |" in line and "Tried to allocate 1.5 GiB. |" in line
    assert len(lines(without_memory(first, "auto", 1), without_memory(second, "auto", 1))) == 2  # cases tell apart
    limited = without_memory(first, "auto", 1, memory_limit=16 << 30)
    assert "out of memory, 16 GiB allowed" in lines(limited)[0]
    assert len(lines(limited, without_memory(first, "auto", 1))) == 2
    refused = [
        row(unit, "forward", "auto", status="unsupported", reason=f"no weights of {size} x 4", **NOTHING)
        for unit, size in ((first, 8), (second, 16))
    ]
    (line,) = lines(*refused)
    assert "| unsupported | 2 |" in line and "no weights of 8 x 4" in line


def of_packages(folder):
    """Rows as a run with the packages has them: theirs, ours beside them, some out of memory; products; memcheck."""
    kept = store.Store(folder)
    kept.add("run", **RUN)
    for case in SOME:
        unit = cases.Unit(case, "bf16", "learned")
        for method, scale in PACKAGES.items():
            for which in cases.PASSES:
                busy = 0.5 * scale
                kept.add("step", run=0, **row(unit, which, method, busy_ms=busy, busy_turns=[busy, busy]))
                failed = method == "padded_bmm" and case is SOME[1]
                changes = dict(status="out of memory", reason="too much", **NOTHING) if failed else {}
                kept.add("step", run=0, **row(unit, which, method, memory_limit=16 << 30, **changes))
    for method, scale in PACKAGES.items():
        times = {stage: 100.0 if stage == "routing" else scale for stage in stages.STAGES}
        kept.add("stages", run=0, unit=cases.Unit(SOME[0], "bf16", "learned").name, method=method, ms=times)
    own = dict(unit=cases.Unit(SOME[0], "bf16", "learned").name, status="ok", relative=1e-3, allowed=4e-3)
    kept.add("product", run=0, method="block_sparse", form="SDD", ms=0.1, turns=[0.1], **own)
    kept.add("product", run=0, method="stk", form="SDD", ms=0.2, turns=[0.2], **own)
    kept.add("product", run=0, method="stk", form="DDS", ms=0.2, turns=[0.2], **{**own, "status": "wrong"})
    about = dict(tool="memcheck", command="compute-sanitizer", device="a GPU", commit="89abcdef0123", changed=False)
    return store.write_tables(
        kept, [{**about, "date": "2026-11-25", "exit_code": 0, "engines": {"MegaBlocks sparse": []}}], folder
    )


def test_it_opens_with_the_articles_claims(tmp_path, without_pictures):
    whole = of_packages(tmp_path)
    text = report.write(whole, tmp_path, tmp_path / "article.md").read_text()
    lines = text.splitlines()
    assert lines[0] == "# The article's experiment" and lines[2].startswith("## The article's claims")
    first = lines.index("| the article | found here | why |") + 2
    sparse, bmm, grouped, memory, fault = lines[first : first + 5]
    for line, ratio in ((sparse, 3), (bmm, 2), (grouped, 0.5)):
        assert f"bf16 forward, wall: {ratio:.2f} ({ratio:.2f} to {ratio:.2f}; 3)" in line
        assert f"bf16 forward+backward, GPU busy: {ratio:.2f}" in line
    assert "0 of 3 cases: cublas_loop_1, MegaBlocks grouped, MegaBlocks sparse; 1 of 3 cases: padded_bmm" in memory
    assert "16×1024 h512 E8 k3: all but routing 3.00, products alone 3.00" in sparse
    assert "MegaBlocks sparse clean" in fault
    flops = 2 * SOME[0].assignments * 512 * 1024
    assert f"| block_sparse | 100 ({flops / 1e8:.3g}) |  |" in text
    assert f"| stk | 200 ({flops / 2e8:.3g}) | wrong |" in text
    assert "Of 24 pairs of times with a learned gate 24 are settled" in text


def test_the_published_report_has_both_runs(written, tmp_path, without_pictures):
    whole, _, _ = written
    (tmp_path / "article").mkdir()
    (tmp_path / "article" / "article.json").write_text(json.dumps(whole))
    alone = report.publish(tmp_path, tmp_path / "article.md").read_text()
    assert "claims, with the packages" not in alone
    (tmp_path / "article_peers").mkdir()
    of_packages(tmp_path / "article_peers")
    text = report.publish(tmp_path, tmp_path / "article.md").read_text()
    assert text.index("## The article's claims") < text.index("## What is measured") < text.index("## Runs\n")
    assert "## Runs with the packages" in text and "](article_peers/ratio_bf16.png)" in text
