"""launch/scaling.py: which points it runs, what it keeps, and what it says of them.

ANABRANCH_STEP names the built benchmark_step, for one small real study.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, executable

STEP = Path(os.environ.get("ANABRANCH_STEP", ROOT / "build/release/benchmarks/benchmark_step"))

# Ten times the tokens take ten times as long, and two ranks 1.25 times as long as one; reading a rank's experts takes
# as many milliseconds an expert as EXPERT_MS says. Exits 3 for the numbers of experts in the file `failing`.
PROGRAM = f"""#!{sys.executable}
import json, os, pathlib, sys
words = sys.argv[1:]
given = dict(zip((word.lstrip("-").replace("-", "_") for word in words[::2]), words[1::2]))
ranks, experts, tokens = int(os.environ["RANKS"]), int(given["experts"]), int(given["tokens"])
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(f"{{ranks}} {{experts}} {{given['top_k']}} {{given['skew']}} {{tokens}}\\n")
if str(experts) in (here / "failing").read_text().split():
    sys.exit("out of luck")
stages = "route plan dispatch experts combine dispatch_backward experts_backward combine_backward".split()
step = tokens * 0.1 * (1 + (ranks - 1) / 4) + float(os.environ.get("EXPERT_MS", 0)) * experts / ranks
pathlib.Path(given["json"]).write_text(json.dumps(dict(
    ranks=int(os.environ.get("STARTED", ranks)), nodes=[f"n{{r // 2}}" for r in range(ranks)],
    tokens_per_rank=tokens, hidden=int(given["hidden"]), expert_hidden=int(given["expert_hidden"]),
    experts=experts, top_k=int(given["top_k"]), skew=float(given["skew"]), rounds=int(given["rounds"]),
    threads=1, torch="2", device=given["device"], dtype=given["dtype"], step_ms=step, stage_ms={{stage: step / 8 for stage in stages}},
    link_bytes=[[0 if i == j else 1000 for j in range(ranks)] for i in range(ranks)],
    assignments=[100 + 50 * (r == 0) for r in range(ranks)], expert_imbalance=1.5)))
