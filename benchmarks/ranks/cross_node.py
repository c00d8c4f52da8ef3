#!/usr/bin/env python3
"""What a bound on the choices that leave a node (train_lm --cross-node-limit) costs in loss, and spares between nodes.

    benchmarks/ranks/cross_node.py --data TEXT     # as root; minutes

Virtual hosts of one rank each, over one text, seed and order of the data. Losses and bytes do not depend on what else the
machine does. Options that are not this script's are train_lm's, of all runs. Writes benchmarks/results/cross_node.json and
cross_node.md.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("tests/support", "launch", "benchmarks", "benchmarks/ranks")]
import all_to_all_hosts  # noqa: E402
import scaling  # noqa: E402
import train_runs  # noqa: E402
import virtual_hosts  # noqa: E402

PROGRAM = ROOT / "build/release/examples/train_lm"
LIMITS = (0, 0.25, 0.1, 0.01)  # 0: any number of choices may leave
WINDOW = 50  # steps, of which a point of a curve is the mean


def train(arguments, further, limit, directory):
    """(lines of metrics, bytes that have left the first host)."""
    names = [f"n{number}" for number in range(1, arguments.hosts + 1)]
    words = [
        "--preset", "tiny", "--data", arguments.data.resolve(), "--output", directory, "--steps", arguments.steps,
        "--log-interval", 5, "--validation-interval", arguments.steps, "--sample-length", 0, "--no-save",
        "--cross-node-limit", limit, *further,
    ]  # fmt: skip
    with virtual_hosts.VirtualHosts(names) as hosts:
        before = hosts.bytes_sent(names[0])
        command = [*all_to_all_hosts.mpirun(hosts, names, 1), PROGRAM, *words]
        hosts.run(names[0], command, env=all_to_all_hosts.ENVIRONMENT, timeout=3600)
        return train_runs.metrics_of(directory), hosts.bytes_sent(names[0]) - before


def result_of(limit, lines, sent):
    return {
        "limit": limit,
        "steps": lines[-1]["step"],
        "curve": train_runs.curve_of(lines, "loss", WINDOW),
        "validation_loss": lines[-1]["validation_loss"],
        "imbalance": lines[-1]["imbalance"],
        "bytes_sent": sent,
    }


def write(measured, file):
    about, results = measured["provenance"], measured["results"]
    steps = results[0]["steps"]
    text = f"# A bound on choices that leave a node\n\n`train_lm --preset tiny`, {measured['hosts']} virtual hosts of one rank, "
    text += f"{steps} steps; losses in nats, the last a mean over {WINDOW} steps; bytes of the first host with the sums of gradients\n\n"
    text += "| most that leave | loss, last | held out | its difference | imbalance | MB sent | / without a bound |\n"
    text += "|---|---|---|---|---|---|---|\n"
    for result in results:
        held_out, sent = result["validation_loss"], result["bytes_sent"]
        text += f"| {result['limit'] or 'any'} | {list(result['curve'].values())[-1]:.4f} | {held_out:.4f} "
        text += f"| {held_out / results[0]['validation_loss'] - 1:+.2%} | {result['imbalance']:.2f} "
        text += f"| {sent / 1e6:.0f} | {sent / results[0]['bytes_sent']:.2f} |\n"
    text += f"\n{about['processor']}, commit {about['commit'][:10]}, {about['date']}: `{about['command']}`\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n")
    file.with_suffix(".md").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="a text")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    arguments, further = parser.parse_known_args()
    results, provenance = [], scaling.provenance(["benchmarks/ranks/cross_node.py", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(dir=ROOT / "build", prefix=f"cross_node_{os.getpid()}_") as folder:
        for number, limit in enumerate(LIMITS):
            results.append(result_of(limit, *train(arguments, further, limit, Path(folder) / str(number))))
            print(f"limit {limit}: held out {results[-1]['validation_loss']:.4f}", flush=True)
    write({"provenance": provenance, "hosts": arguments.hosts, "results": results}, arguments.output / "cross_node")


if __name__ == "__main__":
    sys.exit(main())
