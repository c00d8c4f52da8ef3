"""Tools that write tables into pages: what stands there is what their files of results say."""

import json
import re
import runpy

import pytest
from conftest import ROOT

TABLES = [  # tool, page, name, files of results, what of them the table is made of
    ("build_wheels", "docs/site/tried.md", "wheels", ["wheels.json"], lambda found: found["wheels"]),
    ("matrix", "docs/site/tried.md", "compilers", ["matrix.json"], lambda found: found["pairs"]),
    ("first_run", "CONTRIBUTING.md", "first run", ["first_run_before.json", "first_run.json"], lambda found: found),
]


def tool(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return runpy.run_path(str(ROOT / "tools" / name))


@pytest.mark.parametrize("program, page, name, files, part", TABLES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_page_says_what_the_results_do(program, page, name, files, part, monkeypatch):
    results = [ROOT / "benchmarks/results" / file for file in files]
    found = [part(json.loads(path.read_text())) for path in results if path.exists()]
    written = re.search(rf"<!-- {name}: [^>]* -->\n(.*?)<!-- end -->", (ROOT / page).read_text(), re.DOTALL).group(1)
    made = tool(program, monkeypatch)
    head, rows = made["table"](found if len(files) > 1 else found[0])
    expected = [" | ".join(map(str, line)) for line in [head, ["---"] * len(head), *rows]]
    assert written.splitlines() == [f"| {line} |" for line in expected]


def test_tests_that_a_pair_did_not_run_again_stay_as_they_were(monkeypatch):
    made = tool("matrix", monkeypatch)
    pair = {"compiler": "c++", "torch": "3.0.0", "date": "2026-01-02", "built": True, "why": "", "build_seconds": 1}
    older = {**pair, "commit": "aaa", "cpp": {"entries": 7, "suites": [], "failed": []}, "python": {"passed": 5, "failures": []}}
    row = made["completed"]({**pair, "commit": "bbb", "cpp": {"entries": 9, "suites": [], "failed": []}, "python": None}, older)
    (line,) = made["table"]([row])[1]
    assert line[3:] == ["9 CTest entries", "5 passed (at aaa)", "bbb, 2026-01-02"]
    again = made["completed"]({**row, "commit": "ccc", "cpp": None, "python": None}, row)
    assert again["python"]["commit"] == "aaa" and again["cpp"]["commit"] == "bbb"
    assert made["completed"]({**pair, "built": False}, older) == {**pair, "built": False}


@pytest.mark.parametrize(
    "torch, cuda, local", [("2.11.0", "13.0.88", "pt2.11cu130"), ("2.15.1", "", "pt2.15cpu"), ("2.13.0", "13.2", "pt2.13cu132")]
)
def test_the_local_version_names_torch_and_cuda(torch, cuda, local, monkeypatch):
    assert tool("build_wheels", monkeypatch)["local_version"]({"TORCH_VERSION": torch, "CUDA_VERSION": cuda}) == local
