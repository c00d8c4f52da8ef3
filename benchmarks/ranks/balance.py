#!/usr/bin/env python3
"""What skewed load costs a layer's step, with tokens that travel and with weights that do (MoEOptions::balance).

    benchmarks/ranks/balance.py                         # as root, on an idle machine; minutes
    benchmarks/ranks/balance.py --device cuda --ranks 2 # on the GPUs of this host; so launch/benchmark.sh gpu_balance
    benchmarks/ranks/balance.py --name gather --ways off gather auto --experts 2 --size 8192 256 128 1
    benchmarks/ranks/balance.py --name weights_beside --ways off off/1 replicas replicas/1 --experts 8

On CPUs virtual hosts of one rank each, one for each core, whose links a token bucket slows. Experts' popularity follows
Zipf's law, or one of them takes all tokens. All ways take turns, several times, and medians count, so that what others
do on the machine falls on all of them. Each time is also given as a multiple of that of balanced load whose tokens
travel, and beside the planner's prediction, which knows the machine from other sizes, and the load; where every rank has
a core or a GPU, as the planner knows nothing of cores that hosts share. A way like "replicas/1" is one with
MoEOptions::overlap: rows, and on CPUs weights too, travel beside products; the planner does not know of these. Writes
benchmarks/results/balance.json and balance.md, or balance_gpu.json and .md, or those of another --name.
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
import check  # noqa: E402
import planner  # noqa: E402
import scaling  # noqa: E402
from machine import machine_from  # noqa: E402

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


def other_sizes(tokens, hidden, inner):
    """To calibrate the planner by: none of those that it is to predict, with few and many experts."""
    return [
        (tokens // 4, hidden // 2, inner // 2, 8, 1),
        (tokens // 2, hidden, inner, 8, 1),
        (tokens * 2, hidden, inner, 16, 1),
        (tokens, hidden // 2, inner, 16, 2),
        (tokens, hidden, inner // 2, 32, 2),
        (tokens, hidden, inner, 32, 2),
        (tokens // 2, hidden, inner, 96, 1),
        (tokens, hidden, inner * 3 // 4, 96, 1),
    ]


def run(arguments, launcher, experts, options, idleness):
    """The records of every skew and way, with how much others took of the machine meanwhile."""
    tokens, hidden, inner, top_k = arguments.size
    size = (tokens, hidden, inner, experts, top_k)
    records, counts = {}, {}
    cases = [(skew, way) for _ in range(arguments.turns) for skew in SKEWS for way in arguments.ways]
    for skew, way in tqdm(cases, desc=f"E {experts}", leave=False):
        before = idleness.slowdown()
        balance, _, overlap = way.partition("/")
        travel = {"balance": balance, "overlap": overlap or "off"}
        (record,) = calibrate.measure(
            arguments.program, launcher, arguments.ranks, [size], arguments.rounds, skew, **travel, **options
        )
        record["slowdown"] = max(before, idleness.slowdown())
        counts[f"{skew:g}"] = record.pop("counts")  # the same in all ways and turns
        records.setdefault(f"{skew:g} {way}", []).append(record)
    return {
        "experts": experts,
        "megabits": arguments.megabits,
        "ways": arguments.ways,
        "counts": counts,
        "records": records,
    }


def foreseen(ways):
    """Whether the planner knows all of these: not of weights beside products."""
    return not any("/" in way for way in ways)


class Table:
    """What a setting's records say, and the planner of them."""

    def __init__(self, setting, machine):
        self.setting, self.records, self.machine = setting, setting["records"], machine

    def milliseconds(self, skew, way, what="step_ms"):
        return statistics.median(record[what] for record in self.records[f"{skew:g} {way}"])

    def predicted(self, skew, way):
        record = self.records[f"{skew:g} {way}"][-1]
        counts = self.setting["counts"][f"{skew:g}"]
        return check.predict_record(self.machine, {**record, "counts": counts}) * 1e3

    def ratios(self):
        """{(skew, way): predicted / the least that was measured}: the machine was calibrated by least times, too."""
        cases = [(skew, way) for skew in SKEWS for way in self.setting["ways"]]
        return {case: self.predicted(*case) / self.least(*case) for case in cases}

    def least(self, skew, way):
        return min(record["step_ms_least"] for record in self.records[f"{skew:g} {way}"])

    def text(self, ratios):
        """A line a skew: its imbalance over ranks, and of every way a step's time, its multiple of the balanced one's, and,
        where there are `ratios`, the predicted one's."""
        ways, balanced = self.setting["ways"], self.milliseconds(0.0, "off")
        columns = ["ms", "/ balanced", "predicted / least"][: 3 if ratios else 2]
        heads = " | ".join(f"{way}, {' | '.join(columns)}" for way in ways)
        text = f"| load | fullest rank / mean | {heads} |\n|---|---|{'---|' * len(columns) * len(ways)}\n"
        for skew, name in SKEWS.items():
            load = self.records[f"{skew:g} off"][0]["assignments"]
            text += f"| {name} | {max(load) * len(load) / sum(load):.2f} |"
            for way in ways:
                step = self.milliseconds(skew, way)
                text += f" {step:.1f} | {step / balanced:.2f} |" + (f" {ratios[skew, way]:.2f} |" if ratios else "")
            text += "\n"
        return text + "\nIn the last step of the last turn:\n\n" + "".join(self.explanations())

    def explanations(self):
        for skew, name in SKEWS.items():
            for way in self.setting["ways"][1:]:
                record = self.records[f"{skew:g} {way}"][-1]
                lent = ""
                if record.get("lending_ms", 0) > 0:
                    plain = self.records[f"{skew:g} off"][-1]["bytes_sent"]
                    lending = self.milliseconds(skew, way, "lending_ms")
                    lent = f"; of the step {lending:.1f} ms ({lending / self.milliseconds(skew, way):.0%}) are "
                    if record["overlap"] != "off":  # of other calls the bytes
                        yield f"- {name}, {way}: {record['explain']}{lent}waiting for weights and gradients, and copying them\n"
                        continue
                    lent += f"weights' and gradients' way; {record['bytes_sent'] / 1e6:.1f} MB are sent, and {plain / 1e6:.1f} where tokens travel"
                yield f"- {name}, {way}: {record['explain']}{lent}\n"


