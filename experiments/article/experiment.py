"""Which units are measured in which order, and what of them is still missing."""

import contextlib
import os
import sys
import time

import scaling  # launch/scaling.py: provenance
import torch
from tqdm import tqdm

from . import cases, measure, products, rates, registry, store

# Where question 5 looks: sizes at which stages differ, with the learned gate and in the first type.
STAGE_CASES = ("16,1024,512,8,3", "64,1024,512,8,8", "64,1024,1024,8,3", "64,1024,4224,8,3", "8,64,128,8,3")
# Sustained FLOP/s by type, and seconds of a method's turns besides: from which estimates start.
FIRST_GUESS = {
    "cuda": ({"bf16": 3e14, "fp16": 3e14, "fp32": 3e13}, 0.1),
    "cpu": (dict.fromkeys(cases.TYPES, 3e10), 0.2),
}
ENDED = {"status": "failed", "reason": "the process ended during it, more than once"}


def units_of(arguments):
    factor, small = arguments.expert_hidden_factor, arguments.small
    grid, sums = cases.grid(factor, small), cases.equal_sums(factor, small)
    chosen = cases.matching(grid + sums, arguments.cases)
    grid, sums = ([case for case in chosen if case in part] for part in (grid, sums))
    return list(cases.units(grid, sums, arguments.types, arguments.routings))


def factories_of(arguments):
    factories = registry.methods_for(arguments.device, arguments.peers)
    unknown = set(arguments.methods) - set(factories)
    if unknown:
        raise ValueError(f"no method is '{sorted(unknown)[0]}'; there are: {', '.join(factories)}")
    return {name: make for name, make in factories.items() if not arguments.methods or name in arguments.methods}


def provenance(arguments, number):
    """scaling's, and what this run was."""
    cuda = arguments.device == "cuda"
    about = scaling.provenance(["launch/article.sh", *arguments.argv])
    on_cpu = f"{about['processor']}, {torch.get_num_threads()} threads"
    return {
        **about,
        "run": number,
        "device": torch.cuda.get_device_name() if cuda else on_cpu,
        "cuda": torch.version.cuda if cuda else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "versions": registry.versions(),
        "small": arguments.small,
        "seed": arguments.seed,
        "expert_hidden_factor": arguments.expert_hidden_factor,
    }


