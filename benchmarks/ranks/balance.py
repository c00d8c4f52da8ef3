#!/usr/bin/env python3
"""What skewed load costs a layer's step, with tokens that travel and with weights that do (MoEOptions::balance).

    benchmarks/ranks/balance.py                         # as root, on an idle machine; minutes
    benchmarks/ranks/balance.py --device cuda --ranks 2 # on the GPUs of this host
    benchmarks/ranks/balance.py --name gather --ways off gather auto --experts 2 --size 8192 256 128 1

On CPUs virtual hosts of one rank each, one for each core, whose links a token bucket slows. Experts' popularity follows
Zipf's law, or one of them takes all tokens. All ways take turns, several times, and medians count, so that what others
do on the machine falls on all of them. Each time is also given as a multiple of that of balanced load whose tokens
travel. Writes benchmarks/results/balance.json and balance.md, or balance_gpu.json and .md, or those of another --name.
"""

import argparse
import contextlib
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
import planner  # noqa: E402
import scaling  # noqa: E402

WAYS = ("off", "shadow", "replicas", "auto")
# Zipf's s; with the last one all tokens have the same expert.
SKEWS = {0.0: "balanced", 1.0: "zipf 1", 1.5: "zipf 1.5", 100.0: "one takes all"}
EXPERTS = (8, 64, 128)
# tokens of a rank, hidden, expert hidden, top-k
SIZES = {"cpu": (1024, 256, 512, 1), "cuda": (8192, 2048, 4096, 1)}


@contextlib.contextmanager
def launcher_of(arguments):
    if arguments.device == "cuda":
        yield f"{ROOT}/launch/mpirun.sh -n {{ranks}}"
        return
    with planner.launcher_for(arguments.ranks, 1, arguments.megabits) as launcher:
        yield launcher


def run(arguments, experts):
    """The records of every skew and way."""
    tokens, hidden, inner, top_k = arguments.size or SIZES[arguments.device]
    size = (tokens, hidden, inner, experts, top_k)
    records = {}
    with launcher_of(arguments) as launcher:
        cases = [(skew, way) for _ in range(arguments.turns) for skew in SKEWS for way in arguments.ways]
        for skew, way in tqdm(cases, desc=f"E {experts}", leave=False):
            options = {"balance": way, "device": arguments.device}
            if arguments.device == "cuda":
                options["dtype"] = "bf16"
            (record,) = calibrate.measure(
                planner.PROGRAM, launcher, arguments.ranks, [size], arguments.rounds, skew, **options
            )
            records.setdefault(f"{skew:g} {way}", []).append(record)
    return {"experts": experts, "megabits": arguments.megabits, "ways": arguments.ways, "records": records}


def table(setting):
    """A line a skew: its imbalance over ranks, and of every way a step's time and its multiple of the balanced one's."""
    records, ways = setting["records"], setting["ways"]

    def milliseconds(skew, way):
        return statistics.median(record["step_ms"] for record in records[f"{skew:g} {way}"])

    balanced = milliseconds(0.0, "off")
    text = "| load | fullest rank / mean | " + " | ".join(f"{way}, ms | / balanced" for way in ways) + " |\n"
    text += "|---|---|" + "---|---|" * len(ways) + "\n"
    for skew, name in SKEWS.items():
        load = records[f"{skew:g} off"][0]["assignments"]
        text += f"| {name} | {max(load) * len(load) / sum(load):.2f} |"
        for way in ways:
            text += f" {milliseconds(skew, way):.1f} | {milliseconds(skew, way) / balanced:.2f} |"
        text += "\n"
    text += "\nIn the last step of the last turn:\n\n"
    for skew, name in SKEWS.items():
        for way in ways[1:]:
            text += f"- {name}: {records[f'{skew:g} {way}'][-1]['explain']}\n"
    return text


def write(settings, provenance, file):
    text = "# Skewed load, measured\n\n"
    for setting in settings:
        first = setting["records"]["0 off"][0]
        links = f", links of {setting['megabits']} Mb/s" if first["device"] == "cpu" else ""
        text += f"{first['ranks']} ranks on {first['device']}, {first['dtype']}{links}: T {first['tokens_per_rank']} a rank, "
        text += f"h {first['hidden']}, n {first['expert_hidden']}, E {setting['experts']}, k {first['top_k']}\n\n"
        text += table(setting) + "\n"
    about = provenance
    text += f"Medians of {len(settings[0]['records']['0 off'])} turns. {about['processor']}, {about['cores']} cores, "
    text += f"commit {about['commit'][:10]}, {about['date']}: `{about['command']}`\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": provenance, "settings": settings}
    file.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    file.with_suffix(".md").write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--ranks", type=int, default=int(planner.cores()))
    parser.add_argument("--megabits", type=int, default=1000, help="of a virtual host's link, on CPUs")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--size", type=int, nargs=4, help="tokens of a rank, hidden, expert hidden, top-k")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="off, and others of MoEOptions::balance")
    parser.add_argument("--name", help="of the files")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each turn")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.update(all_to_all_hosts.ENVIRONMENT)
    tempfile.tempdir = str(ROOT / "build")  # all hosts see it
    settings, provenance = [], scaling.provenance(["benchmarks/ranks/balance.py", *sys.argv[1:]])
    name = arguments.name or ("balance" if arguments.device == "cpu" else "balance_gpu")
    for experts in arguments.experts:
        settings.append(run(arguments, experts))
        write(settings, provenance, arguments.output / name)  # what there is, should the rest fail


if __name__ == "__main__":
    sys.exit(main())
