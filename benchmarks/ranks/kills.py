#!/usr/bin/env python3
"""Kills a run of examples/train_lm at random moments, the whole job or one rank, and resumes it from what is left, until
it ends: then it has the metrics of a run that nobody killed, line by line. Again, until there have been so many kills.

    python benchmarks/ranks/kills.py --program build/release/examples/train_lm --data TEXT --kills 50 --json FILE

Options that are not this script's are train_lm's.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests/support"))
import train_runs  # noqa: E402
from metrics_fields import without_the_machine  # noqa: E402

PATIENCE = 60  # seconds, until a job has ended whose rank was killed


def children_of(process):
    tasks = Path(f"/proc/{process.pid}/task")
    return [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]


def kill(pid):
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signal.SIGKILL)


def kill_job(process):
    """mpirun and its ranks, at once, until nothing of them is left."""
    ranks = children_of(process)
    for pid in [process.pid, *ranks]:
        kill(pid)
    process.wait()
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_rank(process, generator):
    """One of them; the others are to end by themselves. False where there is none."""
    ranks = children_of(process)
    if not ranks:
        return False
    kill(generator.choice(ranks))
    process.communicate(timeout=PATIENCE)
    return True


def lines_of(directory):
    metrics = directory / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def saved_step(directory):
    """Of the checkpoint; 0 where there is none."""
    index = directory / "checkpoint/checkpoint.index.json"
    return int(json.loads(index.read_text())["metadata"]["step"]) if index.exists() else 0


def kill_at_a_random_moment(process, directory, steps, generator):
    """While it starts, or some steps later: who was killed, and after how many steps; None if it has ended before."""
    wanted = lines_of(directory) + generator.randint(0, steps // 2)
    while process.poll() is None and lines_of(directory) < wanted:
        time.sleep(0.002)
    time.sleep(generator.uniform(0, 0.05) if wanted else generator.uniform(0, 1))
    who = generator.choice(["job", "rank"])
    if process.poll() is not None or (who == "rank" and not kill_rank(process, generator)):
        return None
    if who == "job":
        kill_job(process)
    return {"killed": who, "steps_done": lines_of(directory)}


def run_with_kills(start, directory, steps, kills, generator):
    """Runs until it ends, killed and resumed at most so many times.

    Args:
        start: of an option more or none, a process of mpirun that trains in `directory`, a checkpoint each step.

    Returns:
        what became of each kill, and what the last process said.
    """
    moments = []
    while True:
        before = saved_step(directory)
        process = start(["--resume"] if before else [])
        moment = kill_at_a_random_moment(process, directory, steps, generator) if len(moments) < kills else None
        if moment is None:
            said = process.communicate()[0]
            if process.returncode == 0:
                return moments, said
            raise RuntimeError(f"a run from step {before} on has ended with {process.returncode}: {said}")
        moments.append({"from_step": before, **moment, "saved_step": saved_step(directory)})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="train_lm")
    parser.add_argument("--data", required=True, help="a text")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--json", help="file for the record")
    parser.add_argument("--commit", default="unknown", help="of the sources")
    arguments, further = parser.parse_known_args()
    generator = random.Random(arguments.seed)
    options = [
        "--preset", "tiny", "--hidden", 32, "--data", arguments.data, "--steps", arguments.steps, "--batch-size", 4,
        "--sequence-length", 32, "--log-interval", 1, "--validation-interval", 10, "--validation-sequences", 8,
        "--sample-length", 0, "--checkpoint-interval", 1, *further,
    ]  # fmt: skip

    def trained(directory):
        return [without_the_machine(line) for line in train_runs.metrics_of(directory)]

    record, runs = [], 0
    with tempfile.TemporaryDirectory() as folder:
        train_runs.train(arguments.program, [*options, "--output", Path(folder) / "whole"], arguments.ranks)
        expected = trained(Path(folder) / "whole")
        while len(record) < arguments.kills:
            runs += 1
            directory = Path(folder) / str(runs)

            def start(more, directory=directory):
                words = [*options, "--output", directory, *more, *["--async-save"] * generator.randint(0, 1)]
                command = train_runs.command_of(arguments.program, words, arguments.ranks)
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
                return subprocess.Popen(command, env=train_runs.environment(), **pipes)

            left = arguments.kills - len(record)
            moments, _ = run_with_kills(start, directory, arguments.steps, left, generator)
            record += moments
            if trained(directory) != expected:
                sys.exit(f"seed {arguments.seed}: after {moments} the metrics are others than those of a run without kills")
            print(f"{len(record)} kills, {runs} runs as the one that was not killed", flush=True)
    print(f"seed {arguments.seed}: of {len(record)} kills " + ", ".join(f"{n} of a {w}" for w, n in count(record).items()))
    if arguments.json:
        measured = {"provenance": train_runs.provenance(arguments.commit), "seed": arguments.seed, "runs": runs, "kills": record}
        Path(arguments.json).write_text(json.dumps(measured, indent=1) + "\n")


def count(record):
    return Counter(moment["killed"] for moment in record)


if __name__ == "__main__":
    main()
