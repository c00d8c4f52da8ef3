"""The grid is the article's; splits and the expert ids that realise them are exact."""

import pytest
import torch
from article import cases

# As the article lists them: sequences, length, hidden, experts, top-k.
LISTED = """
16,1024,512,1,1  16,1024,512,2,1  16,1024,512,4,1  16,1024,512,8,1  16,1024,512,2,2  16,1024,512,4,2
16,1024,512,4,4  16,1024,512,8,2  16,1024,512,8,3  16,1024,512,8,4  16,1024,512,8,8
8,2048,512,1,1   8,2048,512,2,1   8,2048,512,4,1
32,1024,512,8,8  64,1024,512,8,8  32,512,512,8,4   64,1024,1024,8,3  64,1024,4224,8,3  64,1024,8192,8,8
"""


def test_the_grid_is_the_articles():
    grid = [case.tuple for case in cases.grid()]
    assert sorted(grid) == sorted(LISTED.split()) and len(set(grid)) == 20
    assert {case.expert_hidden / case.hidden for case in cases.grid()} == {2}
    assert {case.expert_hidden / case.hidden for case in cases.grid(factor=4)} == {4}


def test_every_type_and_routing():
    units = list(cases.units(cases.grid(), cases.equal_sums(), list(cases.TYPES), list(cases.ROUTINGS)))
    every_token_everywhere = [case for case in cases.grid() if case.experts == case.top_k]
    assert len(units) == (20 * 3 - len(every_token_everywhere)) * 3 + 2 * 3 * 2
    assert len({unit.name for unit in units}) == len(units)
    assert not any(unit.routing == "even" and unit.case in every_token_everywhere for unit in units)
    even = list(cases.units(cases.grid(), [], ["bf16"], ["even"]))
    assert [unit.case for unit in even] == cases.grid()


def test_the_articles_split():
    assert cases.ARTICLE_SPLIT == (130759, 78925, 35368, 90425, 1433, 120455, 64589, 2134)
    exact, rounder = cases.equal_sums()
    assert exact.assignments == 524_088 and rounder.assignments == 524_288
    assert tuple(cases.counts_of(exact, "uneven")) == cases.ARTICLE_SPLIT
    assert cases.counts_of(exact, "even") == [65_511] * 8
    assert sum(cases.counts_of(rounder, "uneven")) == 524_288


@pytest.mark.parametrize("routing", ["even", "uneven"])
@pytest.mark.parametrize("case", cases.grid() + cases.grid(small=True), ids=lambda case: case.tuple)
def test_ids_realise_the_counts(case, routing, seed):
    try:
        counts = cases.counts_of(case, routing)
    except cases.Impossible as reason:
        assert routing == "uneven" and case.experts == case.top_k and "only the even split" in str(reason)
        return
    assert sum(counts) == case.assignments and max(counts) <= case.tokens
    if routing == "even":
        assert max(counts) - min(counts) <= 1
    ids = cases.expert_ids(counts, case.tokens, case.top_k, torch.Generator().manual_seed(seed))
    assert ids.shape == (case.tokens, case.top_k)
    assert torch.bincount(ids.flatten(), minlength=case.experts).tolist() == counts
    assert bool((ids.sort(dim=1).values.diff(dim=1) > 0).all())  # distinct in each row


def test_shares_stay_those_of_the_article():
    case = next(case for case in cases.grid() if case.tuple == "64,1024,1024,8,3")
    for count, share in zip(cases.counts_of(case, "uneven"), cases.ARTICLE_SPLIT):
        assert abs(count - case.assignments * share / 524_088) < 1
    four = cases.Case(16, 1024, 512, 4, 1, 1024)
    joined = [130759 + 78925, 35368 + 90425, 1433 + 120455, 64589 + 2134]
    for count, share in zip(cases.counts_of(four, "uneven"), joined):
        assert abs(count - four.assignments * share / 524_088) < 1


def test_splits_that_cannot_be():
    with pytest.raises(cases.Impossible, match="and there are 1,024 tokens"):
        cases.counts_of(cases.Case(1, 1024, 64, 8, 7, 128), "uneven")
    with pytest.raises(cases.Impossible, match="cannot be joined into 3"):
        cases.counts_of(cases.Case(1, 1024, 64, 3, 1, 128), "uneven")


def test_patterns():
    found = cases.matching(cases.grid(), ["16,1024,512,8,*", "64,1024,4224,8,3"])
    assert [case.tuple for case in found] == [f"16,1024,512,8,{k}" for k in (1, 2, 3, 4, 8)] + ["64,1024,4224,8,3"]
    with pytest.raises(ValueError, match="no case is '1,2,3'"):
        cases.matching(cases.grid(), ["1,2,3"])


def test_flops():
    case = cases.Case(2, 3, 5, experts=4, top_k=2, expert_hidden=7)
    assert case.flops("forward") == 2 * 2 * (6 * 2) * 5 * 7
    assert case.flops("forward+backward") == 3 * case.flops("forward")