def described(settings, calibration, provenance):
    """All that was measured, and in words."""
    about, text, all_ratios = provenance, "", []
    fitted = machine = None
    if calibration:
        fitted = calibrate.fit(calibration, "balance.py", 0.0 if calibration[0]["device"] == "cuda" else 1.0)
        machine = machine_from(fitted, "balance.py")
    for setting in settings:
        first = setting["records"]["0 off"][0]
        links = f", links of {setting['megabits']} Mb/s" if first["device"] == "cpu" else ""
        text += f"{first['ranks']} ranks on {first['device']}, {first['dtype']}{links}: T {first['tokens_per_rank']} a rank, "
        text += f"h {first['hidden']}, n {first['expert_hidden']}, E {setting['experts']}, k {first['top_k']}\n\n"
        of_setting = Table(setting, machine)
        ratios = of_setting.ratios() if machine else {}
        setting["predicted_over_least"] = {f"{skew:g} {way}": ratio for (skew, way), ratio in ratios.items()}
        all_ratios += ratios.values()
        text += of_setting.text(ratios) + "\n"
    if all_ratios:
        within = sum(abs(ratio - 1) <= 0.2 for ratio in all_ratios)
        text += f"Predicted by the planner, beside the least of the steps: {within} of {len(all_ratios)} within 20 %, "
        text += f"from {min(all_ratios):.2f} to {max(all_ratios):.2f}"
        text += f", calibrated by what {about['calibration']} has measured.\n\n" if "calibration" in about else ".\n\n"
    slowdowns = [
        record["slowdown"] for one in settings for records in one["records"].values() for record in records if "slowdown" in record
    ]
    if slowdowns:
        text += f"Beside them a fixed piece of work took {statistics.median(slowdowns):.2f} times as long as at its best (median), "
        text += f"at most {max(slowdowns):.2f}.\n\n"
    text += f"Medians of {len(settings[0]['records']['0 off'])} turns. {about['processor']}, {about['cores']} cores, "
    text += f"commit {about['commit'][:10]}, {about['date']}: `{about['command']}`\n"
    return {"provenance": provenance, "machine": fitted, "calibration": calibration, "settings": settings}, text


def write(settings, calibration, provenance, arguments):
    """Where the arguments say."""
    whole, text = described(settings, calibration, provenance)
    results = json.dumps(whole, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(results)
        return
    file = arguments.output / arguments.name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(results)
    file.with_suffix(".md").write_text("# Skewed load, measured\n\n" + text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    parser.add_argument("--program", type=Path, default=planner.PROGRAM, help="benchmark_step")
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--ranks", type=int, default=int(planner.cores()))
    parser.add_argument("--megabits", type=int, default=1000, help="of a virtual host's link, on CPUs")
    parser.add_argument("--experts", type=int, nargs="+", default=EXPERTS)
    parser.add_argument("--size", type=int, nargs=4, help="tokens of a rank, hidden, expert hidden, top-k")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="off, and others of MoEOptions::balance, maybe with /N: overlap")
    parser.add_argument("--name", help="of the files")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="only predict anew, from what is there")
    parser.add_argument("--quick", action="store_true", help="a few small cases, to see whether it runs")
    parser.add_argument("--json", type=Path, help="file for the results in the place of all others")
    parser.add_argument("--commit", help="of the measured sources")
    arguments = parser.parse_args()
    os.environ.update(all_to_all_hosts.ENVIRONMENT)
    tempfile.tempdir = str(ROOT / "build")  # all hosts see it
    provenance = scaling.provenance(["benchmarks/ranks/balance.py", *sys.argv[1:]])
    if arguments.commit:
        provenance["commit"] = arguments.commit
    arguments.name = arguments.name or ("balance" if arguments.device == "cpu" else "balance_gpu")
    if arguments.again:
        whole = json.loads((arguments.output / arguments.name).with_suffix(".json").read_text())
        calibration = whole["calibration"] if foreseen(whole["settings"][0]["ways"]) else []
        write(whole["settings"], calibration, whole["provenance"], arguments)
        return
    arguments.size = arguments.size or SIZES[arguments.device]
    if arguments.quick:
        arguments.size, arguments.experts, arguments.rounds, arguments.turns = (256, 64, 128, 1), [8], 1, 1
    options = {"device": arguments.device} | ({"dtype": "bf16"} if arguments.device == "cuda" else {})
    settings, calibration, idleness = [], [], planner.Idleness()
    with launcher_of(arguments) as launcher:
        own_cores = arguments.device == "cuda" or arguments.ranks <= planner.cores()
        sizes = other_sizes(*arguments.size[:3]) if own_cores and foreseen(arguments.ways) else []
        for size in tqdm(sizes, desc="calibration", leave=False):
            # Whose times a fit takes one by one: a size that others' work fell on would spoil all predictions.
            measured = arguments.ranks, [size], arguments.rounds
            (record,) = planner.measure_idle(idleness, launcher, *measured, program=arguments.program, **options)
            record.pop("counts")
            calibration.append(record)
        for experts in arguments.experts:
            settings.append(run(arguments, launcher, experts, options, idleness))
            write(settings, calibration, provenance, arguments)  # what there is, should the rest fail


if __name__ == "__main__":
    sys.exit(main())
