"""The adapters of other libraries: through stand-ins with their interfaces, and without any package."""

import sys

import pytest
import stand_ins
from article import cases, peers

PEERS = list(peers.FACTORIES)
CASE = cases.Case(5, 20, 24, experts=4, top_k=2, expert_hidden=40)


def refusal_of(name, dtype):
    if name in ("SonicMoE", "liger-kernel"):
        return "has gated experts alone"
    return "bf16 alone" if name.startswith("MegaBlocks grouped") and dtype != "bf16" else None


@pytest.mark.parametrize("routing", cases.ROUTINGS)
@pytest.mark.parametrize("dtype", cases.TYPES)
def test_layers_and_gradients_are_those_of_the_problem(monkeypatch, rows_of, dtype, routing):
    stand_ins.install(monkeypatch)
    rows = rows_of(peers.FACTORIES, dtype, routing, CASE)
    for name in PEERS:
        row = rows[name, "forward+backward"]
        if refusal := refusal_of(name, dtype):
            assert row["status"] == "unsupported" and refusal in row["reason"]
            continue
        assert row["status"] == "ok", row["reason"]
        gate = "dgate" if routing == "learned" else "dlogits"
        assert row["errors"].keys() == {"y", "dx", "dup", "ddown", gate} and row["ms"] > 0


def test_padding(monkeypatch, rows_of):
    stand_ins.install(monkeypatch)
    rows = rows_of(peers.FACTORIES, "bf16", "uneven", CASE)
    counts = cases.counts_of(CASE, "uneven")
    padding = {name: rows[name, "forward"]["padding_rows"] for name in PEERS if not refusal_of(name, "bf16")}
    assert padding.pop("Tutel") == 4 * max(counts) - CASE.assignments
    for name in ("MegaBlocks sparse", "MegaBlocks sparse lean"):
        assert padding.pop(name) == sum(-(-count // 128) * 128 for count in counts) - CASE.assignments
    assert set(padding.values()) == {0}


def test_a_peers_own_refusal(monkeypatch, rows_of):
    stand_ins.install(monkeypatch)
    rows = rows_of(peers.FACTORIES, "bf16", "even", cases.Case(2, 8, 12, experts=2, top_k=1, expert_hidden=20))
    assert rows["MegaBlocks sparse", "forward"]["status"] == "unsupported"
    assert "triton" in rows["MegaBlocks sparse", "forward"]["reason"]
    assert rows["MegaBlocks grouped", "forward"]["status"] == "ok"


def test_the_missing_package_is_named(monkeypatch, rows_of):
    packages = {"ScatterMoE": "scattermoe", "SonicMoE": "sonicmoe", "liger-kernel": "liger_kernel"}
    packages |= {"MegaBlocks sparse": "stk", "MegaBlocks sparse lean": "stk", "Tutel": "tutel", "FastMoE": "fmoe"}
    packages |= {"MegaBlocks grouped": "grouped_gemm", "MegaBlocks grouped lean": "grouped_gemm"}
    packages |= {"transformers": "transformers"}
    assert set(packages) == set(PEERS)
    for package in set(packages.values()):
        monkeypatch.setitem(sys.modules, package, None)  # as if not installed, should it be
    rows = rows_of(peers.FACTORIES, "bf16", "even", CASE)
    for name, package in packages.items():
        for which in cases.PASSES:
            assert rows[name, which]["status"] == "missing"
            assert rows[name, which]["reason"] == f"package {package} is not installed"
