"""The adapters of other libraries: through stand-ins with their interfaces, and without any package."""

import sys

import pytest
import stand_ins
from article import cases, peers

PEERS = list(peers.FACTORIES)
CASE = cases.Case(5, 20, 24, experts=4, top_k=2, expert_hidden=40)


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("dtype", cases.TYPES)
def test_layers_and_gradients_are_those_of_the_problem(monkeypatch, rows_of, dtype, routing):
    stand_ins.install(monkeypatch)
    rows = rows_of(peers.FACTORIES, dtype, routing, CASE)
    for name in PEERS:
        row = rows[name, "forward+backward"]
        if (name, dtype) == ("SonicMoE", "fp32"):
            assert row["status"] == "unsupported" and "bf16 and fp16" in row["reason"]
            continue
        assert row["status"] == "ok", row["reason"]
        gate = "dgate" if routing == "learned" else "dlogits"
        assert row["errors"].keys() == {"y", "dx", "dup", "ddown", gate} and row["ms"] > 0


def test_padding(monkeypatch, rows_of):
    stand_ins.install(monkeypatch)
    rows = rows_of(peers.FACTORIES, "bf16", "uneven", CASE)
    counts = cases.counts_of(CASE, "uneven")
    padding = {name: rows[name, "forward"]["padding_rows"] for name in PEERS}
    assert padding.pop("Tutel") == 4 * max(counts) - CASE.assignments
    assert padding.pop("MegaBlocks sparse") == sum(-(-count // 128) * 128 for count in counts) - CASE.assignments
    assert set(padding.values()) == {0}


def test_a_peers_own_refusal(monkeypatch, rows_of):
    stand_ins.install(monkeypatch)
    rows = rows_of(peers.FACTORIES, "bf16", "even", cases.Case(2, 8, 12, experts=2, top_k=1, expert_hidden=20))
    assert rows["MegaBlocks sparse", "forward"]["status"] == "unsupported"
    assert "triton" in rows["MegaBlocks sparse", "forward"]["reason"]
    assert rows["MegaBlocks grouped", "forward"]["status"] == "ok"


def test_the_missing_package_is_named(monkeypatch, rows_of):
    packages = {"MegaBlocks grouped": "megablocks", "ScatterMoE": "scattermoe", "SonicMoE": "sonicmoe"}
    packages |= {"MegaBlocks sparse": "megablocks", "Tutel": "tutel", "FastMoE": "fmoe"}
    assert set(packages) == set(PEERS)
    for package in set(packages.values()):
        monkeypatch.setitem(sys.modules, package, None)  # as if not installed, should it be
    rows = rows_of(peers.FACTORIES, "bf16", "even", CASE)
    for name, package in packages.items():
        for which in cases.PASSES:
            assert rows[name, which]["status"] == "missing"
            assert rows[name, which]["reason"] == f"package {package} is not installed"
