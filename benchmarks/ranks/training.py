#!/usr/bin/env python3
"""examples/train_lm over more and more GPUs of a host: tokens/s and model TFLOP/s of each, optimizer included.

    PYTHONPATH=build/release/python benchmarks/ranks/training.py --program build/release/examples/train_lm --ranks 1 2 4

OLMoE-1B-7B, in weak scaling, with as many sequences a GPU, and in strong scaling, with as many in all; Qwen3-30B-A3B where
there are 8 GPUs, as others have published it: 512 sequences of 4,096 tokens a step, experts over all GPUs, with a balanced
gate and with its own. Random tokens. In strong scaling all numbers of GPUs read the same tokens: how far the losses are
from one another is in the results, too.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks/gpu"))
from layer import provenance  # noqa: E402

GIB = 1 << 30
UNTIMED = 4  # steps at the beginning, in which engines are measured


@dataclasses.dataclass
class Case:
    """Steps of a model on so many ranks; `options` are train_lm's."""

    model: str
    scaling: str
    ranks: int
    steps: int
    options: dict


def of_olmoe(ranks, most):
    """On `ranks` of at most so many."""
    options = {"preset": "olmoe-1b-7b", "data": "synthetic:50304", "sequence-length": 4096, "micro-batch": 4}
    options |= {"optimizer-state": "bfloat16"}
    yield Case("OLMoE-1B-7B", "weak", ranks, 12, options | {"batch-size": 16 * ranks})
    yield Case("OLMoE-1B-7B", "strong", ranks, 12, options | {"batch-size": 16 * most})


def of_qwen3(ranks):
    options = {"preset": "qwen3-30b-a3b", "data": "synthetic:151936", "sequence-length": 4096, "micro-batch": 4}
    options |= {"batch-size": 512, "expert-parallel": ranks, "shard-optimizer": None}
    yield Case("Qwen3-30B-A3B", "balanced gate", ranks, 8, options | {"forced-routing": "balanced"})
    yield Case("Qwen3-30B-A3B", "its own gate", ranks, 8, options)


def small(ranks, most):
    options = {"preset": "tiny", "data": "synthetic:64", "sequence-length": 16, "vocabulary": 64, "dtype": "float32"}
    yield Case("tiny", "weak", ranks, 8, options | {"batch-size": 2 * ranks})
    yield Case("tiny", "strong", ranks, 8, options | {"batch-size": 2 * most})


def cases_of(numbers, quick):
    most = max(numbers)
    for ranks in numbers:
        yield from small(ranks, most) if quick else of_olmoe(ranks, most)
    if most >= 8 and not quick:
        yield from of_qwen3(most)


def words_of(options):
    for name, value in options.items():
        yield f"--{name}"
        if value is not None:
            yield str(value)


def run(case, program, launcher, device):
    """The row of a case: medians over the steps that count."""
    with tempfile.TemporaryDirectory() as output:
        options = case.options | {"device": device, "output": output, "steps": case.steps, "log-interval": 1}
        options |= {"validation-interval": 10**9, "validation-sequences": 1, "sample-length": 0, "no-save": None}
        command = [*shlex.split(launcher.format(ranks=case.ranks)), program, *words_of(options)]
        subprocess.run(command, check=True, cwd=ROOT)
        lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    counted = lines[UNTIMED:-1]  # the last step ends with a validation

    def median(name, scale=1.0):
        return statistics.median(line[name] for line in counted) * scale

    row = {
        **dataclasses.asdict(case),
        "tokens_per_second": median("tokens_per_second"),
        "step_seconds": median("step_seconds"),
        "model_TFLOP_per_s": median("model_tflops"),
        "peak_GiB": max(line["memory"] for line in lines) / GIB,
        "losses": [line["loss"] for line in lines],
    }
    if all("exposed_communication_seconds" in line for line in counted):
        row["exposed_communication_seconds"] = median("exposed_communication_seconds")
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="train_lm")
    parser.add_argument("--launcher", default=f"{ROOT}/launch/mpirun.sh -n {{ranks}}", help="of a program on so many {ranks}")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see whether it runs")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--commit", default="unknown", help="of the measured sources")
    arguments = parser.parse_args()
    results = []
    for case in tqdm(list(cases_of(arguments.ranks, arguments.quick)), unit="run"):
        results.append(run(case, arguments.program, arguments.launcher, arguments.device))
        row = results[-1]
        tqdm.write(f"{case.model}, {case.scaling}, {case.ranks} ranks: {row['tokens_per_second'] / case.ranks:,.0f} tokens/s and "
                   f"{row['model_TFLOP_per_s']:.0f} model TFLOP/s a rank")  # fmt: skip
        if arguments.json:  # what there is, should the rest fail
            whole = {"provenance": provenance(arguments.commit), "results": results}
            Path(arguments.json).write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
