#!/usr/bin/env python3
"""Weak and strong scaling of one MoE layer over ranks, experts, top-k, skew and balance, through any launcher.

    launch/scaling.py --ranks 1,2,4 --experts 2,8 --top-k 1,2 --skew 0,1 --output runs/scaling
    launch/scaling.py --launcher "srun --mpi=pmix --cpu-bind=none -n {ranks}" ...
    launch/scaling.py --device cuda --dtype bf16 --tokens 8192 --hidden 2048 --expert-hidden 1024 ...
    launch/scaling.py --report-only --output runs/scaling

Weak scaling keeps the tokens and the experts of a rank, and so the work of an expert; strong scaling those of
all ranks together (the same times the largest number of ranks). Every point is one run of benchmark_step, kept as
DIR/points/NAME.json with its provenance; a point that is there is not run again, so an interrupted study
goes on where it was, and several jobs may fill one DIR. Then: DIR/results.csv, DIR/results.json,
DIR/report.md and its plots.
"""

import argparse
import csv
import dataclasses
import fcntl
import itertools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

import hardware
import scaling_report

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Point:
    """One run: `tokens` of each rank, `experts` of all."""

    scaling: str
    ranks: int
    experts: int
    top_k: int
    skew: float
    tokens: int
    hidden: int
    expert_hidden: int
    all_to_all: str
    balance: str
    device: str
    dtype: str

    @property
    def name(self):
        balance = "" if self.balance == "off" else f"-{self.balance}"
        return (
            f"{self.scaling}-r{self.ranks}-e{self.experts}-k{self.top_k}-s{self.skew:g}-t{self.tokens}"
            f"-h{self.hidden}-n{self.expert_hidden}-{self.all_to_all}{balance}-{self.device}-{self.dtype}"
        )

    def options(self):
        given = dataclasses.asdict(self)
        names = ("tokens", "hidden", "expert_hidden", "experts", "top_k", "skew", "all_to_all", "balance", "device", "dtype")
        return [word for name in names for word in ("--" + name.replace("_", "-"), str(given[name]))]


