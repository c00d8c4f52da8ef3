"""Turns of methods at a unit: in the first each is checked against the oracle; in every one both passes are timed."""

import contextlib
import dataclasses
import gc
import itertools
import math
import re
import statistics
import time
import warnings

import torch

from . import cases
from .methods import Missing, Unsupported
from .oracle import Oracle
from .problem import Problem
from .stages import profile

# Beyond this one turn tells as much as more.
SLOW_MS = 300.0
# Beyond this all that a step sets up is lost in it, and one step tells as much as more.
VERY_SLOW_MS = 1000.0
# Steps before those that are timed, in a turn that has time for more than one.
WARM_UP = 3
# A step that is no longer than this may take the time of its host: how long the GPU is busy in it is measured beside.
HOST_BOUND_MS = 5.0
TRACED_STEPS = 5


class DeviceLost(Exception):
    """The GPU's context is gone, and with it the process's use of the GPU."""


@dataclasses.dataclass(frozen=True)
class Settings:
    device: str
    seed: int = 1
    seconds: float = 0.1  # of measuring, for a method and pass of a unit
    rounds: int = 3  # turns over which these are spread
    memory_limit: int | None = None  # bytes


def steps_within(time_for, ms, least=1):
    """How many steps of so many milliseconds there is time for."""
    return min(max(int(time_for / max(ms, 1e-3)), least), 50)


def covered(spans):
    """How much of a line the spans (begin, end) cover together."""
    total, reached = 0, -math.inf
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


