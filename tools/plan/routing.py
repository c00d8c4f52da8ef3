"""Where tokens go: from a skew or from what a run has recorded."""

import json
from pathlib import Path

import numpy

from machine import Refused

SAMPLES = 32768  # tokens that stand for all: their own unevenness is a few per cent of a rank's load


def zipf(experts, skew, generator):
    """Popularity [experts], the r-th of a random order ∝ r^−skew."""
    places = generator.permutation(experts) + 1.0
    weights = places**-skew
    return weights / weights.sum()


def from_metrics(path, experts):
    """Popularity of each layer [layers, experts] in the last step that a metrics.jsonl of train_lm has."""
    load = None
    try:
        for line in Path(path).read_text().splitlines():
            load = json.loads(line).get("load", load)
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from error
    if load is None or any(len(layer) != experts for layer in load):
        raise Refused(f"{path}: expected a load for each of {experts} experts")
    return numpy.asarray(load)


def draw_tokens(popularity, top_k, generator):
    """Experts [SAMPLES, top_k] of sampled tokens, distinct within a token (Gumbel's trick)."""
    noise = generator.gumbel(size=(SAMPLES, len(popularity)))
    with numpy.errstate(divide="ignore"):
        scores = numpy.log(popularity) + noise
    return numpy.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]


def owners(experts, ranks):
    """Rank of each expert: contiguous blocks, the first experts % ranks one longer."""
    small, more = divmod(experts, ranks)
    return numpy.repeat(numpy.arange(ranks), [small + (rank < more) for rank in range(ranks)])


def traffic(chosen, experts, tokens, ranks, generator, deduplicate=True):
    """(rows [ranks, ranks] from each to each, assignments [ranks]) of `tokens` tokens on each rank, that choose
    as the sampled ones of draw_tokens do.

    A token crosses to a rank once, however many of its experts live there, unless `deduplicate` is False.
    """
    chosen = owners(experts, ranks)[chosen]
    assigned = numpy.bincount(chosen.ravel(), minlength=ranks) / SAMPLES
    if deduplicate:
        reached = numpy.zeros((SAMPLES, ranks), dtype=bool)
        numpy.put_along_axis(reached, chosen, True, axis=1)
        share = reached.mean(axis=0)
        rows = generator.binomial(tokens, numpy.broadcast_to(share, (ranks, ranks))).astype(float)
    else:
        rows = generator.poisson(tokens * numpy.broadcast_to(assigned, (ranks, ranks))).astype(float)
    return rows, assigned * tokens * ranks


def counts(chosen, experts, tokens, ranks, generator):
    """Assignments [ranks, experts] of `tokens` tokens on each rank, that choose as the sampled ones do."""
    share = numpy.bincount(chosen.ravel(), minlength=experts) / SAMPLES
    return generator.binomial(tokens, numpy.broadcast_to(share, (ranks, experts)))