def points_of(arguments):
    """The grid; a top-k above the number of experts is no point."""
    most = arguments.largest or max(arguments.ranks)
    for scaling, ranks, experts, top_k, skew, balance in itertools.product(
        arguments.scaling, arguments.ranks, arguments.experts, arguments.top_k, arguments.skew, arguments.balance
    ):
        weak = scaling == "weak"
        tokens = arguments.tokens if weak else max(1, arguments.tokens * most // ranks)
        experts *= ranks if weak else most
        if top_k <= experts:
            yield Point(
                scaling,
                ranks,
                experts,
                top_k,
                skew,
                tokens,
                arguments.hidden,
                arguments.expert_hidden,
                arguments.all_to_all,
                balance,
                arguments.device,
                arguments.dtype,
            )


def git(*words):
    result = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def provenance(command):
    return {
        "command": shlex.join(str(word).removeprefix(f"{ROOT}/") for word in command),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "processor": hardware.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": hardware.gpus(),
        "system": platform.platform(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


class Failure(Exception):
    """A point that could not be measured; the message has what it printed."""


def run(point, arguments):
    """Measures a point and keeps it; throws Failure."""
    file = arguments.output / "points" / f"{point.name}.json"
    scratch = file.with_suffix(f".{os.getpid()}.partial")
    launcher = shlex.split(arguments.launcher.format(ranks=point.ranks))
    command = [*launcher, arguments.program, *point.options(), "--rounds", arguments.rounds, "--json", scratch]
    scratch.unlink(missing_ok=True)
    try:
        result = subprocess.run(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=arguments.timeout,
            check=False,
        )
        if result.returncode != 0 or not scratch.exists():
            raise Failure(f"{point.name} ended with {result.returncode}:\n{result.stdout[-2000:]}")
        record = json.loads(scratch.read_text())
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise Failure(f"{point.name}: {error}") from error
    finally:
        scratch.unlink(missing_ok=True)
    if record["ranks"] != point.ranks:
        raise Failure(f"{point.name}: the launcher started {record['ranks']} ranks instead of {point.ranks}")
    whole = {"point": dataclasses.asdict(point), "provenance": provenance(command), **record}
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    temporary.replace(file)


def measure(arguments):
    """Runs what is missing; returns the number of points that failed."""
    (arguments.output / "points").mkdir(parents=True, exist_ok=True)
    points = list(points_of(arguments))
    missing = [point for point in points if not (arguments.output / "points" / f"{point.name}.json").exists()]
    failures = 0
    with tqdm(total=len(points), initial=len(points) - len(missing), unit="point") as bar:
        for point in missing:
            bar.set_postfix_str(point.name)
            try:
                run(point, arguments)
            except Failure as failure:
                bar.write(str(failure), file=sys.stderr)
                failures += 1
            bar.update()
    return failures


def read(folder):
    """The points there are, in a fixed order. In those of older studies tokens have travelled."""
    records = [json.loads(file.read_text()) for file in sorted((folder / "points").glob("*.json"))]
    for record in records:
        record["point"].setdefault("balance", "off")
    return sorted(records, key=lambda r: (r["point"]["scaling"], *scaling_report.series_key(r), r["ranks"]))


def write_tables(records, folder):
    (folder / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    rows = [scaling_report.flat(record) for record in records]
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def numbers(kind):
    def parse(text):
        try:
            values = [kind(word) for word in text.split(",")]
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers such as 1,2,4") from error
        if any(value < 0 or (kind is int and value < 1) for value in values):
            raise argparse.ArgumentTypeError(f"'{text}' has a number that is too small")
        return values

    return parse


def words(text):
    values = text.split(",")
    if not set(values) <= {"weak", "strong"}:
        raise argparse.ArgumentTypeError(f"'{text}': expected weak, strong or both")
    return values


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"), metavar="DIR")
    parser.add_argument("--ranks", type=numbers(int), default=[1, 2, 4])
    parser.add_argument("--experts", type=numbers(int), default=[2, 8], help="of a rank (strong: at the most ranks)")
    parser.add_argument("--top-k", type=numbers(int), default=[1, 2])
    parser.add_argument("--skew", type=numbers(float), default=[0.0, 1.0], help="s of Zipf's law")
    parser.add_argument("--scaling", type=words, default=["weak", "strong"], help="weak,strong")
    parser.add_argument("--tokens", type=int, default=512, help="of a rank (strong: at the most ranks)")
    parser.add_argument("--largest", type=int, help="most ranks of the whole study, where this run has a part")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--expert-hidden", type=int, default=512)
    parser.add_argument("--all-to-all", default="flat", choices=["flat", "hierarchical", "auto"])
    parser.add_argument(
        "--balance",
        type=lambda text: text.split(","),
        default=["off"],
        help="what travels where load is skewed (MoEOptions::balance): off, shadow, replicas, gather, auto, or several of them",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cuda: a GPU for each rank, by NCCL")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of a point")
    parser.add_argument("--launcher", default=f"{ROOT}/launch/mpirun.sh -n {{ranks}}", help="with {ranks} in it")
    parser.add_argument("--program", type=Path, default=ROOT / "build/release/benchmarks/benchmark_step")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a point")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args(argv)
    if not arguments.report_only and not arguments.program.exists():
        parser.error(f"there is no {arguments.program}: build it, or name another with --program")
    return arguments


def main(argv=None):
    arguments = parse(argv)
    failures = 0 if arguments.report_only else measure(arguments)
    if not (arguments.output / "points").is_dir():
        print(f"scaling.py: no points in {arguments.output}", file=sys.stderr)
        return 1
    # The last of several jobs has all points: none may write a report over a later one's.
    with open(arguments.output / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = read(arguments.output)
        if records:
            write_tables(records, arguments.output)
            print(f"{len(records)} points: {scaling_report.write(records, arguments.output)}")
    print(f"{failures} points failed")
    return 1 if failures or not records else 0


if __name__ == "__main__":
    sys.exit(main())