"""


@pytest.fixture
def study(tmp_path):
    executable(tmp_path / "step", PROGRAM)
    (tmp_path / "failing").write_text("")

    def run(*arguments, expect=0, started=None):
        launcher = "env RANKS={ranks}" + (f" STARTED={started}" if started else "")
        command = [sys.executable, ROOT / "launch/scaling.py", "--output", tmp_path / "out"]
        command += ["--program", tmp_path / "step", "--launcher", launcher, *arguments]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == expect, result.stdout + result.stderr
        return result.stdout + result.stderr

    run.folder = tmp_path
    run.output = tmp_path / "out"
    run.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return run


SMALL = ["--ranks", "1,2,4", "--experts", "4", "--top-k", "1,2", "--skew", "0,1.5", "--tokens", "100"]


def test_the_grid(study):
    study(*SMALL)
    weak = {(r, 4 * r, k, s, 100) for r in (1, 2, 4) for k in (1, 2) for s in ("0.0", "1.5")}
    strong = {(r, 16, k, s, 400 // r) for r in (1, 2, 4) for k in (1, 2) for s in ("0.0", "1.5")}
    expected = sorted(f"{r} {e} {k} {s} {t}" for r, e, k, s, t in [*weak, *strong])
    assert sorted(study.calls()) == expected
    check_tables_and_report(study)


def check_tables_and_report(study):
    rows = list(csv.DictReader(open(study.output / "results.csv")))
    assert len(rows) == 24
    row = next(r for r in rows if (r["scaling"], r["ranks"], r["top_k"], r["skew"]) == ("weak", "4", "1", "0.0"))
    assert float(row["step_ms"]) == pytest.approx(17.5)
    assert float(row["tokens_per_second"]) == pytest.approx(400 / 17.5e-3)
    # Ranks 0, 1 and 2, 3 share a node: 4 of the 12 links are within one.
    assert (row["bytes_within_nodes"], row["bytes_between_nodes"]) == ("4000", "8000")
    assert float(row["rank_imbalance"]) == pytest.approx(150 / 112.5)
    records = json.loads((study.output / "results.json").read_text())
    assert all(len(record["provenance"]["commit"]) in (0, 40) for record in records)
    assert all("step" in record["provenance"]["command"] for record in records)
    report = (study.output / "report.md").read_text()
    assert "| weak | 4 | 16 | 1 | 0 | off | 25 | 17.5 | 22.86 | 0.57 | 62% |" in report
    for name in ("weak", "weak_stages", "strong", "strong_stages", "links", "imbalance"):
        assert f"({name}.png)" in report
        assert (study.output / f"{name}.png").stat().st_size > 5000


def efficiencies(study, scaling):
    lines = (study.output / "report.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| scaling |")).strip("| ").split(" | ")
    rows = [dict(zip(header, line.strip("| ").split(" | "), strict=True)) for line in lines if line.startswith(f"| {scaling} |")]
    assert len({row["assignments an expert"] for row in rows}) == 1, rows
    return [row["efficiency"] for row in rows]


def test_efficiency_compares_ranks_whose_experts_have_the_same_work(study, monkeypatch):
    """A machine that scales perfectly, on which a step is mostly reading the experts' weights: fewer experts a rank
    are no better scaling."""
    monkeypatch.setenv("EXPERT_MS", "100")
    study("--ranks", "1,2,4", "--experts", "4", "--top-k", "1", "--skew", "0", "--tokens", "1", "--scaling", "weak")
    assert efficiencies(study, "weak") == ["1.00"] * 3


def test_points_without_another_to_compare_with_have_no_efficiency(study):
    """As in a study of one number of experts on any number of ranks, which was called weak scaling."""
    for ranks, experts in ((1, 8), (2, 4), (4, 2)):
        study("--ranks", ranks, "--experts", experts, "--top-k", "1", "--skew", "0", "--tokens", "100", "--scaling", "weak")
    report = (study.output / "report.md").read_text()
    assert report.count("| weak |") == 3 and report.count("| – |") == 3


def test_tokens_that_travel_beside_weights_that_do(study):
    options = ["--ranks", "1,2", "--experts", "4", "--top-k", "1", "--skew", "1", "--scaling", "weak"]
    study(*options, "--balance", "off,auto")
    rows = list(csv.DictReader(open(study.output / "results.csv")))
    assert sorted((row["ranks"], row["balance"]) for row in rows) == [(r, b) for r in "12" for b in ("auto", "off")]
    assert efficiencies(study, "weak") == ["1.00", "0.80"] * 2
    (old,) = study.output.glob("points/weak-r1-*-flat-cpu-*.json")
    record = json.loads(old.read_text())
    del record["point"]["balance"]
    old.write_text(json.dumps(record))
    study(*options)  # all there already, one of them from before there was a choice
    assert len(study.calls()) == 4


def test_a_study_on_gpus(study):
    study("--ranks", "2", "--experts", "4", "--top-k", "1", "--skew", "0", "--device", "cuda", "--dtype", "bf16")
    (record, _) = json.loads((study.output / "results.json").read_text())
    assert (record["device"], record["dtype"]) == ("cuda", "bf16")
    assert "One MoE layer in bf16" in (study.output / "report.md").read_text()
    assert all("-cuda-bf16" in file.name for file in (study.output / "points").iterdir())


def test_it_goes_on_where_it_was(study):
    options = ["--ranks", "1,2", "--experts", "4", "--top-k", "1,2", "--skew", "0", "--scaling", "weak"]
    study(*options)
    assert len(study.calls()) == 4
    gone = next((study.output / "points").glob("weak-r2*"))
    gone.unlink()
    study(*options)
    assert len(study.calls()) == 5 and gone.exists()


def test_several_jobs_fill_one_folder(study):
    for ranks in ("1", "2"):
        study("--ranks", ranks, "--largest", "2", "--experts", "4", "--top-k", "1", "--skew", "0")
    rows = list(csv.DictReader(open(study.output / "results.csv")))
    assert [(r["scaling"], r["ranks"], r["tokens"]) for r in rows] == [
        ("strong", "1", "1024"),
        ("strong", "2", "512"),
        ("weak", "1", "512"),
        ("weak", "2", "512"),
    ]


def test_a_failed_point_is_named_and_tried_again(study):
    (study.folder / "failing").write_text("8")
    options = ["--ranks", "1", "--experts", "4,8", "--top-k", "1", "--skew", "0", "--scaling", "weak"]
    output = study(*options, expect=1)
    assert "weak-r1-e8" in output and "out of luck" in output and "1 points failed" in output
    assert len(json.loads((study.output / "results.json").read_text())) == 1
    (study.folder / "failing").write_text("")
    study(*options)
    assert len(json.loads((study.output / "results.json").read_text())) == 2


def test_a_launcher_that_starts_other_ranks(study):
    output = study("--ranks", "2", "--experts", "4", "--top-k", "1", "--skew", "0", expect=1, started=1)
    assert "started 1 ranks instead of 2" in output


def test_top_k_above_experts_is_no_point(study):
    study("--ranks", "1", "--experts", "2", "--top-k", "2,4", "--skew", "0", "--scaling", "weak")
    assert study.calls() == ["1 2 2 0.0 512"]


@pytest.mark.parametrize("wrong", [["--ranks", "0"], ["--ranks", "two"], ["--skew", "-1"], ["--scaling", "linear"]])
def test_what_it_refuses(study, wrong):
    study(*wrong, expect=2)
    assert "there is no" in study("--program", "missing", expect=2)
    assert "no points" in study("--report-only", expect=1)


needs_step = pytest.mark.skipif(
    not STEP.exists() or not shutil.which("mpirun"), reason="benchmark_step is not built"
)


def real_study(folder, *more):
    """Records of benchmark_step on small layers."""
    command = [sys.executable, ROOT / "launch/scaling.py", "--output", folder, "--program", STEP]
    command += ["--experts", "5", "--top-k", "2", "--tokens", "40", "--hidden", "16"]
    command += ["--expert-hidden", "24", "--rounds", "2", "--scaling", "weak", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, timeout=200, env=environment)
    return json.loads((folder / "results.json").read_text())


@needs_step
def test_a_real_study(tmp_path):
    records = real_study(tmp_path, "--ranks", "1,2", "--skew", "0,2")
    assert [(r["ranks"], r["skew"]) for r in records] == [(1, 0), (2, 0), (1, 2), (2, 2)]
    for record in records:
        # Every token is assigned twice, and its row crosses at most once each way, for x, dy, y and dx.
        assert sum(record["assignments"]) == 80 * record["ranks"]
        crossing = sum(map(sum, record["link_bytes"]))
        assert 0 <= crossing <= 4 * 40 * record["ranks"] * 16 * 4
        assert (crossing > 0) == (record["ranks"] > 1)
    assert records[2]["expert_imbalance"] > records[0]["expert_imbalance"]


@needs_step
def test_rows_of_half_the_bytes(tmp_path):
    (half,) = real_study(tmp_path / "bf16", "--ranks", "2", "--skew", "0", "--dtype", "bf16")
    (whole,) = real_study(tmp_path / "fp32", "--ranks", "2", "--skew", "0")
    assert half["dtype"] == "bf16" and half["expert_load"] == whole["expert_load"]
    assert [2 * count for row in half["link_bytes"] for count in row] == sum(whole["link_bytes"], [])
