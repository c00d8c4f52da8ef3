"""What is measured: the article's grid, its routings, and the expert ids that realise given counts."""

import dataclasses
import fnmatch
import itertools

import torch

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = ("forward", "forward+backward")
ROUTINGS = ("learned", "even", "uneven")
# The article's own uneven split: rows of 8 experts. Their sum is 524,088, not 64 * 1024 * 8 = 524,288.
ARTICLE_SPLIT = (130759, 78925, 35368, 90425, 1433, 120455, 64589, 2134)

_GRID = (
    *((16, 1024, 512, *pair) for pair in ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4))),
    *((16, 1024, 512, 8, top_k) for top_k in (2, 3, 4, 8)),
    *((8, 2048, 512, experts, 1) for experts in (1, 2, 4)),
    (32, 1024, 512, 8, 8),
    (64, 1024, 512, 8, 8),
    (32, 512, 512, 8, 4),
    (64, 1024, 1024, 8, 3),
    (64, 1024, 4224, 8, 3),
    (64, 1024, 8192, 8, 8),
)
# For question 1: the article's rows as one expert a token, beside equally many and the article's rounder number.
_EQUAL_SUMS = ((1, sum(ARTICLE_SPLIT), 512, 8, 1), (1, 64 * 1024 * 8, 512, 8, 1))
# For machines without a GPU: the same combinations in miniature.
_SMALL_GRID = (
    *((4, 64, 64, *pair) for pair in ((1, 1), (2, 1), (8, 1), (4, 2), (4, 4))),
    *((4, 64, 64, 8, top_k) for top_k in (3, 4, 8)),
    (8, 64, 128, 8, 3),
)
_SMALL_EQUAL_SUMS = ((1, 2048, 64, 8, 1),)


class Impossible(Exception):
    """A case has no such routing; the message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    sequences: int
    length: int
    hidden: int
    experts: int
    top_k: int
    expert_hidden: int

    @property
    def tokens(self):
        return self.sequences * self.length

    @property
    def assignments(self):
        return self.tokens * self.top_k

    @property
    def tuple(self):
        """As --cases names it: sequences,length,hidden,experts,top-k."""
        return f"{self.sequences},{self.length},{self.hidden},{self.experts},{self.top_k}"

    @property
    def label(self):
        return f"{self.sequences}×{self.length} h{self.hidden} E{self.experts} k{self.top_k}"

    def flops(self, step):
        """Of the experts' products alone, without padding: 2 P h n a matrix, three times that with backward."""
        forward = 2 * 2 * self.assignments * self.hidden * self.expert_hidden
        return forward if step == "forward" else 3 * forward


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one set of inputs serves; every method measures both passes of it."""

    case: Case
    dtype: str
    routing: str

    @property
    def name(self):
        return f"{self.case.tuple},{self.case.expert_hidden}/{self.dtype}/{self.routing}"


def grid(factor=2, small=False):
    """Every case of the article; the experts' inner width is `factor` times the hidden size."""
    return [Case(*sizes, expert_hidden=factor * sizes[2]) for sizes in (_SMALL_GRID if small else _GRID)]


def equal_sums(factor=2, small=False):
    return [Case(*sizes, expert_hidden=factor * sizes[2]) for sizes in (_SMALL_EQUAL_SUMS if small else _EQUAL_SUMS)]


def matching(cases, patterns):
    """The cases that any of the patterns names; a pattern is a case's tuple, in which * may stand for numbers."""
    if not patterns:
        return list(cases)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.tuple, pattern) for case in cases):
            known = " ".join(case.tuple for case in cases)
            raise ValueError(f"no case is '{pattern}'; there are: {known}")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.tuple, pattern) for pattern in patterns)]


def units(cases, equal_sum_cases, types, routings):
    """Every unit. Where every token goes to every expert, a learned gate's split is the even one, and measured once.
    Equal sums are about splits alone: a learned gate has none.
    """
    for case, dtype, routing in itertools.product(cases, types, routings):
        if not (routing == "even" and "learned" in routings and case.experts == case.top_k):
            yield Unit(case, dtype, routing)
    for case, dtype, routing in itertools.product(equal_sum_cases, types, routings):
        if routing != "learned":
            yield Unit(case, dtype, routing)


def scaled(shares, total):
    """Whole numbers in proportion to the shares, of that sum: largest remainders are rounded up."""
    whole = sum(shares)
    counts = [total * share // whole for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda e: (-(total * shares[e] % whole), e))
    for expert in by_remainder[: total - sum(counts)]:
        counts[expert] += 1
    return counts


def counts_of(case, routing):
    """Assignments of each expert under a given routing; throws Impossible."""
    if routing == "even":
        return scaled([1] * case.experts, case.assignments)
    if case.experts == case.top_k:
        raise Impossible(f"every token goes to all {case.experts} experts: only the even split exists")
    if len(ARTICLE_SPLIT) % case.experts:
        raise Impossible(f"the article's split of 8 experts cannot be joined into {case.experts}")
    joined = len(ARTICLE_SPLIT) // case.experts  # neighbours of the split become one expert
    shares = [sum(ARTICLE_SPLIT[e * joined : (e + 1) * joined]) for e in range(case.experts)]
    counts = scaled(shares, case.assignments)
    if max(counts) > case.tokens:
        raise Impossible(
            f"an expert would have {max(counts):,} assignments, and there are {case.tokens:,} tokens, "
            "each of which goes to an expert once"
        )
    return counts


def expert_ids(counts, tokens, top_k, generator):
    """Ids [tokens, top_k], distinct in each row, with exactly those counts, each at most `tokens`.

    Experts lie one after another on a line of tokens * top_k places, and place p belongs to token p mod tokens:
    an expert that is no longer than `tokens` meets no token twice. Then tokens are shuffled.
    """
    device = generator.device
    line = torch.repeat_interleave(torch.arange(len(counts), device=device), torch.tensor(counts, device=device))
    shuffled = torch.randperm(tokens, generator=generator, device=device)
    return line.view(top_k, tokens).t()[shuffled].contiguous()
