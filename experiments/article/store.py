"""What has been measured, kept line by line as it comes: an interrupted run goes on where it was."""

import csv
import itertools
import json
from collections import Counter

from .measure import with_turn
from .registry import DESCRIPTIONS

# So often may the process end while a method has its turn at a unit, before it is left out there: a person or a time
# limit may have ended it once.
BEGINNINGS = 2
# What --again measures once more.
REPEATABLE = ("failed", "wrong", "missing", "out of memory")


def adopt(published, folder):
    """What DIR/article.json has, of each DIR of `published` in turn, becomes the beginning of `folder`, if nothing has
    been measured there. A row that several have is the last one's."""
    rows = folder / "rows.jsonl"
    if rows.exists():
        return
    sanitized, records, runs = [], [], 0
    for each in published:
        whole = json.loads((each / "article.json").read_text())
        sanitized += whole["sanitizer"]
        for kind in ("runs", "rates", "rows", "stages", "products"):
            for record in whole.get(kind, []):
                own = {name: value for name, value in record.items() if name != "ratio"}
                records.append({**own, "run": record["run"] + runs})
        runs += len(whole["runs"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sanitizer.json").write_text(json.dumps(sanitized, indent=1) + "\n")
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))


class Store:
    """DIR/rows.jsonl: one JSON object a line. `kind` says what: run, begun, step, turn (later ones), stages, product,
    rate."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "rows.jsonl"
        self.records, self._steps = [], {}
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            for number, line in enumerate(lines, start=1):
                try:
                    self.keep(json.loads(line))
                except ValueError:
                    if number != len(lines):  # the last line may have been cut off
                        raise ValueError(f"{self.path}:{number} is no JSON") from None
            if lines:
                self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, kind, **values):
        record = {"kind": kind, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        self.keep(record)
        return record

    def keep(self, record):
        self.records.append(record)
        if record["kind"] in ("step", "turn"):
            key = (record["unit"], record["method"], record["memory_limit"], record["pass"])
            self._steps[key] = record if record["kind"] == "step" else with_turn(self._steps[key], record)

    def of(self, kind):
        return [record for record in self.records if record["kind"] == kind]

    def steps(self):
        """The rows by (unit, method, memory limit, pass), with all turns; one measured anew counts as it was last."""
        return self._steps

    def ended_the_process(self):
        """(unit, method, memory limit) at whose turn the process ended, BEGINNINGS times."""
        ends = Counter()
        for record, following in itertools.pairwise([*self.records, {"kind": "run"}]):
            if record["kind"] == "begun" and following["kind"] == "run":
                ends[record["unit"], record["method"], record["memory_limit"]] += 1
        return {key for key, times in ends.items() if times >= BEGINNINGS}


def in_order(records):
    """By unit as they came, and there by method: a unit's methods took turns, or had them in several runs."""
    units = {unit: place for place, unit in enumerate(dict.fromkeys(record["unit"] for record in records))}
    methods = {method: place for place, method in enumerate(DESCRIPTIONS)}
    return sorted(records, key=lambda r: (units[r["unit"]], methods.get(r["method"], len(methods))))


def with_ratios(rows):
    """Adds `ratio`: time over that of the fastest method at the same unit, pass and memory limit."""
    fastest = {}
    for row in rows:
        if row["ms"] is not None:
            key = (row["unit"], row["memory_limit"], row["pass"])
            fastest[key] = min(fastest.get(key, row["ms"]), row["ms"])
    return [
        {**row, "ratio": row["ms"] and row["ms"] / fastest[row["unit"], row["memory_limit"], row["pass"]]}
        for row in rows
    ]


COLUMNS = (
    "sequences", "length", "hidden", "expert_hidden", "experts", "top_k", "dtype", "routing", "pass", "method",
    "memory_limit", "status", "reason", "ms", "busy_ms", "tflops", "ratio", "peak_bytes", "padding_rows", "assignments",
    "largest_error_used", "steps", "device", "commit", "date",
)  # fmt: skip


def compact(value, digits=5):
    """The same with floats of so many digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {name: compact(each, digits) for name, each in value.items()}
    return [compact(each, digits) for each in value] if isinstance(value, list) else value


def as_lines(whole):
    """JSON with a line for each record of each list."""
    parts = []
    for name, records in whole.items():
        lines = "".join(f"\n  {json.dumps(record)}," for record in records).removesuffix(",")
        parts.append(f" {json.dumps(name)}: [{lines}\n ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_tables(store, sanitized, folder):
    """DIR/article.json, all that is known, and DIR/article.csv, a line for each case, pass and method."""
    runs = {run["run"]: run for run in store.of("run")}
    rows = with_ratios(compact(in_order(store.steps().values())))  # as whoever adopts them would have them
    whole = compact(
        {
            "runs": list(runs.values()),
            "rows": rows,
            "stages": in_order(store.of("stages")),
            "products": store.of("product"),
            "rates": store.of("rate"),
            "sanitizer": sanitized,
        }
    )
    rows = whole["rows"]
    (folder / "article.json").write_text(as_lines(whole))
    with open(folder / "article.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            about = runs[row["run"]]
            errors = [error["used"] for error in row["errors"].values()]
            writer.writerow(
                {
                    **row,
                    "largest_error_used": max(errors, default=None),
                    **{name: about[name] for name in ("device", "commit", "date")},
                }
            )
    return whole
