"""What a unit's rows say: times and memory of what is right, and a row for whatever goes wrong."""

import functools
import math

import pytest
import torch
from article import cases, experiment, measure, methods
from conftest import SMALL


class Failing(methods.PlainLoop):
    """Right in forward; throws in backward."""

    error = RuntimeError("no luck")

    def experts(self, x, weights, ids):
        y = super().experts(x, weights, ids)
        if y.requires_grad:
            y.register_hook(self.throw)
        return y

    def throw(self, _gradient):
        raise self.error


def failing_with(error):
    return type("Failing", (Failing,), {"error": error})


def throwing(error):
    def make(_problem):
        raise error

    return make


def test_a_right_method(rows_of):
    rows = rows_of({"plain": methods.PlainLoop}, seconds=0.01)
    assert set(rows) == {("plain", which) for which in cases.PASSES}
    for which in cases.PASSES:
        row = rows["plain", which]
        assert row["status"] == "ok" and row["ms"] > 0 and row["steps"] >= 1 and row["padding_rows"] == 0
        assert row["turns"] == [row["ms"]]
        assert row["tflops"] == pytest.approx(SMALL.flops(which) / row["ms"] / 1e9)
        assert row["assignments"] == SMALL.assignments
    inputs = 2 * SMALL.tokens * SMALL.hidden * 4
    weights = 2 * SMALL.experts * SMALL.hidden * SMALL.expert_hidden * 4
    forward, both = (rows["plain", which]["peak_bytes"] for which in cases.PASSES)
    assert inputs + weights < forward < both
    assert both > inputs + 2 * weights  # gradients


def test_one_fails_and_the_others_are_measured(rows_of):
    methods_ = {
        "missing": throwing(methods.Missing("package megablocks is not installed")),
        "refuses": throwing(methods.Unsupported("only bf16")),
        "engine": throwing(RuntimeError("grouped GEMM: the engine x does not take Float weights of 3 x 3")),
        "memory": throwing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")),
        "broken": throwing(AttributeError("no such thing")),
        "plain": methods.PlainLoop,
    }
    rows = rows_of(methods_)
    found = {name: (rows[name, "forward"]["status"], rows[name, "forward+backward"]["status"]) for name in methods_}
    assert found == {
        "missing": ("missing", "missing"),
        "refuses": ("unsupported", "unsupported"),
        "engine": ("unsupported", "unsupported"),
        "memory": ("out of memory", "out of memory"),
        "broken": ("failed", "failed"),
        "plain": ("ok", "ok"),
    }
    assert rows["missing", "forward"]["reason"] == "package megablocks is not installed"
    assert rows["broken", "forward"]["reason"] == "AttributeError: no such thing"


@pytest.mark.parametrize(
    "error, status",
    [(torch.OutOfMemoryError("CUDA out of memory"), "out of memory"), (RuntimeError("no luck"), "failed")],
)
def test_what_fails_in_backward_has_a_forward(rows_of, error, status):
    rows = rows_of({"half": failing_with(error), "plain": methods.PlainLoop})
    assert rows["half", "forward"]["status"] == "ok" and rows["half", "forward"]["ms"] > 0
    assert rows["half", "forward+backward"]["status"] == status and rows["half", "forward+backward"]["ms"] is None
    assert rows["plain", "forward+backward"]["status"] == "ok"