class Experiment:
    def __init__(self, arguments):
        self.arguments = arguments
        self.store = store.Store(arguments.output)
        self.factories = factories_of(arguments)
        self.units = units_of(arguments)
        self.settings = measure.Settings(
            arguments.device, arguments.seed, arguments.seconds, arguments.rounds, arguments.memory_limit
        )
        self.run = len(self.store.of("run"))
        self.store.add("run", **provenance(arguments, self.run))
        self.ended = self.store.ended_the_process()
        self.correction = dict.fromkeys(cases.TYPES, 1.0)  # measured over estimated time
        self.left = set()  # units that the budget left out, in a turn or more

    def measure(self):
        """Turn by turn over all cases, so that what drifts meets them all alike; cheap ones first."""
        if self.arguments.memory_limit is None and not self.arguments.peers:
            self.measure_rates()
        units = sorted(self.units, key=lambda unit: self.estimate(unit, 1, first=True))
        quiet = {} if sys.stderr.isatty() else {"mininterval": 10, "ncols": 100}
        with tqdm(total=self.settings.rounds * len(units), unit="turn", **quiet) as bar:
            for turn in range(self.settings.rounds):
                for unit in units:
                    bar.set_postfix_str(unit.name, refresh=False)
                    if turn == 0:
                        self.first_turn(unit)
                    else:
                        self.later_turn(unit, turn)
                    bar.update()
        if self.left:
            print(f"{len(self.left)} cases did not fit the budget; the same command measures them")

    def measure_rates(self):
        """Once for each type."""
        known = {rate["dtype"] for rate in self.store.of("rate")}
        for dtype in self.arguments.types:
            if dtype not in known:
                options = (dtype, self.arguments.expert_hidden_factor, self.arguments.small, self.arguments.seconds)
                for rate in list(rates.measure(self.arguments.device, *options)):
                    self.store.add("rate", run=self.run, **rate)

    def missing(self, unit):
        """Factories of the methods that lack a row at the unit."""
        limit, known = self.settings.memory_limit, self.store.steps()
        factories = {}
        for name, make in self.factories.items():
            rows = [known.get((unit.name, name, limit, which)) for which in cases.PASSES]
            repeat = self.arguments.again and any(row and row["status"] in store.REPEATABLE for row in rows)
            if all(rows) and not repeat:
                continue
            if (unit.name, name, limit) in self.ended:
                self.add_rows(unit, [name], **ENDED)
            else:
                factories[name] = make
        return factories

    def add_rows(self, unit, names, **values):
        """The same row for both passes of these methods."""
        for name in names:
            for which in cases.PASSES:
                self.store.add("step", run=self.run, **measure.row_of(unit, which, name, self.settings, **values))

    def unfinished(self, unit, turn):
        """{method: passes} that have had fewer than `turn` + 1 turns at the unit, and whose steps are worth more."""
        limit, known = self.settings.memory_limit, self.store.steps()
        passes = {}
        for name in self.factories:
            rows = {which: known.get((unit.name, name, limit, which)) for which in cases.PASSES}
            lacking = [which for which, row in rows.items() if row and measure.wants_turn(row, turn)]
            if lacking and (unit.name, name, limit) in self.ended:
                for which in lacking:
                    self.store.add("turn", run=self.run, **measure.turn_of(unit, which, name, self.settings, **ENDED))
            elif lacking:
                passes[name] = lacking
        return passes

    def estimate(self, unit, count, first):
        """Seconds that a turn of `count` methods takes."""
        rate, besides = FIRST_GUESS[self.arguments.device]
        # The checks, a first step of each pass, and one that is timed; later one to warm up, and one that is timed.
        steps = 4 + 4 / 3 if first else 8 / 3
        step = unit.case.flops("forward+backward") / rate[unit.dtype]
        timing = 2 * self.settings.seconds / self.settings.rounds
        return count * (steps * step + timing + besides) * self.correction[unit.dtype]

    def fits(self, unit, count, first):
        seconds = self.estimate(unit, count, first)
        if self.arguments.until and time.time() + seconds > self.arguments.until:
            self.left.add(unit.name)
            return False
        return True

    @contextlib.contextmanager
    def timed_turn(self, unit, count, first):
        """Learns how long a turn takes; goes on in a new process if the device is lost."""
        seconds, start = self.estimate(unit, count, first), time.time()
        try:
            yield
        except measure.DeviceLost as lost:
            for row in lost.args[0]:
                self.store.add("step" if first else "turn", run=self.run, **row)
            self.restart(lost)
        self.correction[unit.dtype] *= ((time.time() - start) / seconds) ** 0.5

    def begun(self, unit):
        limit = self.settings.memory_limit
        return lambda method: self.store.add("begun", unit=unit.name, method=method, memory_limit=limit)

    def first_turn(self, unit):
        factories = self.missing(unit)
        try:
            if unit.routing != "learned":
                cases.counts_of(unit.case, unit.routing)
        except cases.Impossible as reason:
            self.add_rows(unit, factories, status="impossible", reason=str(reason))
            return
        if not factories or not self.fits(unit, len(factories), first=True):
            return
        with self.timed_turn(unit, len(factories), first=True):
            try:
                self.measure_first(unit, factories)
            except (torch.OutOfMemoryError, MemoryError) as error:  # of the inputs, or of the oracle
                reason = f"before any method had its turn: {error}".splitlines()[0]
                self.add_rows(unit, factories, status="out of memory", reason=reason)

    def measure_first(self, unit, factories):
        measurement = measure.UnitTurn(unit, factories, self.settings, self.begun(unit))
        for row in measurement.first():
            self.store.add("step", run=self.run, **row)
        first_type = unit.dtype == self.arguments.types[0] and unit.routing == "learned"
        if first_type and unit.case.tuple in STAGE_CASES and self.settings.memory_limit is None:
            for name, (times, longest) in measurement.stages():
                self.store.add("stages", run=self.run, unit=unit.name, method=name, ms=times, longest=longest)
            if self.arguments.peers and measurement.clock.cuda:
                engines = [name for name in ("block_sparse", "hopper") if name in self.factories]
                for record in products.measure(measurement.problem, measurement.clock, engines):
                    self.store.add("product", run=self.run, unit=unit.name, **record)

    def later_turn(self, unit, turn):
        passes = self.unfinished(unit, turn)
        if not passes or not self.fits(unit, len(passes), first=False):
            return
        names = list(passes)
        start = turn % len(names)  # so that none is always the first
        factories = {name: self.factories[name] for name in names[start:] + names[:start]}
        with self.timed_turn(unit, len(passes), first=False):
            measurement = measure.UnitTurn(unit, factories, self.settings, self.begun(unit), passes)
            for added in measurement.later():
                self.store.add("turn", run=self.run, **added)

    def restart(self, lost):
        """A lost device needs a new process, which goes on where this one was."""
        print(f"\nthe device is lost to this process ({lost.__cause__}); starting anew", file=sys.stderr, flush=True)
        argv = [word for word in self.arguments.argv if not word.startswith("--until")]
        if self.arguments.until:
            argv.append(f"--until={self.arguments.until}")
        os.execv(sys.executable, [sys.executable, "-m", "article", *argv])