class Clock:
    """Times and peak memory of steps on one device."""

    def __init__(self, device):
        self.cuda = torch.device(device).type == "cuda"
        self.peaks_are_free = self.cuda  # to see them costs a step no time

    def milliseconds(self, step, count):
        """Of each of `count` steps, that follow one another."""
        if not self.cuda:
            times = []
            for _ in range(count):
                start = time.perf_counter()
                step()
                times.append((time.perf_counter() - start) * 1e3)
            return times
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]

    def busy_milliseconds(self, step, count, wanted=lambda kernel: True):
        """Of a step, the mean of some: the time in which the GPU does anything, on one stream or several, or runs a
        kernel whose name is `wanted`."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what the profiler keeps from one cycle to the next
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(count):
                    step()
                torch.cuda.synchronize()
        events = profile.profiler.kineto_results.events()
        on_gpu = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()]
        return covered((e.start_ns(), e.end_ns()) for e in on_gpu if wanted(e.name())) / 1e6 / count

    def peak_bytes(self, step):
        """Most bytes of tensors alive at once in a step beyond those alive before it, and the step's milliseconds."""

        def timed_step():
            start = time.perf_counter()
            step()
            if self.cuda:
                torch.cuda.synchronize()
            return (time.perf_counter() - start) * 1e3

        if self.cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            ms = timed_step()
            return torch.cuda.max_memory_allocated() - before, ms
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on what the profiler keeps from one cycle to the next
            with torch.profiler.profile(profile_memory=True) as profile:
                ms = timed_step()
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        return max(itertools.accumulate((change for _, change in changes), initial=0)), ms

    def alive(self):
        """Whether the device still answers."""
        try:
            if self.cuda:
                torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def allocated(self):
        return torch.cuda.memory_allocated() if self.cuda else 0

    def clear(self):
        """Gives back memory that is held for later."""
        if self.cuda:
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def memory_limit(self, limit, others):
        """At most `limit` bytes beside `others`; on a CPU, Subject.peak sees to it."""
        if limit is None or not self.cuda:
            yield
            return
        self.clear()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit + others) / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def why(error):
    """(status, reason) of what a method threw."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
    if isinstance(error, Missing):
        return "missing", first
    if isinstance(error, Unsupported) or "does not take" in first:
        return "unsupported", first
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(r"out of memory|ALLOC_FAILED", str(error)):
        return "out of memory", first
    return "failed", f"{type(error).__name__}: {first}"


class Subject:
    """One method at one problem, in one turn; `passes`: of which."""

    def __init__(self, name, factory, problem, clock, settings, passes=cases.PASSES):
        self.name, self.factory, self.problem, self.clock, self.settings = name, factory, problem, clock, settings
        self.x = problem.x.detach().requires_grad_()
        self.method = None
        self.status = dict.fromkeys(passes, "ok")
        self.reason, self.errors = {}, {}
        self.times = {step: [] for step in cases.PASSES}
        self.busy = dict.fromkeys(cases.PASSES)  # milliseconds of the GPU's, where they are measured
        self.peaks, self.padding = {}, None

    def make(self):
        if self.method is None:
            self.method = self.factory(self.problem)
            self.padding = self.method.padding()
        return self.method

    def parameter_bytes(self):
        return sum(leaf.nbytes for leaf in self.method.leaves)

    def release(self):
        self.clear_gradients()
        self.method = None

    def clear_gradients(self):
        for tensor in (self.x, *(self.method.leaves if self.method else ())):
            tensor.grad = None

    def forward(self):
        with torch.no_grad():
            return self.make()(self.x)

    def forward_backward(self):
        self.make()(self.x).backward(self.problem.dy)
        self.clear_gradients()

    def step(self, which):
        return self.forward if which == "forward" else self.forward_backward

    def check_forward(self, oracle, expected):
        """After check_backward, which warms up what there is to warm up."""
        y = None

        def step():
            nonlocal y
            y = self.forward()

        self.checked(step, "forward", warm=self.status["forward+backward"] == "ok")
        self.note("y", expected[self.method.coarse_logits]["y"].compare(oracle.chosen(y)))
        self.judge("forward", ["y"])

    def check_backward(self, oracle, expected):
        """The output, and every gradient."""
        method = self.make()
        expected = expected[method.coarse_logits]
        of_some_tokens = {}
        if method.tunes:  # by the gradients of all tokens
            self.forward_backward()
        if "dgate" in expected and oracle.tokens is not None:  # a sum over tokens: of those that the oracle has
            method(self.x).backward(oracle.masked_dy())
            of_some_tokens["dgate"] = method.gradients(oracle.units)["dgate"]
            self.clear_gradients()
        y = None

        def step():
            nonlocal y
            out = method(self.x)
            y = oracle.chosen(out.detach())
            out.backward(self.problem.dy)

        self.checked(step, "forward+backward", warm=method.tunes or bool(of_some_tokens))
        actual = {"y": y, **method.gradients(oracle.units), "dx": oracle.chosen(self.x.grad)}
        if actual.get("dlogits") is not None:
            actual["dlogits"] = oracle.chosen(actual["dlogits"])
        actual.update(of_some_tokens)
        self.clear_gradients()
        for name, values in expected.items():
            self.note(name, values.compare(actual.get(name)))
        self.judge("forward+backward", list(expected))

    def checked(self, step, which, warm):
        """Runs a step that is checked. A very slow one that is warm is thereby measured too."""
        if not self.clock.peaks_are_free:
            step()
            return
        peak, ms = self.peak(step)
        if warm and ms > VERY_SLOW_MS:
            self.peaks[which] = peak
            self.times[which].append(ms)

    def judge(self, which, names):
        worst = max(names, key=lambda name: self.errors[name].used)
        error = self.errors[worst]
        if not error.right:
            self.status[which] = "wrong"
            self.reason[which] = f"{worst} errs by {error.error:.3g}, {error.used:.3g} times what is allowed"

    def note(self, name, comparison):
        """The worse of what was found for a result that is checked twice."""
        before = self.errors.get(name)
        if before is None or not comparison.used <= before.used:
            self.errors[name] = comparison

    def measure_first(self, which):
        """Memory and time of a pass, unless its check has shown them. The step that shows the memory warms up."""
        if not self.times[which]:
            step = self.step(which)
            self.peaks[which], ms = self.peak(step)
            self.times[which] = [ms] if self.clock.peaks_are_free and ms > VERY_SLOW_MS else self.timed(step, ms)

    def measure_again(self, which):
        step = self.step(which)
        self.times[which] = self.timed(step, self.clock.milliseconds(step, 1)[0])

    def timed(self, step, about):
        """Milliseconds of each of as many steps, that take `about` so many, as a turn has time for."""
        time_for = self.settings.seconds * 1e3 / self.settings.rounds
        count = steps_within(time_for, about)
        if count > 1:  # the first of a turn take longer
            count = steps_within(time_for, min(self.clock.milliseconds(step, min(count, WARM_UP))))
        return self.clock.milliseconds(step, count)

    def measure_busy(self, which):
        """After a pass was timed, if it is one that may wait for its host; with a learned gate, as a step has one."""
        learned = self.problem.unit.routing == "learned"
        if self.clock.cuda and learned and statistics.median(self.times[which]) <= HOST_BOUND_MS:
            self.busy[which] = self.clock.busy_milliseconds(self.step(which), TRACED_STEPS)

    def peak(self, step):
        """Bytes of x, dy, the parameters, and most of all else alive in a step; and its milliseconds."""
        peak, ms = self.clock.peak_bytes(step)
        peak += self.parameter_bytes() + self.problem.bytes_of_inputs()
        limit = self.settings.memory_limit
        if limit is not None and peak > limit:
            raise MemoryError(f"{peak:,} bytes are needed, {limit:,} are allowed")
        return peak, ms

    def found(self, which):
        """What a turn finds of a pass."""
        status, times = self.status[which], self.times[which]
        ms = statistics.median(times) if status == "ok" else None
        return dict(status=status, reason=self.reason.get(which), ms=ms, steps=len(times), busy_ms=self.busy[which])

    def rows(self):
        """Of a first turn."""
        for which in self.status:
            found = self.found(which)
            ms, busy = found["ms"], found["busy_ms"]
            yield row_of(
                self.problem.unit,
                which,
                self.name,
                self.settings,
                **found,
                turns=[ms] if ms else [],
                busy_turns=[busy] if busy else [],
                tflops=ms and self.problem.case.flops(which) / ms / 1e9,
                peak_bytes=self.peaks[which] if found["status"] == "ok" else None,
                padding_rows=self.padding,
                errors={name: dataclasses.asdict(error) for name, error in self.errors.items()},
            )

    def turns(self):
        """Of a later turn: what is added to the rows of the first."""
        for which in self.status:
            yield turn_of(self.problem.unit, which, self.name, self.settings, **self.found(which))


def row_of(unit, which, method, settings, **values):
    empty = dict(ms=None, tflops=None, peak_bytes=None, padding_rows=None, errors={}, steps=0, turns=[])
    empty.update(busy_ms=None, busy_turns=[])
    about = {**dataclasses.asdict(unit.case), "assignments": unit.case.assignments}
    about.update(unit=unit.name, dtype=unit.dtype, routing=unit.routing, method=method)
    return {**about, "pass": which, "memory_limit": settings.memory_limit, **empty, **values}


def turn_of(unit, which, method, settings, **values):
    """What a later turn adds to the row_of a first one."""
    about = {"unit": unit.name, "method": method, "pass": which, "memory_limit": settings.memory_limit}
    return {**about, "ms": None, "busy_ms": None, "steps": 0, **values}


def with_turn(row, turn):
    """A row of a first turn, and of what followed, with what a later one adds."""
    row = {**row, "steps": row["steps"] + turn["steps"]}
    if turn["status"] != "ok":
        return {**row, "status": turn["status"], "reason": turn["reason"], "ms": None, "tflops": None}
    turns = [*row["turns"], turn["ms"]]
    ms = statistics.median(turns)
    row = {**row, "turns": turns, "ms": ms, "tflops": row["tflops"] * row["ms"] / ms}
    if turn.get("busy_ms"):
        row["busy_turns"] = [*row.get("busy_turns", []), turn["busy_ms"]]
        row["busy_ms"] = statistics.median(row["busy_turns"])
    return row


def wants_turn(row, turn):
    """Whether a row is to have the turn of this number, counted from 0."""
    return row["status"] == "ok" and len(row["turns"]) <= turn and row["ms"] <= SLOW_MS


class UnitTurn:
    """
    One turn of some methods at a unit: `factories` by name, `passes` of those that do not measure both.
    `begun(name)` is told before a method is used.
    """

    def __init__(self, unit, factories, settings, begun=lambda name: None, passes=None):
        self.settings, self.clock, self.begun = settings, Clock(settings.device), begun
        self.problem = problem = Problem(unit, settings.device, settings.seed)
        self.subjects = [
            Subject(name, make, problem, self.clock, settings, (passes or {}).get(name, cases.PASSES))
            for name, make in factories.items()
        ]
        self.inputs = problem.bytes_of_inputs()
        self.oracle, self.expected = None, {}  # what is expected, by coarse_logits

    def expect(self, coarse_logits):
        """Computes what is expected of such methods, once; never under a method's memory limit."""
        if coarse_logits not in self.expected:
            self.expected[coarse_logits] = Oracle(self.problem, coarse_logits=coarse_logits).expected()
            self.clock.clear()

    def first(self):
        """Rows of each method after its turn; DeviceLost carries those of the method that lost it."""
        self.oracle = Oracle(self.problem)
        self.expect(False)

        def check_and_measure(subject):
            for which, check in (("forward+backward", subject.check_backward), ("forward", subject.check_forward)):
                self.use(subject, which, check, self.oracle, self.expected)
            for which in cases.PASSES:
                self.use(subject, which, subject.measure_first, which)
                self.use(subject, which, subject.measure_busy, which)

        yield from self.each_in_turn(check_and_measure, Subject.rows)

    def later(self):
        """What each method's turn adds; DeviceLost as above."""

        def measure(subject):
            for which in subject.status:
                self.use(subject, which, subject.measure_again, which)
                self.use(subject, which, subject.measure_busy, which)

        yield from self.each_in_turn(measure, Subject.turns)

    def each_in_turn(self, take_turn, records):
        """The `records` of each method after it took its turn."""
        for subject in self.subjects:
            self.begun(subject.name)
            try:
                take_turn(subject)
            except DeviceLost as lost:
                raise DeviceLost(list(records(subject))) from lost.__cause__
            yield from records(subject)
            subject.release()

    def stages(self):
        """(name, what profile finds) of each method that is right, from a trace of one forward and backward."""
        for subject in self.subjects:
            if subject.status["forward+backward"] == "ok":
                subject.make()
                subject.forward_backward()
                yield subject.name, profile(subject.forward_backward, self.clock.cuda)
                subject.release()

    def use(self, subject, which, action, *arguments):
        """Lets a method do something of a pass, unless it has failed at it; what it throws becomes its row."""
        if subject.status[which] != "ok":
            return
        try:
            with self.clock.memory_limit(self.settings.memory_limit, self.clock.allocated() - self.inputs):
                subject.make()
            if self.oracle:
                self.expect(subject.method.coarse_logits)
            others = self.clock.allocated() - self.inputs - subject.parameter_bytes()
            with self.clock.memory_limit(self.settings.memory_limit, others):
                action(*arguments)
        except Exception as error:
            self.failed(subject, which, error)
        subject.clear_gradients()
        if "out of memory" in subject.status.values():
            subject.release()
            self.clock.clear()

    def failed(self, subject, which, error):
        status, reason = why(error)
        error.__traceback__ = None  # its frames hold tensors
        gc.collect()
        # What has no output has no gradients.
        for failed in subject.status if which == "forward" or status in ("missing", "unsupported") else (which,):
            subject.status[failed], subject.reason[failed] = status, reason
        if status == "failed" and not self.clock.alive():
            for other, its_status in subject.status.items():
                if its_status == "ok":
                    subject.status[other], subject.reason[other] = status, f"the device was lost: {reason}"
            raise DeviceLost from error
