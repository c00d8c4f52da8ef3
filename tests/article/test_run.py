"""The command, whole, on the CPU; with the library's engines where ANABRANCH_PYTHON_PACKAGE names their folder."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from article import __main__ as command
from conftest import ROOT

PACKAGE = os.environ.get("ANABRANCH_PYTHON_PACKAGE", "")
QUICK = ["--device", "cpu", "--seconds", "1e-3", "--rounds", "1", "--types", "bf16"]
CASES = ["--cases", "8,64,128,8,3", "1,2048,64,8,1"]


def test_a_small_run(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), *QUICK, "--peers", "--methods", "plain loop,Tutel,FastMoE", *CASES]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "There is no GPU here: a small grid on the CPU." in said and "article.md" in said
    whole = json.loads((tmp_path / "article.json").read_text())
    plain = [row for row in whole["rows"] if row["method"] == "plain loop"]
    assert len(plain) == 2 * (3 + 2) and all(row["status"] == "ok" for row in plain)
    peers = {row["method"]: row["status"] for row in whole["rows"] if row["method"] in ("Tutel", "FastMoE")}
    assert peers == {"Tutel": "missing", "FastMoE": "missing"}
    assert [record["method"] for record in whole["stages"]] == ["plain loop"]
    stages = whole["stages"][0]["ms"]
    assert all(stages[name] > 0 for name in ("routing", "permutation", "GEMM", "activation", "combination"))
    assert whole["runs"][0]["command"].startswith("launch/article.sh --output")
    text = (tmp_path / "article.md").read_text()
    assert "This is the small grid" in text and "package tutel is not installed" in text
    goes_on(tmp_path, arguments)


def goes_on(folder, arguments):
    """A second time nothing is measured; and a report can be had without measuring."""
    before = (folder / "rows.jsonl").read_text()
    assert command.main(arguments) == 0
    added = (folder / "rows.jsonl").read_text().removeprefix(before).splitlines()
    assert [json.loads(line)["kind"] for line in added] == ["run"]
    (folder / "article.csv").unlink()
    assert command.main(["--output", str(folder), "--report-only"]) == 0 and (folder / "article.csv").exists()


def test_the_launcher(tmp_path):
    """Through launch/article.sh, as a person calls it; with the library's engines where they are built."""
    paths = os.pathsep.join(filter(None, [PACKAGE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    launcher = [ROOT / "launch/article.sh", "--no-build", "--output", tmp_path, *QUICK]
    run = subprocess.run(
        [*launcher, *CASES[:2]], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "article.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"ok"}, [row["reason"] for row in rows if row["reason"]]
    names = {row["method"] for row in rows}
    engines = {"auto", "cpu", "padded_bmm", "block_diagonal", "block_sparse", "torch_grouped_mm"}
    assert "plain loop" in names and (engines <= names or not Path(PACKAGE, "anabranch").exists() or not PACKAGE)
    help_text = subprocess.run([launcher[0], "--help"], capture_output=True, text=True, check=True, timeout=100).stdout
    for word in ("--budget", "--memory-limit", "--sanitize", "--peers", "--publish", "--no-build"):
        assert word in help_text


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--cases", "1,2,3,4,5"], "no case is '1,2,3,4,5'"),
        (["--methods", "magic"], "no method is 'magic'"),
        (["--types", "int8"], "expected some of bf16,fp16,fp32"),
        (["--memory-limit", "much"], "'much' is no size such as 16GiB"),
        (["--budget", "0"], "'0' is no number above 0"),
        (["--report-only"], "nothing has been measured"),
    ],
)
def test_what_it_refuses(tmp_path, capsys, wrong, message):
    try:
        code = command.main(["--output", str(tmp_path), "--device", "cpu", *wrong])
    except SystemExit as refused:  # argparse's own
        code = refused.code
    assert code == 2 and message in capsys.readouterr().err
