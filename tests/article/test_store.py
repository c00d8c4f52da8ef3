"""Rows are kept as they come; a run goes on where an earlier one ended."""

import json

import pytest
from article import options, store
from article.experiment import Experiment
from article.methods import PlainLoop

SOME = ["--device=cpu", "--types=fp32", "--seconds=1e-4", "--rounds=1", "--cases", "4,64,64,2,1", "4,64,64,4,4"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(factories, *options) measures into one folder; returns the Experiment."""

    def measure(factories, *more):
        monkeypatch.setattr("article.registry.methods_for", lambda device, peers: factories)
        experiment = Experiment(options.parse([f"--output={tmp_path}", *SOME, *more]))
        experiment.measure()
        return experiment

    return measure


def counted(made):
    class Counted(PlainLoop):
        def __init__(self, problem):
            made.append(problem.unit.name)
            super().__init__(problem)

    return Counted


def test_nothing_is_measured_twice(run):
    made = []
    first = run({"a": counted(made)})
    # Three routings of one case. Of the other all tokens go to every expert: its uneven split is a row that says so.
    assert len(set(made)) == 4 and len(first.store.of("step")) == 2 * (4 + 1)
    made.clear()
    again = run({"a": counted(made)})
    assert not made and len(again.store.of("step")) == 10 and len(again.store.of("run")) == 2
    assert len(again.store.of("rate")) == len(first.store.of("rate"))


def test_what_was_published_is_gone_on_from(run, tmp_path):
    first = run({"a": PlainLoop, "b": PlainLoop})
    published = tmp_path / "published"
    published.mkdir()
    whole = store.write_tables(first.store, [{"tool": "memcheck"}], published)
    rows = first.store.steps()
    (tmp_path / "rows.jsonl").unlink()
    store.adopt([published], tmp_path)
    made = []
    again = run({"a": counted(made), "b": counted(made)})
    assert not made and again.store.steps().keys() == rows.keys()
    assert store.write_tables(again.store, [], tmp_path)["rows"] == whole["rows"]
    assert all(row["status"] == rows[key]["status"] for key, row in again.store.steps().items())
    assert json.loads((tmp_path / "sanitizer.json").read_text()) == [{"tool": "memcheck"}]
    kept = (tmp_path / "rows.jsonl").read_text()
    store.adopt([published], tmp_path)  # of what has been measured there, nothing is lost
    assert (tmp_path / "rows.jsonl").read_text() == kept


def test_several_published_folders_are_one(run, tmp_path):
    whole = store.write_tables(run({"a": PlainLoop}).store, [{"tool": "memcheck"}], tmp_path)
    for name, change in (("first", {}), ("second", {"ms": 77.0})):
        (tmp_path / name).mkdir()
        rows = [{**row, **change} for row in whole["rows"] if not change or row["ms"]]
        (tmp_path / name / "article.json").write_text(json.dumps({**whole, "rows": rows}))
    store.adopt([tmp_path / "first", tmp_path / "second"], tmp_path / "both")
    both = store.Store(tmp_path / "both")
    assert [record["run"] for record in both.of("run")] == [0, 1]
    assert {(row["ms"], row["run"]) for row in both.steps().values()} == {(77.0, 1), (None, 0)}
    assert len(json.loads((tmp_path / "both/sanitizer.json").read_text())) == 2


def test_a_new_method_is_added(run):
    made = []
    run({"a": PlainLoop})
    both = run({"a": counted(made), "b": PlainLoop})
    assert not made
    assert {row["method"] for row in both.store.steps().values()} == {"a", "b"}


def test_an_interrupted_run_goes_on(run):
    class Stops(PlainLoop):
        def __init__(self, problem):
            if problem.unit.case.experts == 4:
                raise KeyboardInterrupt
            super().__init__(problem)

    with pytest.raises(KeyboardInterrupt):
        run({"a": Stops})
    made = []
    whole = run({"a": counted(made)})
    assert {name.split(",")[3] for name in made} == {"4"}
    assert len(whole.store.steps()) == 10


def test_a_memory_limit_is_another_row(run):
    run({"a": PlainLoop})
    limited = run({"a": PlainLoop}, "--memory-limit=1GiB")
    assert {row["memory_limit"] for row in limited.store.steps().values()} == {None, 1 << 30}
    assert len(limited.store.steps()) == 20


def test_what_failed_is_repeated_on_demand(run):
    def throws(_problem):
        raise ValueError("not today")

    run({"a": throws})
    assert all(
        r["status"] == "failed" for r in run({"a": PlainLoop}).store.steps().values() if r["status"] != "impossible"
    )
    repeated = run({"a": PlainLoop}, "--again").store.steps().values()
    assert sum(row["status"] == "ok" for row in repeated) == 8


def test_a_budget_leaves_the_rest(run):
    none = run({"a": PlainLoop}, "--budget=1e-6")
    assert len(none.left) == 4
    assert {row["status"] for row in none.store.of("step")} == {"impossible"}
    assert not run({"a": PlainLoop}).left


def test_who_ends_the_process_is_left_out(run, tmp_path):
    whole = run({"a": PlainLoop, "b": PlainLoop})
    unit = "4,64,64,2,1,128/fp32/even"
    for _ in range(2):
        whole.store.add("run")
        whole.store.add("begun", unit=unit, method="c", memory_limit=None)
    later = store.Store(tmp_path)
    assert later.ended_the_process() == {(unit, "c", None)}
    made = []
    steps = run({"c": counted(made)}).store.steps()
    assert steps[unit, "c", None, "forward"]["reason"] == "the process ended during it, more than once"
    assert unit not in made and len(set(made)) == 3


def test_turns_go_over_all_cases(run):
    made = []

    def factory(name):
        return lambda problem: made.append((problem.unit.name, name)) or PlainLoop(problem)

    factories = {name: factory(name) for name in "abc"}
    first = run(factories, "--rounds=1")
    one_turn, made[:] = made[:], []
    units = list(dict.fromkeys(unit for unit, _ in one_turn))
    assert one_turn == [(unit, name) for unit in units for name in "abc"]
    whole = run(factories, "--rounds=3").store.steps()
    assert made == [(unit, name) for order in ("bca", "cab") for unit in units for name in order]
    measured = [row for row in whole.values() if row["status"] != "impossible"]
    assert len(measured) == 2 * len(one_turn) and all(len(row["turns"]) == 3 for row in measured)
    for key, row in first.store.steps().items():
        assert whole[key]["turns"][: len(row["turns"])] == row["turns"]
    made.clear()
    run(factories, "--rounds=3")
    assert not made


def test_who_ends_the_process_in_a_later_turn_has_failed(run):
    whole = run({"a": PlainLoop, "b": PlainLoop})
    unit = "4,64,64,2,1,128/fp32/even"
    for _ in range(2):
        whole.store.add("run")
        whole.store.add("begun", unit=unit, method="a", memory_limit=None)
    steps = run({"a": PlainLoop, "b": PlainLoop}, "--rounds=2").store.steps()
    row = steps[unit, "a", None, "forward"]
    assert row["status"] == "failed" and row["reason"] == "the process ended during it, more than once"
    assert len(steps[unit, "b", None, "forward"]["turns"]) == 2


def test_a_line_cut_off(tmp_path):
    kept = store.Store(tmp_path)
    kept.add("rate", rows=1)
    with open(kept.path, "a") as file:
        file.write('{"kind": "ra')
    assert store.Store(tmp_path).records == [{"kind": "rate", "rows": 1}]
    store.Store(tmp_path).add("rate", rows=2)
    assert [json.loads(line)["rows"] for line in kept.path.read_text().splitlines()] == [1, 2]
    kept.path.write_text('{"kind": \n{"kind": "rate"}\n')
    with pytest.raises(ValueError, match="rows.jsonl:1 is no JSON"):
        store.Store(tmp_path)


def test_ratios_are_to_the_fastest_of_the_same_kind():
    def row(method, which, ms, limit=None):
        return {"unit": "u", "method": method, "pass": which, "memory_limit": limit, "ms": ms}

    rows = [row("a", "forward", 2.0), row("b", "forward", 3.0), row("c", "forward", None), row("b", "forward", 9.0, 5)]
    assert [r["ratio"] for r in store.with_ratios(rows)] == [1.0, 1.5, None, 1.0]
