"""What travels in a step of skewed load: tokens, or the weights of their experts. The rules of src/balance, which
tests/plan holds beside what the library says that it has done."""

import dataclasses

import numpy

from machine import Refused

# What "shadow" lends by, whatever the machine can do (src/balance/rates.cpp): FLOP/s, bytes/s.
NOMINAL_CPU, NOMINAL_GPU = (5e10, 1e9), (4e14, 2e11)
SUM_BYTES = 4  # of a gradient's element on its way back, unrounded


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds."""

    assignment: float  # an expert's products of one row, forward and backward
    row: float  # of each link it takes: a row there and its result back, forward and backward
    expert: float  # of the owner's link and of each borrower's: an expert's weights there, and its gradients back


def costs_of(model, ranks, rates):
    flops, bandwidth = rates
    weights = (model.bytes + SUM_BYTES) * model.expert_parameters * (ranks - 1) / ranks
    return Costs(3 * model.expert_flops(1) / flops, 2 * model.hidden * model.bytes / bandwidth, weights / bandwidth)


class Loads:
    """What every rank computes and moves in a step, of which expert after expert is lent."""

    def __init__(self, counts, owner):
        """`counts` [ranks, experts] assignments of each rank's tokens; `owner` [experts]."""
        self.counts, self.owner = counts, owner
        self.left = self.counts.copy()  # those that owners compute
        self.shares = {}  # (source, expert, borrower): assignments
        self.ranks, self.experts = self.counts.shape
        away = self.counts * (numpy.arange(self.ranks)[:, None] != owner)
        self.computed = self._of_owners(self.counts.sum(axis=0))
        self.moved = away.sum(axis=1) + self._of_owners(away.sum(axis=0))
        self.borrowers = [set() for _ in owner]

    def _of_owners(self, of_experts):
        return numpy.bincount(self.owner, weights=of_experts, minlength=self.ranks).astype(numpy.int64)

    def lend(self, expert, source, borrower, wanted):
        """Up to so many of a rank's tokens go to a borrower; returns how many do."""
        owner = self.owner[expert]
        given = min(wanted, self.left[source, expert])
        if given == 0:
            return 0
        self.borrowers[expert].add(borrower)
        self.left[source, expert] -= given
        for rank, more in ((owner, -given), (borrower, given)):
            self.computed[rank] += more
            if rank != source:
                self.moved[[source, rank]] += more
        key = (source, expert, borrower)
        self.shares[key] = self.shares.get(key, 0) + given
        return given

    def lent(self):
        """[ranks] experts of each owner that others have borrowed."""
        return self._of_owners([len(borrowers) > 0 for borrowers in self.borrowers])

    def borrowed(self):
        """[ranks] experts."""
        ranks = [rank for borrowers in self.borrowers for rank in borrowers]
        return numpy.bincount(numpy.asarray(ranks, dtype=int), minlength=self.ranks)

    def forecast(self, costs):
        """Seconds of the fullest rank's products, of the fullest link's rows, and of weights that travel."""
        travelling = self.lent().max() + self.borrowed().max()
        return self.computed.max() * costs.assignment + self.moved.max() * costs.row + travelling * costs.expert

    def least_seconds(self, costs):
        """Of a step that lends anything."""
        return self.computed.sum() / self.ranks * costs.assignment + 2 * costs.expert


def _best_beginning(counts, owner, costs, take):
    """Those of the lendings `take` makes, one after another until it returns False, that make a step shortest."""
    loads = Loads(counts, owner)
    without = least = loads.forecast(costs)
    if loads.least_seconds(costs) > 0.95 * without:
        return loads
    steps = best = 0
    while take(loads, steps):
        steps += 1
        seconds = loads.forecast(costs)
        if seconds < least:
            least, best = seconds, steps
    loads = Loads(counts, owner)
    for step in range(best if least <= 0.95 * without else 0):
        take(loads, step)
    return loads


def shadows(counts, owner, costs):
    """Experts by falling load go to all ranks, each of which computes its own tokens."""
    by_load = numpy.argsort(-counts.sum(axis=0), kind="stable")

    def take(loads, step):
        if step == loads.experts:
            return False
        expert = by_load[step]
        for rank in range(loads.ranks):
            if rank != owner[expert]:
                loads.lend(expert, rank, rank, loads.left[rank, expert])
        return True

    return _best_beginning(counts, owner, costs, take)


def _lend_to_the_emptiest(loads, most):
    """False where no rank computes more than `most` times the mean."""
    fullest, emptiest = int(loads.computed.argmax()), int(loads.computed.argmin())
    total = loads.computed.sum()
    mean = total // loads.ranks
    wanted = min(loads.computed[fullest] - mean, mean - loads.computed[emptiest])
    if loads.computed[fullest] * loads.ranks <= most * total or wanted <= 0:
        return False
    expert = int(numpy.where(loads.owner == fullest, loads.left.sum(axis=0), -1).argmax())
    others = [rank for rank in range(loads.ranks) if rank != fullest]
    for source in [emptiest, *others, fullest]:  # the owner's own last: they need not travel
        wanted -= loads.lend(expert, source, emptiest, wanted)
    return True


def replicas(counts, owner):
    """The fullest rank lends the expert of which it computes most to the emptiest one, until they are even."""
    loads = Loads(counts, owner)
    while _lend_to_the_emptiest(loads, 1.05):
        pass
    return loads


def gathered(counts, owner, group):
    """Within groups of so many ranks no token travels; those for another group's experts go to their rank's place in it."""
    loads = Loads(counts, owner)
    for expert, rank in enumerate(owner):
        for source in range(loads.ranks):
            borrower = rank - rank % group + source % group
            if borrower != rank:
                loads.lend(expert, source, borrower, loads.left[source, expert])
    return loads


def cheapest(counts, owner, costs):
    """Of shadows, beginnings of replicas and gatherings the one that is foreseen to be the shortest."""
    best = shadows(counts, owner, costs)
    plain = Loads(counts, owner)
    most = 0.95 * plain.forecast(costs)
    if plain.least_seconds(costs) > most:
        return best
    others = [_best_beginning(counts, owner, costs, lambda loads, _: _lend_to_the_emptiest(loads, 1))]
    others += [gathered(counts, owner, group) for group in range(2, plain.ranks + 1) if plain.ranks % group == 0]
    for other in others:
        seconds = other.forecast(costs)
        if seconds <= most and seconds < best.forecast(costs):
            best = other
    return best


def choose(balance, counts, owner, model, machine):
    """What MoEOptions::balance `balance` lends. "auto" by the rates of `machine`, of whose ranks several are on nodes
    that their rows leave or do not."""
    counts = numpy.asarray(counts)
    ranks = len(counts)
    if balance == "off":
        return Loads(counts, owner)
    if balance == "shadow":
        nominal = NOMINAL_CPU if machine.cores_per_node else NOMINAL_GPU
        return shadows(counts, owner, costs_of(model, ranks, nominal))
    if balance == "replicas":
        return replicas(counts, owner)
    if balance == "auto":
        link = machine.network if ranks > machine.gpus_per_node else machine.node
        return cheapest(counts, owner, costs_of(model, ranks, (machine.flops, link.bandwidth)))
    return gathered(counts, owner, _group_of(balance, ranks))


def _group_of(balance, ranks):
    name, _, number = balance.partition(":")
    group = int(number) if number.isdecimal() else ranks if balance == "gather" else 0
    if name != "gather" or group < 1 or ranks % group:
        raise Refused(f"--balance {balance}: expected off, shadow, replicas, gather, gather:N of a divisor of {ranks}, or auto")
    return group
