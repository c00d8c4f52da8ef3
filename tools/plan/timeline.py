"""A training step's timeline: compute and communication of every rank of an expert-parallel group."""

import dataclasses

import numpy

import loans
import routing
from network import Fabric, take_turns

# How often data crosses a GPU's memory: indices of the plan; rows around the experts' GEMMs; rows of an
# exchange, read and written. Rough: `calibrate` finds the `copy` that goes with them.
PLAN_PASSES = 10.0
ROW_PASSES = 6.0
GATHER_PASSES = 2.0
# Of the weights of experts: in each product of their rows; as gradients, made and filled in memory that is fresh,
# whether or not they have rows; of one that is lent, at its owner's and at each borrower's, on the way there or back.
GRADIENT_PASSES = 3.0
LENDING_PASSES = 8.0
# Of the tokens' rows where owners and borrowers compute: zeros for tokens that one of both has none of, and their sum.
JOIN_PASSES = 4.0
# Of a token's row and of its attention's, around the dense part: norms, residuals, rotation, projections.
HIDDEN_PASSES = 13.0
ATTENTION_PASSES = 7.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the model lies on the GPUs."""

    gpus: int
    expert_parallel: int  # consecutive GPUs that share one set of experts; the rest is data parallel
    all_to_all: str = "flat"
    overlap: int = 0  # chunks whose rows travel beside products (MoEOptions::overlap); 0: in turn
    balance: str = "off"  # what travels where load is skewed (MoEOptions::balance)


@dataclasses.dataclass
class Event:
    """One stage of a part, on every rank."""

    name: str
    kind: str  # "compute" or "exchange"
    begin: numpy.ndarray
    end: numpy.ndarray


@dataclasses.dataclass
class Prediction:
    layout: Layout
    step: float  # s
    compute: float  # s, of the busiest rank
    exchange: float  # s of exchange that no rank's compute covers, per step
    all_reduce: float  # s of gradients' sums that backward does not cover
    memory: float  # bytes of a GPU
    rank_imbalance: float
    events: list  # of one layer

    @property
    def exposed(self):
        return self.step - self.compute

    def summary(self):
        layout = dataclasses.asdict(self.layout)
        return {
            **layout,
            "data_parallel": self.layout.gpus // self.layout.expert_parallel,
            "step_s": self.step,
            "compute_s": self.compute,
            "exposed_communication_s": self.exposed,
            "exposed_exchange_s": self.exchange,
            "exposed_all_reduce_s": self.all_reduce,
            "memory_bytes": self.memory,
            "rank_imbalance": self.rank_imbalance,
        }


@dataclasses.dataclass
class Work:
    """Tokens that go through experts, to their owners or to borrowers."""

    rows: numpy.ndarray  # [from, to]
    assignments: numpy.ndarray  # [ranks]
    experts: numpy.ndarray  # [ranks] that have any of them
    local: numpy.ndarray  # [ranks] all that are there
    chunks: list  # of [from, to]: each one's part of the rows
    turns: int = 1  # chunks that one after another have each expert, of some ranks' rows
    alone: bool = False  # all ranks compute their own tokens: rows are handed on as they are


def chunks_of(ranks, experts, chunks):
    """What Work has of chunks, as src/exchange/chunks.h cuts them: whole experts, or, of `experts` a rank that are at most
    half as many, blocks of ranks that exchange in turn. Experts have equal rows."""
    experts = max(1, experts)
    blocks = min(max(chunks // experts, 1), ranks)
    if blocks == 1:
        number = max(1, min(chunks, experts))
        return [numpy.full((ranks, ranks), 1 / number)] * number, 1
    block = routing.owners(ranks, blocks)
    turn = (block[:, None] - block[None, :]) % blocks
    return [(turn == number) / experts for _ in range(experts) for number in range(blocks)], blocks


class LayerTimeline:
    """Forward and backward of one layer. Two things a rank does at once: compute, and exchange."""

    def __init__(self, machine, model, layout, chosen, generator, counts=None):
        """`chosen`: of routing.draw_tokens. `counts` [ranks, experts]: assignments of each rank's tokens, where they
        are known, for what is lent."""
        self.machine, self.model, self.layout = machine, model, layout
        self.ranks = layout.expert_parallel
        self.fabric = Fabric(machine, self.ranks)
        self.rows, self.assignments = routing.traffic(chosen, model.experts, model.tokens, self.ranks, generator)
        owner = routing.owners(model.experts, self.ranks)
        local = numpy.bincount(owner, minlength=self.ranks)
        used = numpy.bincount(owner[numpy.unique(chosen)], minlength=self.ranks)
        self.works = [Work(self.rows, self.assignments, used, local, *chunks_of(self.ranks, local.max(), layout.overlap))]
        self.lent = self.borrowed = numpy.zeros(self.ranks)
        self.borrowers = []
        if layout.balance != "off":
            if counts is None:
                counts = routing.counts(chosen, model.experts, model.tokens, self.ranks, generator)
            self._lend(loans.choose(layout.balance, counts, owner, model, machine))
        self.compute_free = numpy.zeros(self.ranks)
        self.exchange_free = numpy.zeros(self.ranks)
        self.busy = numpy.zeros(self.ranks)
        self.events = []

    def _lend(self, loads):
        """Splits the work into that of owners and that of borrowers, whose rows are of one assignment each."""
        self.lent, self.borrowed = loads.lent(), loads.borrowed()
        self.borrowers = [(loads.owner[expert], sorted(ranks)) for expert, ranks in enumerate(loads.borrowers) if ranks]
        if not self.borrowers:
            return
        owned, (all_owned,) = numpy.zeros((self.ranks, self.ranks)), self.works
        rows = owned.copy()
        numpy.add.at(owned.T, loads.owner, loads.left.T)
        for (source, _, borrower), assignments in loads.shares.items():
            rows[source, borrower] += assignments
        before = numpy.zeros_like(owned)
        numpy.add.at(before.T, loads.owner, loads.counts.T)
        left = all_owned.rows * owned / numpy.maximum(before, 1)
        used = numpy.bincount(loads.owner, weights=loads.left.sum(axis=0) > 0, minlength=self.ranks)
        self.works = [
            dataclasses.replace(all_owned, rows=left, assignments=owned.sum(axis=0), experts=used),
            Work(
                rows, rows.sum(axis=0), self.borrowed, self.borrowed, *chunks_of(self.ranks, 1, 0),
                alone=not (rows - numpy.diag(rows.diagonal())).any(),
            ),
        ]
        self.rows, self.assignments = left + rows, loads.computed.astype(float)

    def run(self):
        """(seconds of forward, seconds of both)."""
        self._compute("dense and route", self._dense(1), self.compute_free)
        plan = self._plan("plan", self.compute_free)
        if self.layout.balance != "off":
            counts = numpy.full((self.ranks, self.ranks), 8.0 * self.model.experts)
            plan = self._exchange("counts of all", counts, plan, self.machine.stage, way="flat")
        if self.borrowers:
            for name in ("plan of owners", "plan of borrowers"):
                plan = self._plan(name, plan)
            plan = self._weights("weights", plan, self.model.bytes)
        self._through_experts("", plan, 1)
        forward = max(self.compute_free.max(), self.exchange_free.max())
        self._wait_for(numpy.full(self.ranks, forward))
        if self.model.recompute:
            again = self._compute("dense again", self._dense(1), self.compute_free)
            self._through_experts(" again", again, 1)
            self._wait_for(numpy.maximum(self.compute_free, self.exchange_free))
        self._through_experts(" backward", self.compute_free, 2)
        if self.borrowers:
            ready = numpy.maximum(self.compute_free, self.exchange_free)
            self._wait_for(self._weights("gradients", ready, loans.SUM_BYTES))
        self._compute("dense backward", self._dense(2), numpy.maximum(self.compute_free, self.exchange_free))
        return forward, self.compute_free.max()

    def _wait_for(self, times):
        self.compute_free = self.exchange_free = times

    def _plan(self, name, ready):
        counts = numpy.full((self.ranks, self.ranks), 8.0 * (3 + self.model.experts / self.ranks))
        indices = 8.0 * PLAN_PASSES * (self.model.tokens * self.model.top_k + self.assignments)
        return self._exchange(name, counts, ready, self.machine.stage + indices / self.machine.copy, way="flat")

    def _weights(self, name, ready, element):
        """Lent experts' parameters, in equal parts by way of each rank, to the borrowers; gradients the same way back."""
        size = self.model.expert_parameters * element
        copies = LENDING_PASSES * size * (self.lent + self.borrowed) / self.machine.weight_rate
        parts, wholes = numpy.zeros((2, self.ranks, self.ranks))
        for owner, borrowers in self.borrowers:
            parts[owner] += size / self.ranks
            wholes[:, borrowers] += size / self.ranks
        hops = [parts, wholes] if name == "weights" else [wholes.T, parts.T]
        for hop in hops:
            numpy.fill_diagonal(hop, 0)
            ready = self._exchange(name, hop, ready, self.machine.stage + self._with_turns(copies / 2))
        return ready

    def _through_experts(self, suffix, ready, factor):
        for work in self.works:
            self._through(work, suffix, ready, factor)
            ready = numpy.maximum(self.compute_free, self.exchange_free)
        if self.borrowers:
            rows = JOIN_PASSES * self.model.tokens * self.model.hidden * self.model.bytes
            self._compute(f"owners' and borrowers' rows{suffix}", rows / self.machine.copy, ready)

    def _through(self, work, suffix, ready, factor):
        """Chunks are dispatched one after another, and go back when they are computed. In backward the gradients of the
        weights are found before rows go back, or, with overlap, beside their way."""
        there = self.model.dispatch_bytes or self.model.bytes
        beside = self.layout.overlap > 0
        arrived = []
        for part in work.chunks:
            rows = work.rows * part
            size = rows * self.model.hidden * (there if factor == 1 else self.model.bytes)
            arrived.append(self._exchange(f"dispatch{suffix}", size, ready, self._move(work, rows)))
        waiting = numpy.zeros(self.ranks)  # rows whose part in the weights' gradients is yet to be found
        for number, part in enumerate(work.chunks):
            rows = work.rows * part
            # Of assignments, as of rows.
            share = rows.sum(axis=0) / numpy.maximum(work.rows.sum(axis=0), 1)
            waiting = waiting + share
            last = (number + 1) % work.turns == 0  # of its experts
            found = self._gradients(work, waiting) if factor == 2 and last else 0.0
            seconds = self._products(work, share) + (0.0 if beside else found)
            computed = self._compute(f"experts{suffix}", seconds, arrived[number])
            size = rows.T * self.model.hidden * self.model.bytes
            self._exchange(f"combine{suffix}", size, computed, self._move(work, rows))
            if factor == 2 and last:
                waiting = numpy.zeros(self.ranks)
                if beside:
                    self._compute(f"weights{suffix}", found, computed)

    def _dense(self, factor):
        if not self.model.routed:
            return 0.0
        model = self.model
        passes = HIDDEN_PASSES * model.hidden + ATTENTION_PASSES * model.attention_width
        seconds = model.dense_flops / self.machine.flops + passes * model.bytes / self.machine.copy
        return factor * model.tokens * seconds + self.machine.stage

    def _of_rows(self, work, share, experts):
        """GEMMs of a share [ranks] of the rows through so many experts, and the rows that permutation and activation read
        and write."""
        assignments = work.assignments * share
        moved = ROW_PASSES * assignments * (self.model.hidden + self.model.expert_hidden) * self.model.bytes
        flops = self.model.expert_flops(assignments)
        return flops / self.machine.flops + moved / self.machine.copy + experts * self.machine.expert

    def _passes(self, experts):
        """Over the weights of so many experts."""
        return experts * self.model.expert_parameters * self.model.bytes / self.machine.weight_rate

    def _products(self, work, share):
        """Of a chunk forward, or of dX."""
        experts = work.experts * work.turns / len(work.chunks)
        return self._of_rows(work, share, experts) + self._passes(experts) + self.machine.stage

    def _gradients(self, work, share):
        """Of a chunk's weights, or of all that have come in turns."""
        chunks = len(work.chunks) / work.turns
        return self._of_rows(work, share, work.experts / chunks) + self._passes(GRADIENT_PASSES * work.local / chunks)

    def _move(self, work, rows):
        """Gathering rows [from, to] to send them, or summing those that have come."""
        if self.ranks == 1 or work.alone:
            return 0.0
        moved = GATHER_PASSES * rows.sum(axis=1) * self.model.hidden * self.model.bytes
        return self.machine.stage + moved / self.machine.copy

    def _compute(self, name, seconds, ready):
        begin = numpy.maximum(ready, self.compute_free)
        seconds = self._with_turns(numpy.broadcast_to(seconds, self.ranks))
        end = begin + seconds
        self.compute_free = end
        self.busy += seconds
        self.events.append(Event(name, "compute", begin, end))
        return end

    def _with_turns(self, seconds):
        """The same where ranks share their node's cores."""
        cores = self.machine.cores_per_node
        if not cores:
            return seconds
        nodes = [self.fabric.node == node for node in range(self.fabric.node[-1] + 1)]
        return numpy.concatenate([take_turns(seconds[here], cores) for here in nodes])

    def _exchange(self, name, size, ready, fixed, way=None):
        begin = numpy.maximum(ready, self.exchange_free)
        end = self.fabric.all_to_all(size, begin + fixed, way or self.layout.all_to_all)
        self.exchange_free = end
        self.events.append(Event(name, "exchange", begin, end))
        return end


