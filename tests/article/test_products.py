"""The products with a block-sparse matrix: MegaBlocks' through a stand-in of stk, ours where the library is built."""

import sys

import pytest
import stand_ins
import torch
from article import cases, engines, products, registry

CASE = cases.Case(2, 40, 128, experts=4, top_k=2, expert_hidden=256)
STK = f"stk, Triton {registry.versions().get('triton')}"
OURS = [name for name in engines.factories("cpu") if name == "block_sparse"]


class Clock:
    def busy_milliseconds(self, step, count, wanted):
        step()
        assert wanted("_sdd_kernel") and not wanted("topology_kernel")
        return 0.25


@pytest.mark.parametrize("dtype", cases.TYPES)
def test_each_product_is_checked(monkeypatch, small, dtype):
    stand_ins.install(monkeypatch)
    records = list(products.measure(small(dtype, "uneven", CASE), Clock(), OURS))
    assert [(r["method"], r["form"]) for r in records if r["method"] not in OURS] == [
        (STK, form) for form in ("SDD", "DSD", "DSᵀD", "DDS")
    ]
    assert len(records) == 4 + 3 * len(OURS)
    for record in records:
        assert record["status"] == "ok", record
        assert record["ms"] == 0.25 and 0 < record["relative"] <= record["allowed"]


def test_a_wrong_product_and_a_missing_package(monkeypatch, small):
    stand_ins.install(monkeypatch)
    right = stand_ins.dds
    monkeypatch.setattr(stand_ins.PACKAGES["stk"]["ops"], "dds", lambda left, right_: right(left, right_) * 1.02)
    found = {r["form"]: r["status"] for r in products.measure(small("bf16", "even", CASE), Clock(), [])}
    assert found == {"SDD": "ok", "DSD": "ok", "DSᵀD": "ok", "DDS": "wrong"}
    monkeypatch.setitem(sys.modules, "stk", None)
    (record,) = products.measure(small("bf16", "even", CASE), Clock(), [])
    assert record["status"] == "missing" and record["reason"] == "package stk is not installed"


def test_an_expert_without_rows(monkeypatch, small):
    stand_ins.install(monkeypatch)
    problem = small("fp32", "uneven", CASE)
    problem.counts = [0, CASE.assignments, 0, 0]
    assert {r["status"] for r in products.measure(problem, Clock(), OURS)} == {"ok"}
    assert torch.equal(products.Operands(problem).expected("DDS")[0], torch.zeros(256, 128).double())
