#!/usr/bin/env python3
"""The planner's predictions beside steps measured here: 1, 2 and 4 ranks, and over slowed links.

    benchmarks/ranks/planner.py                     # as root, on an idle machine; minutes

For each setting it calibrates a machine at some sizes, predicts other sizes and skews, and measures those.
The least of each stage's times counts. A fixed piece of work on all cores, before and after each
measurement, shows whether the machine is idle: where it takes longer than at its best, or the steps differ
much among themselves, the measurement is taken again, a few times; what stays so is marked.
Writes benchmarks/results/planner.json and planner.md.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tools/plan", "tests/support", "launch", "benchmarks/ranks")]
import all_to_all_hosts  # noqa: E402
import calibrate  # noqa: E402
import check  # noqa: E402
import scaling  # noqa: E402
import virtual_hosts  # noqa: E402
from machine import machine_from  # noqa: E402

PROGRAM = ROOT / "build/release/benchmarks/benchmark_step"
# hosts, ranks on each, Mb/s of a host's link
SETTINGS = [(1, 1, 0), (1, 2, 0), (1, 4, 0), (2, 1, 100), (2, 2, 400)]
# tokens of a rank, hidden, expert hidden, experts, top-k: none of those that calibrate
SIZES = [(384, 192, 384, 8, 2), (768, 128, 512, 16, 2), (1536, 256, 384, 16, 1)]
SKEWS = [0.0, 1.0]
ATTEMPTS = 4
BUSY = 1.1  # times the best time of the fixed work
UNEVEN = 1.25  # median of the steps over the least


class Idleness:
    """How much others take of this machine, by a fixed piece of work on all its cores."""

    def __init__(self):
        self.best = float("inf")
        for _ in range(10):
            self.slowdown()

    def slowdown(self):
        """Seconds of the work now over those at its best so far."""
        block = bytes(16 << 20)  # hashing one lets other threads run
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(int(cores())) as threads:
            list(threads.map(lambda _: hashlib.sha256(block).digest(), range(int(cores()))))
        seconds = time.perf_counter() - begin
        self.best = min(self.best, seconds)
        return seconds / self.best


def least_of(records):
    """The record of the most idle attempt, with the shortest times of all."""
    best = dict(min(records, key=lambda record: record["slowdown"]))
    best["attempts"] = len(records)
    best["step_ms_least"] = min(record["step_ms_least"] for record in records)
    best["stage_ms_least"] = {
        stage: min(record["stage_ms_least"][stage] for record in records) for stage in best["stage_ms_least"]
    }
    return best


def unsteady(record):
    return record["slowdown"] > BUSY or record["step_ms"] > UNEVEN * record["step_ms_least"]


def measure_idle(idleness, launcher, ranks, sizes, rounds, skew=0.0, pause=5, program=PROGRAM, **more):
    """calibrate.measure for each of `sizes`, with `more` options, again while the machine is busy."""
    found = []
    for size in sizes:
        attempts = []
        while not attempts or (unsteady(attempts[-1]) and len(attempts) < ATTEMPTS):
            time.sleep(pause if attempts else 0)
            before = idleness.slowdown()
            (record,) = calibrate.measure(program, launcher, ranks, [size], rounds, skew, **more)
            attempts.append({**record, "slowdown": max(before, idleness.slowdown())})
        found.append(least_of(attempts))
    return found


@contextlib.contextmanager
def launcher_for(hosts, ranks, megabits):
    """What to write before a program, with {ranks} in it."""
    if hosts == 1:
        yield f"{ROOT}/launch/mpirun.sh -n {{ranks}} --no-bind"
        return
    names = [f"n{number}" for number in range(1, hosts + 1)]
    with virtual_hosts.VirtualHosts(names) as virtual:
        for name in names:
            virtual.shape(name, megabits, burst_kilobytes=16)
        words = [*virtual.enter("n1"), *all_to_all_hosts.mpirun(virtual, names, ranks)]
        yield shlex.join(map(str, words))


def measure(idleness, hosts, ranks, megabits, rounds):
    """What was measured in a setting: to calibrate, and to compare with."""
    name = f"{hosts} host(s) × {ranks} rank(s)" + (f", {megabits} Mb/s" if megabits else "")
    with launcher_for(hosts, ranks, megabits) as launcher:
        total = hosts * ranks
        records = []
        calibration = measure_idle(idleness, launcher, total, calibrate.SIZES, rounds)
        for skew in SKEWS:
            records += measure_idle(idleness, launcher, total, SIZES, rounds, skew)
    # The hosts share this machine's cores.
    return {"name": name, "cores_per_node": cores() / hosts, "calibration": calibration, "records": records}


def cores():
    return float(len(os.sched_getaffinity(0)))


def write(settings, provenance, folder):
    rows = []
    for setting in settings:
        name = setting["name"]
        described = calibrate.fit(setting["calibration"], name, setting["cores_per_node"])
        setting["machine"] = described
        described = machine_from(described, name)
        for record, (what, *numbers) in zip(setting["records"], check.measured(described, setting["records"])):
            link = name.partition(", ")[2]
            busy = "slowdown" in record and record["slowdown"] > BUSY
            rows.append((f"{what}{', ' + link if link else ''}{' (others at work)' if busy else ''}", *numbers))
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": provenance, "settings": settings}
    (folder / "planner.json").write_text(json.dumps(whole, indent=1) + "\n")
    published = list(check.published())
    about = provenance
    text = f"# How far the planner is off\n\n{check.table(rows, 'measured')}\n\n{check.verdict(rows)}\n\n"
    text += f"{about['processor']}, {about['cores']} cores, commit {about['commit'][:10]}, {about['date']}: "
    text += f"`{about['command']}`\n\n{check.table(published, 'published')}\n\n{check.verdict(published)}\n"
    (folder / "planner.md").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--again", action="store_true", help="only predict anew, from planner.json")
    arguments = parser.parse_args()
    os.environ.update(all_to_all_hosts.ENVIRONMENT)
    tempfile.tempdir = str(ROOT / "build")  # all hosts see it
    if arguments.again:
        whole = json.loads((arguments.output / "planner.json").read_text())
        write(whole["settings"], whole["provenance"], arguments.output)
        return
    settings, provenance = [], scaling.provenance(["benchmarks/ranks/planner.py"])
    idleness = Idleness()
    for setting in tqdm(SETTINGS, unit="setting"):
        settings.append(measure(idleness, *setting, arguments.rounds))
        write(settings, provenance, arguments.output)  # what there is, should the rest fail


if __name__ == "__main__":
    sys.exit(main())