def memory_of(model, layout, received_rows, assignments):
    """Bytes of the fullest rank: parameters, gradients and optimizer, what forward saves, and what backward of a layer's
    experts takes beside it."""
    experts = model.layers * model.expert_parameters * -(-model.experts // layout.expert_parallel)
    states = (model.replicated_parameters + experts) * (2 * model.bytes + model.optimizer_bytes)
    hidden_values = model.expert_hidden * (2 if model.glu else 1)
    # What enters attention and experts, and both normalised; heads and keys, before and after their norms and positions;
    # what attention gives; values.
    dense = model.tokens * (4 * model.hidden + 3 * model.attention_width + 3 * model.key_width)
    received = received_rows if layout.expert_parallel > 1 else 0  # a rank alone has them at its experts' door
    saved = received * model.hidden + assignments * hidden_values + dense
    # Gradients of outputs and of what was saved, and the activations once more.
    backward = assignments * (model.hidden + hidden_values + model.expert_hidden)
    if model.recompute:
        return states + (model.layers * model.tokens * model.hidden + saved + backward) * model.bytes
    return states + (model.layers * saved + backward) * model.bytes


class Planner:
    """Steps of one model on one machine; a layout's layers are simulated once."""

    def __init__(self, machine, model, chosen, seed=0, counts=None):
        """`chosen`: experts [tokens, top_k] of sampled tokens (routing.draw_tokens), of as many layers as are
        simulated, for all the model has. `counts`: as LayerTimeline has them."""
        self.machine, self.model, self.chosen, self.seed, self.counts = machine, model, chosen, seed, counts
        self._layers = {}

    def predict(self, layout):
        """A step on `layout.gpus` GPUs."""
        model, machine = self.model, self.machine
        layers = self._simulate(layout)
        scale = model.layers / len(layers)
        head = 2.0 * model.tokens * model.vocabulary * model.hidden / machine.flops
        forward = scale * sum(entry.forward for entry in layers) + head
        both = scale * sum(entry.both for entry in layers) + 3 * head
        compute = scale * sum(entry.timeline.busy.max() for entry in layers) + 3 * head
        reduce = self._all_reduce(layout)
        # A layer's gradients travel while the layers before it run backward; the first layer's cannot.
        hidden_behind = (both - forward) * (model.layers - 1) / model.layers
        exposed_reduce = max(reduce / model.layers, reduce - hidden_behind)
        first = layers[0].timeline
        return Prediction(
            layout=layout,
            step=both + exposed_reduce,
            compute=compute,
            exchange=both - compute,
            all_reduce=exposed_reduce,
            memory=memory_of(model, layout, first.rows.sum(axis=0).max(), first.assignments.max()),
            rank_imbalance=float(first.assignments.max() / first.assignments.mean()),
            events=first.events,
        )

    def layouts(self, gpus, overlaps=(1, 2, 4), balance="off"):
        """Predictions of all layouts: those that fit into memory first, then by step time."""
        found = [
            self.predict(dataclasses.replace(layout, balance=balance))
            for layout in layouts_of(self.machine, self.model, gpus, overlaps)
        ]
        return sorted(found, key=lambda prediction: (prediction.memory > self.machine.memory, prediction.step))

    def _simulate(self, layout):
        key = (layout.expert_parallel, layout.all_to_all, layout.overlap, layout.balance)
        if key not in self._layers:
            generator = numpy.random.default_rng(self.seed)
            self._layers[key] = []
            for chosen in self.chosen:
                timeline = LayerTimeline(self.machine, self.model, layout, chosen, generator, self.counts)
                self._layers[key].append(_Layer(timeline, *timeline.run()))
        return self._layers[key]

    def _all_reduce(self, layout):
        """Seconds of the sums of all gradients, dense ones over all GPUs, experts' over their replicas."""
        model, machine = self.model, self.machine
        fabric = Fabric(machine, 1)
        replicas = layout.gpus // layout.expert_parallel
        spread = max(1, min(replicas, machine.gpus_per_node // layout.expert_parallel))
        local = -(-model.experts // layout.expert_parallel)
        dense = model.replicated_parameters * model.bytes
        experts = model.layers * model.expert_parameters * local * model.bytes
        seconds = fabric.all_reduce(dense, layout.gpus, min(layout.gpus, machine.gpus_per_node))
        return seconds + fabric.all_reduce(experts, replicas, spread)


@dataclasses.dataclass
class _Layer:
    timeline: LayerTimeline
    forward: float
    both: float


def layouts_of(machine, model, gpus, overlaps):
    """Every layout worth a look: whole nodes, or parts of a node, that divide the GPUs."""
    for group in range(1, min(gpus, model.experts) + 1):
        whole = group % machine.gpus_per_node == 0 or machine.gpus_per_node % group == 0
        if gpus % group or not whole:
            continue
        ways = ("flat", "hierarchical") if group > machine.gpus_per_node else ("flat",)
        for way in ways:
            for overlap in overlaps if group > 1 else (0,):
                yield Layout(gpus, group, way, overlap)
