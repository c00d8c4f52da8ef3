"""A run's `metrics.jsonl` in a terminal, as it grows."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

from .problem import Problem

SLOW = 1.25  # times the ranks' median
BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60


def look(folder: Path) -> dict[str, Any]:
    """The last step, and the course of loss and speed until then."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from error
    records = [record for record in map(_parsed, lines) if record is not None]
    course = {name: [record[name] for record in records if name in record] for name in ("loss", "tokens_per_second")}
    last = records[-1] if records else None
    return {"records": len(records), "last": last, "course": course, "own_work": own_work(records)}


def own_work(records: list[dict[str, Any]], most: int = 5) -> dict[str, Any] | None:
    """Of the last lines: milliseconds that each rank takes for what waits for no other, and which one is slow."""
    lines = [record["rank_milliseconds"] for record in records if record.get("rank_milliseconds")]
    lines = [line for line in lines[-most:] if len(line) == len(lines[-1])]
    if not lines or len(lines[-1]) < 2:
        return None
    measured = [[value for value in column if value is not None] for column in zip(*lines)]
    ranks = [statistics.mean(column) if column else None for column in measured]
    known = [value for value in ranks if value is not None]
    if not known:
        return None
    median, worst = statistics.median_low(known), max(known)
    slow = ranks.index(worst) if worst > SLOW * median else None
    return {"milliseconds": ranks, "median": median, "slow_rank": slow}


def own_work_in_words(found: dict[str, Any]) -> str:
    slow, median = found["slow_rank"], found["median"]
    if slow is None:
        return f"no slow rank: own work of a sequence {median:.3g} ms"
    worst = found["milliseconds"][slow]
    return f"SLOW: rank {slow}, own work of a sequence {worst:.3g} ms, {worst / median:.1f} times the median"


def _parsed(line: str) -> dict[str, Any] | None:
    """None of one that is being written."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def spark(values: list[float], width: int = WIDTH) -> str:
    """The values' course, each column the mean of its part of them."""
    finite = [value for value in values if isinstance(value, (int, float)) and value == value and abs(value) != float("inf")]
    columns = min(width, len(finite))
    if not columns:
        return ""
    edges = [round(i * len(finite) / columns) for i in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def text(found: dict[str, Any]) -> str:
    """In plain letters: for --once, and the last look."""
    last = found["last"]
    if last is None:
        return "no step yet"
    lines = [f"step {last['step']}" + (f"  loss {last['loss']:.3f}" if "loss" in last else "")]
    for name, values in found["course"].items():
        if values:
            lines.append(f"{name:18s} {values[-1]:12.4g}  {spark(values)}")
    lines += [f"{name:18s} {last[name]:12.4g}" for name in _numbers(last)]
    if found["own_work"]:
        lines.append(own_work_in_words(found["own_work"]))
    if last.get("load"):
        lines += ["expert load, of an even share, a line each layer"]
        lines += ["  " + " ".join(f"{share:4.2f}" for share in _relative(row)) for row in last["load"]]
    return "\n".join(lines)


def _numbers(record: dict[str, Any]) -> list[str]:
    shown = ("step", "loss", "tokens_per_second")
    return [name for name, value in record.items() if isinstance(value, (int, float)) and name not in shown]


def _relative(row: list[float]) -> list[float]:
    mean = sum(row) / len(row)
    return [share / mean if mean else 0.0 for share in row]


def follow(folder: Path, interval: float) -> None:
    """Until it is interrupted. Needs rich."""
    try:
        from rich.live import Live
    except ImportError as error:
        raise Problem("anabranch watch needs rich: pip install rich; or --once") from error
    try:
        with Live(_screen(look(folder), folder), auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(interval)
                live.update(_screen(look(folder), folder), refresh=True)
    except KeyboardInterrupt:
        return


def _screen(found: dict[str, Any], folder: Path) -> Any:
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    last = found["last"]
    if last is None:
        return Panel("no step yet", title=str(folder))
    numbers = Table.grid(padding=(0, 2))
    for name, values in found["course"].items():
        if values:
            numbers.add_row(name, f"{values[-1]:.4g}", spark(values))
    for name in _numbers(last):
        numbers.add_row(name, f"{last[name]:.4g}", "")
    parts: list[Any] = [numbers]
    if found["own_work"]:
        slow = found["own_work"]["slow_rank"] is not None
        parts.append(Text(own_work_in_words(found["own_work"]), style="bold red" if slow else ""))
    if last.get("load"):
        heat = Text("expert load (blue: less than an even share, red: more)\n")
        for row in last["load"]:
            for share in _relative(row):
                heat.append("██", style=_colour(share))
            heat.append("\n")
        parts.append(heat)
    return Panel(Group(*parts), title=f"{folder}  step {last['step']}")


def _colour(share: float) -> str:
    """White at an even share, blue towards none, red towards twice and more."""
    away = min(abs(share - 1.0), 1.0)
    faded = round(255 * (1 - away))
    return f"rgb(255,{faded},{faded})" if share > 1 else f"rgb({faded},{faded},255)"
