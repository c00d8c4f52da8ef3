#!/usr/bin/env python3
"""A layer's step whose rows travel beside its products, against the step in turn and the planner's prediction.

    benchmarks/ranks/overlap.py                     # as root, on an idle machine; minutes

Two virtual hosts of one rank each, whose links a token bucket slows. The experts' inner width is that at which
exchange and products take about as long in turn. All ways take turns, several times, and medians count, so that what
others do on the machine falls on all of them. Writes benchmarks/results/overlap.json and overlap.md.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tools/plan", "tests/support", "launch", "benchmarks/ranks")]
import all_to_all_hosts  # noqa: E402
import calibrate  # noqa: E402
import check  # noqa: E402
import planner  # noqa: E402
import scaling  # noqa: E402
from machine import machine_from  # noqa: E402

# Mb/s of a host's link, tokens of a rank, hidden, experts, experts a token. Chunks of whole experts, or, of one expert a
# rank, of ranks.
SETTINGS = [(100, 1024, 256, 16, 2), (100, 1024, 256, 2, 1), (1000, 4096, 256, 16, 2), (1000, 4096, 256, 2, 1)]
WAYS = ("off", "1", "2", "4", "8")
PRODUCTS = ("experts", "experts_backward")


def measure(launcher, size, rounds, overlap="off"):
    (record,) = calibrate.measure(planner.PROGRAM, launcher, 2, [size], rounds, overlap=overlap)
    return record


def seconds(record, stages):
    return sum(record["stage_ms_least"][stage] for stage in stages) / 1e3


def balanced(launcher, tokens, hidden, experts, top_k, rounds):
    """The inner width of an expert at which products take as long as exchanges, in steps of 32."""
    inner = 256
    for _ in range(3):
        record = measure(launcher, (tokens, hidden, inner, experts, top_k), rounds)
        ratio = seconds(record, calibrate.EXCHANGES) / seconds(record, PRODUCTS)
        inner = min(4096, max(32, 32 * round(inner * ratio / 32)))
    return inner


def run(setting, rounds, turns):
    megabits, tokens, hidden, experts, top_k = setting
    with planner.launcher_for(2, 1, megabits) as launcher:
        inner = balanced(launcher, tokens, hidden, experts, top_k, rounds)
        size = (tokens, hidden, inner, experts, top_k)
        sizes = [size, (tokens // 2, hidden, inner, experts, top_k), (tokens, hidden, 2 * inner, experts, top_k)]
        sizes += [(tokens, hidden // 2, inner, experts, top_k), (tokens, hidden, inner, 4 * experts, top_k)]
        calibration = [measure(launcher, one, rounds) for one in sizes]
        records = {way: [] for way in WAYS}
        for _ in range(turns):
            for way in WAYS:
                records[way].append(measure(launcher, size, rounds, way))
    name = f"2 hosts, {megabits} Mb/s"
    return {"name": name, "megabits": megabits, "calibration": calibration, "records": records}


def rows(setting):
    """(way, measured ms, predicted ms) of a setting."""
    described = calibrate.fit(setting["calibration"], setting["name"], planner.cores() / 2)
    machine = machine_from(described, setting["name"])
    for way in WAYS:
        records = setting["records"][way]
        measured = statistics.median(record["step_ms"] for record in records)
        yield way, measured, check.predict_record(machine, records[0]) * 1e3


def write(settings, provenance, folder):
    text = "# Rows beside products, measured\n\n"
    for setting in settings:
        first = setting["records"]["off"][0]
        exchange = statistics.median(seconds(r, calibrate.EXCHANGES) for r in setting["records"]["off"])
        products = statistics.median(seconds(r, PRODUCTS) for r in setting["records"]["off"])
        text += f"{setting['name']}: T {first['tokens_per_rank']}, h {first['hidden']}, n {first['expert_hidden']}, "
        text += f"E {first['experts']}, k {first['top_k']}; in turn {exchange * 1e3:.0f} ms of exchange, {products * 1e3:.0f} of products\n\n"
        text += "| overlap | step, ms | in turn / this | predicted, ms | predicted / measured |\n|---|---|---|---|---|\n"
        lines = list(rows(setting))
        for way, measured, predicted in lines:
            text += f"| {way} | {measured:.0f} | {lines[0][1] / measured:.2f} | {predicted:.0f} "
            text += f"| {predicted / measured:.2f} |\n"
        text += "\n"
    about = provenance
    text += f"Medians of {len(settings[0]['records']['off'])} turns. {about['processor']}, {about['cores']} cores, "
    text += f"commit {about['commit'][:10]}, {about['date']}: `{about['command']}`\n"
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": provenance, "settings": settings}
    (folder / "overlap.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "overlap.md").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each turn")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    os.environ.update(all_to_all_hosts.ENVIRONMENT)
    tempfile.tempdir = str(ROOT / "build")  # all hosts see it
    settings, provenance = [], scaling.provenance(["benchmarks/ranks/overlap.py"])
    for setting in tqdm(SETTINGS, unit="setting"):
        settings.append(run(setting, arguments.rounds, arguments.turns))
        write(settings, provenance, arguments.output)  # what there is, should the rest fail


if __name__ == "__main__":
    sys.exit(main())