def test_a_memory_limit(rows_of):
    free = rows_of({"plain": methods.PlainLoop})
    forward, both = (free["plain", which]["peak_bytes"] for which in cases.PASSES)
    rows = rows_of({"plain": methods.PlainLoop}, memory_limit=(forward + both) // 2)
    assert rows["plain", "forward"]["status"] == "ok"
    row = rows["plain", "forward+backward"]
    assert row["status"] == "out of memory" and row["ms"] is None and "are allowed" in row["reason"]


def test_rows_come_after_each_methods_turn(seed):
    """So what ends the process takes only the methods whose turn is not over."""
    begun = []
    unit, settings = cases.Unit(SMALL, "fp32", "learned"), measure.Settings("cpu", seed, seconds=1e-3, rounds=2)
    rows = measure.UnitTurn(unit, dict.fromkeys("abc", methods.PlainLoop), settings, begun.append).first()
    assert [next(rows)["method"] for _ in range(2)] == ["a", "a"]
    assert begun == ["a"]
    assert [row["method"] for row in rows] == list("bbcc") and begun == list("abc")


def test_a_later_turn_adds_to_the_rows(rows_of, seed):
    rows = rows_of(dict.fromkeys("ab", methods.PlainLoop))
    unit, settings = cases.Unit(SMALL, "fp32", "learned"), measure.Settings("cpu", seed, seconds=1e-3, rounds=2)
    factories = {"b": methods.PlainLoop, "a": failing_with(RuntimeError("no luck"))}
    added = list(measure.UnitTurn(unit, factories, settings, passes={"b": ["forward"]}).later())
    assert [(turn["method"], turn["pass"]) for turn in added] == [("b", "forward"), *(("a", w) for w in cases.PASSES)]
    after = {key: measure.with_turn(rows[key], turn) for turn in added if (key := (turn["method"], turn["pass"]))}
    row, before, turn = after["b", "forward"], rows["b", "forward"], added[0]
    assert row["turns"] == [before["ms"], turn["ms"]] and row["steps"] == before["steps"] + turn["steps"]
    assert row["ms"] == pytest.approx((before["ms"] + turn["ms"]) / 2)
    assert row["tflops"] == pytest.approx(SMALL.flops("forward") / row["ms"] / 1e9)
    assert row["errors"] == before["errors"] and row["peak_bytes"] == before["peak_bytes"]
    failed = after["a", "forward+backward"]
    assert failed["status"] == "failed" and failed["ms"] is None and "no luck" in failed["reason"]
    assert after["a", "forward"]["status"] == "ok"


def test_the_median_of_all_turns(rows_of, monkeypatch):
    monkeypatch.setattr(measure.Clock, "milliseconds", lambda self, step, count: [5.0, 1.0, 100.0])
    row = rows_of({"plain": methods.PlainLoop}, rounds=3)["plain", "forward"]
    assert row["steps"] == 3 and row["ms"] == 5.0 and row["turns"] == [5.0]
    for ms in (90.0, 4.0):
        row = measure.with_turn(row, {"status": "ok", "reason": None, "ms": ms, "steps": 2})
    assert row["steps"] == 7 and row["ms"] == 5.0 and row["turns"] == [5.0, 90.0, 4.0]
    assert row["tflops"] == pytest.approx(SMALL.flops("forward") / 5.0 / 1e9)


def test_the_first_steps_of_a_turn_are_not_timed(rows_of, monkeypatch):
    counts = []

    def milliseconds(self, step, count):
        counts.append(count)
        warming_up = len(counts) % 2 == 1
        return [9.0, 4.0, 5.0] if warming_up else [2.0] * count

    monkeypatch.setattr(measure.Clock, "milliseconds", milliseconds)
    rows = rows_of({"plain": methods.PlainLoop}, seconds=0.2, rounds=2)
    assert counts == [3, 25] * 2  # 100 ms a turn, a step of 4 ms
    for which in cases.PASSES:
        assert rows["plain", which]["steps"] == 25 and rows["plain", which]["ms"] == 2.0


@pytest.mark.parametrize(
    "row, wanted",
    [
        (dict(status="ok", turns=[1.0], ms=1.0), True),
        (dict(status="ok", turns=[1.0, 2.0], ms=1.5), False),
        (dict(status="ok", turns=[400.0], ms=400.0), False),  # slow
        (dict(status="failed", turns=[], ms=None), False),
    ],
)
def test_which_rows_want_a_second_turn(row, wanted):
    assert measure.wants_turn(row, 1) == wanted


def test_a_lost_device(monkeypatch, rows_of):
    monkeypatch.setattr(measure.Clock, "alive", lambda self: False)
    with pytest.raises(measure.DeviceLost) as lost:
        rows_of({"bad": failing_with(RuntimeError("CUDA error: an illegal memory access was encountered"))})
    rows = lost.value.args[0]
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "illegal memory access" in rows[1]["reason"] and "the device was lost" in rows[0]["reason"]


def test_a_device_lost_in_a_later_turn(monkeypatch, seed):
    monkeypatch.setattr(measure.Clock, "alive", lambda self: False)
    unit, settings = cases.Unit(SMALL, "fp32", "learned"), measure.Settings("cpu", seed, seconds=1e-3, rounds=2)
    factories = {"good": methods.PlainLoop, "bad": failing_with(RuntimeError("CUDA error: unspecified launch failure"))}
    turns = measure.UnitTurn(unit, factories, settings).later()
    assert [next(turns)["status"] for _ in cases.PASSES] == ["ok", "ok"]
    with pytest.raises(measure.DeviceLost) as lost:
        next(turns)
    (first, second) = lost.value.args[0]
    assert (first["method"], first["status"], second["status"]) == ("bad", "failed", "failed")
    assert "launch failure" in first["reason"] and set(first) == set(second) and "turns" not in first


@pytest.mark.parametrize("tunes", [False, True])
def test_a_very_slow_step_is_measured_by_its_check(rows_of, monkeypatch, tunes):
    steps = []

    class Counting(methods.PlainLoop):
        def experts(self, x, weights, ids):
            steps.append("forward+backward" if torch.is_grad_enabled() else "forward")
            return super().experts(x, weights, ids)

    Counting.tunes = tunes
    monkeypatch.setattr(measure, "VERY_SLOW_MS", 0.0)
    monkeypatch.setattr(measure.Clock, "peaks_are_free", True, raising=False)
    monkeypatch.setattr(measure.Clock, "__init__", lambda self, device: setattr(self, "cuda", False))
    monkeypatch.setattr(measure, "Oracle", functools.partial(measure.Oracle, check_flops=1e4))
    rows = rows_of({"counting": Counting}, rounds=1)
    # What tunes is let run once before; then come the step whose dy is of some tokens, and those that count.
    assert steps == ["forward+backward"] * (3 if tunes else 2) + ["forward"]
    for which in cases.PASSES:
        row = rows["counting", which]
        assert row["status"] == "ok" and row["ms"] > 0 and row["steps"] == 1 and row["peak_bytes"] > 0


def test_the_estimate_grows_with_the_work():
    grid = sorted(cases.grid(), key=lambda case: case.flops("forward"))
    assert grid[-1].tuple == "64,1024,8192,8,8" and not math.isinf(grid[-1].flops("forward+backward"))
    assert experiment.FIRST_GUESS["cuda"][0]["fp32"] < experiment.FIRST_GUESS["cuda"][0]["bf16"]


def test_what_spans_cover_together():
    assert measure.covered([]) == 0
    assert measure.covered([(5, 7), (0, 4), (1, 2), (3, 6)]) == 7
    assert measure.covered([(0, 1), (2, 3), (2, 3)]) == 2


def test_how_long_the_gpu_is_busy(rows_of, seed, monkeypatch):
    """Beside the time of short steps with a learned gate, in every turn."""
    monkeypatch.setattr(measure.Clock, "busy_milliseconds", lambda self, step, count: (step(), 0.5)[1])
    monkeypatch.setattr(measure.Clock, "milliseconds", lambda self, step, count: [4.0] * count)
    real = measure.Subject.measure_busy

    def as_on_a_gpu(subject, which):
        subject.clock.cuda = True
        real(subject, which)
        subject.clock.cuda = False

    monkeypatch.setattr(measure.Subject, "measure_busy", as_on_a_gpu)
    factories = {"plain": methods.PlainLoop}
    row = rows_of(factories)["plain", "forward"]
    assert row["busy_ms"] == 0.5 and row["busy_turns"] == [0.5]
    unit, settings = cases.Unit(SMALL, "fp32", "learned"), measure.Settings("cpu", seed, seconds=1e-3, rounds=2)
    turn = next(measure.UnitTurn(unit, factories, settings).later())
    assert measure.with_turn(row, {**turn, "busy_ms": 0.7})["busy_ms"] == pytest.approx(0.6)
    assert rows_of(factories, routing="even")["plain", "forward"]["busy_ms"] is None
    monkeypatch.setattr(measure.Clock, "milliseconds", lambda self, step, count: [6.0] * count)
    assert rows_of(factories)["plain", "forward"]["busy_ms"] is None
