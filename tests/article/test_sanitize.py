"""The run under compute-sanitizer: what it runs, and what it makes of the tool's output."""

import json
import os

import pytest
from article import __main__ as command
from article import sanitize

LOG = """========= COMPUTE-SANITIZER
anabranch-engine: auto

anabranch-engine: cublas_loop
========= Invalid __global__ read of size 4 bytes
=========     at kernel+0x10

anabranch-engine: hopper
anabranch-engine: hopper: RuntimeError: something else
anabranch-engine: done
========= ERROR SUMMARY: 1 error
"""


def test_findings_of_the_sanitizer():
    found = sanitize.findings(LOG)
    assert list(found) == ["auto", "cublas_loop", "hopper"] and found["auto"] == []
    assert found["cublas_loop"] == ["Invalid __global__ read of size 4 bytes"]
    assert found["hopper"] == ["RuntimeError: something else"]
    cut = sanitize.findings(LOG.split("anabranch-engine: hopper")[0])
    assert cut["cublas_loop"][-1] == "the process ended here"


def test_what_runs_under_the_tool(capsys):
    assert sanitize.steps("cpu", "fp32", [], factor=2, sizes=(2, 16, 8, 4, 2)) == 0
    said = capsys.readouterr().out
    assert "anabranch-engine: plain loop\n" in said and said.endswith("anabranch-engine: done\n")


# Says what the tool would, then runs the program that follows its options.
TOOL = """#!/usr/bin/env bash
echo "========= COMPUTE-SANITIZER"
while [[ $1 == --* ]]; do shift; [[ $1 == --* ]] || shift; done
"$@" || exit
echo "========= ERROR SUMMARY: 0 errors"
exit "${TOOL_EXIT:-0}"
"""


@pytest.fixture
def tool(tmp_path, monkeypatch):
    path = tmp_path / "bin" / "compute-sanitizer"
    path.parent.mkdir()
    path.write_text(TOOL)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(command.ROOT / "experiments"), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_tool_is_run_and_its_findings_kept(tool, tmp_path, monkeypatch):
    given = ["--sanitize", "--output", str(tmp_path), "--methods", "plain loop", "--types", "fp32", "--device", "cpu"]
    given += ["--cases", "2,16,8,4,2"]
    assert command.main(given) == 0
    records = json.loads((tmp_path / "sanitizer.json").read_text())
    assert [record["tool"] for record in records] == ["memcheck"]
    assert all(record["engines"] == {"plain loop": []} and record["exit_code"] == 0 for record in records)
    assert "COMPUTE-SANITIZER" in (tmp_path / "sanitizer_memcheck.log").read_text()
    monkeypatch.setenv("TOOL_EXIT", "9")
    assert command.main(["--sanitize", "racecheck", *given[1:]]) == 1
    records = json.loads((tmp_path / "sanitizer.json").read_text())
    assert [record["tool"] for record in records] == ["memcheck", "racecheck"]
    assert command.main(given) == 1  # as the tool says now, in place of what it said before
    records = json.loads((tmp_path / "sanitizer.json").read_text())
    assert [(record["tool"], record["exit_code"]) for record in records] == [("racecheck", 9), ("memcheck", 9)]
    assert all(len(record["commit"]) == 40 and isinstance(record["changed"], bool) for record in records)


def test_without_the_tool(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert command.main(["--sanitize", "--output", str(tmp_path)]) == 2
    assert "compute-sanitizer is not installed" in capsys.readouterr().err
