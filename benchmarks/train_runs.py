"""Runs of examples/train_lm, for what compares their curves."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / name) for name in ("tests/support", "launch")]
from hardware import processor  # noqa: E402
from virtual_hosts import MPI_ENVIRONMENT  # noqa: E402

ENVIRONMENT = {**MPI_ENVIRONMENT, "OMPI_MCA_ess_singleton_isolated": "1"}  # a single process needs no daemon


def command_of(program, arguments, ranks=0):
    """0 ranks: without mpirun."""
    launcher = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"] if ranks else []
    return [*launcher, str(program), *map(str, arguments)]


def environment():
    return ENVIRONMENT | os.environ


def train(program, arguments, ranks=0):
    subprocess.run(command_of(program, arguments, ranks), check=True, stdout=subprocess.DEVNULL, env=environment())


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def curve_of(lines, name, window):
    """{step: mean of `name` over the lines in the window of steps that ends there}."""
    windows = {}
    for line in lines:
        windows.setdefault(-(-line["step"] // window) * window, []).append(line[name])
    return {step: statistics.mean(values) for step, values in windows.items()}


def provenance(commit):
    """Of a measurement on a CPU: who, where and when."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": shlex.join([str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]]),
    }
