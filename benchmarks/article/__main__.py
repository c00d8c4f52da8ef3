"""Command line of the article's experiment; launch/article.sh sets up, builds and calls it."""

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "launch"), str(ROOT / "benchmarks")]
import scaling  # noqa: E402

from article import cases, measure, methods, rates, report, sanitize, stages, store  # noqa: E402

# Where question 5 looks: sizes at which stages differ, with the learned gate and in the first type.
STAGE_CASES = ("16,1024,512,8,3", "64,1024,512,8,8", "64,1024,1024,8,3", "64,1024,4224,8,3", "8,64,128,8,3")
# Sustained FLOP/s and seconds of a turn besides, from which an estimate of a unit's time starts.
FIRST_GUESS = {"cuda": ({"bf16": 3e14, "fp16": 3e14, "fp32": 3e13}, 0.1), "cpu": (dict.fromkeys(cases.TYPES, 3e10), 0.2)}


def size(text):
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|MiB|KiB|B)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 16GiB")
    return int(float(match[1]) * {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}.get(match[2], 1))


def one_of(known):
    def parse(text):
        values = text.split(",")
        if not values or not set(values) <= set(known):
            raise argparse.ArgumentTypeError(f"'{text}': expected some of {','.join(known)}")
        return values

    return parse


def positive(text):
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
    return value


def parse(argv):
    parser = argparse.ArgumentParser(prog="launch/article.sh", description=__doc__.split(";")[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/article"), metavar="DIR", help="default: runs/article")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--grid", choices=["auto", "article", "small"], default="auto", help="auto: small without a GPU")
    add("--cases", nargs="+", default=[], metavar="CASE", help="sequences,length,hidden,experts,top-k; * for any")
    add("--types", type=one_of(cases.TYPES), default=list(cases.TYPES), help="of bf16,fp16,fp32")
    add("--routings", type=one_of(cases.ROUTINGS), default=list(cases.ROUTINGS), help="of learned,even,uneven")
    add("--methods", type=lambda text: text.split(","), default=[], help="only these, by their names in the report")
    add("--expert-hidden-factor", type=int, choices=[2, 4], default=2, help="expert hidden over hidden size")
    add("--peers", action="store_true", help="MegaBlocks, ScatterMoE, SonicMoE, Tutel, FastMoE as well")
    add("--memory-limit", type=size, metavar="SIZE", help="such as 16GiB, the article's GPU; larger needs are rows")
    add("--budget", type=positive, metavar="MINUTES", help="begin nothing that will not fit; run again for the rest")
    add("--seconds", type=positive, default=0.05, help="of measuring, for a method and pass of a case (0.05)")
    add("--rounds", type=int, default=3, help="turns over which these are spread")
    add("--seed", type=int, default=1)
    add("--again", action="store_true", help="measure once more what failed, was wrong or missing")
    add("--report-only", action="store_true", help="measure nothing")
    add("--publish", action="store_true", help="write benchmarks/results/article and docs/article.md too")
    add("--sanitize", nargs="?", const="memcheck", metavar="TOOL", help="only run compute-sanitizer (memcheck)")
    add("--under-sanitizer", action="store_true", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)  # seconds since 1970: the budget, over a restart
    arguments = parser.parse_args(argv)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.small = arguments.grid == "small" or (arguments.grid == "auto" and arguments.device == "cpu")
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: at least 1")
    if arguments.budget and not arguments.until:
        arguments.until = time.time() + 60 * arguments.budget
    return arguments


def units_of(arguments):
    grid = cases.grid(arguments.expert_hidden_factor, arguments.small)
    sums = cases.equal_sums(arguments.expert_hidden_factor, arguments.small)
    chosen = cases.matching(grid + sums, arguments.cases)
    grid, sums = ([case for case in chosen if case in part] for part in (grid, sums))
    return list(cases.units(grid, sums, arguments.types, arguments.routings))


def factories_of(arguments):
    factories = methods.methods_for(arguments.device, arguments.peers)
    unknown = set(arguments.methods) - set(factories)
    if unknown:
        raise ValueError(f"no method is '{unknown.pop()}'; there are: {', '.join(factories)}")
    return {name: make for name, make in factories.items() if not arguments.methods or name in arguments.methods}


def provenance(arguments, number):
    cuda = arguments.device == "cuda"
    about = scaling.provenance(["launch/article.sh", *arguments.argv])
    about.update(run=number, torch=torch.__version__, python=sys.version.split()[0], seed=arguments.seed)
    about.update(device=torch.cuda.get_device_name() if cuda else f"{about['processor']}, {torch.get_num_threads()} threads")
    about.update(cuda=torch.version.cuda if cuda else None, small=arguments.small)
    about.update(versions=methods.versions(), expert_hidden_factor=arguments.expert_hidden_factor)
    about.update(memory_limit=arguments.memory_limit, rounds=arguments.rounds, seconds=arguments.seconds)
    return about


class Experiment:
    def __init__(self, arguments):
        self.arguments = arguments
        self.store = store.Store(arguments.output)
        self.factories = factories_of(arguments)
        self.settings = measure.Settings(
            arguments.device, arguments.seed, arguments.seconds, arguments.rounds, arguments.memory_limit
        )
        self.run = len(self.store.of("run"))
        self.store.add("run", **provenance(arguments, self.run))
        self.factor = dict.fromkeys(cases.TYPES, 1.0)  # measured over estimated time
        self.left = 0  # units that the budget left out

    def missing(self, unit):
        """Factories of the methods without rows at the unit."""
        ended = self.store.ended_the_process()
        limit, known = self.arguments.memory_limit, self.store.steps()
        factories = {}
        for name, make in self.factories.items():
            rows = [known.get((unit.name, name, limit, which)) for which in cases.PASSES]
            done = all(rows) and not (self.arguments.again and any(r["status"] in store.REPEATABLE for r in rows))
            if (unit.name, name, limit) in ended and not done:
                reason = "the process ended during it, more than once"
                self.add_rows(unit, [name], status="failed", reason=reason)
            elif not done:
                factories[name] = make
        return factories

    def add_rows(self, unit, names, **values):
        for name in names:
            for which in cases.PASSES:
                self.store.add("step", run=self.run, **measure.row_of(unit, which, name, self.settings, **values))

    def estimate(self, unit, methods_count):
        rates_of, besides = FIRST_GUESS[self.arguments.device]
        steps = 2 + 1.5 * self.arguments.rounds
        seconds = methods_count * (steps * unit.case.flops("forward+backward") / rates_of[unit.dtype] + 2 * self.arguments.seconds + besides)
        return seconds * self.factor[unit.dtype]

    def measure_rates(self):
        """Once for each type; under a memory limit they would be the same."""
        for dtype in self.arguments.types:
            if not any(rate["dtype"] == dtype for rate in self.store.of("rate")):
                options = (dtype, self.arguments.expert_hidden_factor, self.arguments.small, self.arguments.seconds)
                for rate in list(rates.measure(self.arguments.device, *options)):
                    self.store.add("rate", run=self.run, **rate)

    def measure_units(self):
        units = sorted(units_of(self.arguments), key=lambda unit: self.estimate(unit, 1))
        with tqdm(units, unit="case") as bar:
            for unit in bar:
                factories = self.missing(unit)
                if factories:
                    bar.set_postfix_str(unit.name)
                    self.measure_unit(unit, factories)

    def measure_unit(self, unit, factories):
        try:
            if unit.routing != "learned":
                cases.counts_of(unit.case, unit.routing)
        except cases.Impossible as reason:
            self.add_rows(unit, factories, status="impossible", reason=str(reason))
            return
        seconds = self.estimate(unit, len(factories))
        if self.arguments.until and time.time() + seconds > self.arguments.until:
            self.left += 1
            return
        start = time.time()
        tell = lambda name: self.store.add("begun", unit=unit.name, method=name, memory_limit=self.settings.memory_limit)  # noqa: E731
        try:
            measurement = measure.UnitMeasurement(unit, factories, self.settings, tell)
            for row in measurement.rows():
                self.store.add("step", run=self.run, **row)
        except (torch.OutOfMemoryError, MemoryError) as error:  # of the inputs or the oracle
            self.add_rows(unit, factories, status="out of memory", reason=f"before any method: {error}".splitlines()[0])
            return
        except measure.DeviceLost as lost:
            for row in lost.args[0]:
                self.store.add("step", run=self.run, **row)
            self.restart(lost)
        if self.wants_stages(unit):
            for name, times in measurement.stages():
                self.store.add("stages", run=self.run, unit=unit.name, method=name, ms=times)
        self.factor[unit.dtype] *= ((time.time() - start) / seconds) ** 0.5

    def wants_stages(self, unit):
        first = unit.dtype == self.arguments.types[0] and unit.routing == "learned"
        return first and unit.case.tuple in STAGE_CASES and self.arguments.memory_limit is None

    def restart(self, lost):
        """A lost device needs a new process, which goes on where this one was."""
        print(f"\nthe device is lost to this process ({lost.__cause__}); starting anew", file=sys.stderr, flush=True)
        argv = [word for word in self.arguments.argv if not word.startswith("--until")]
        if self.arguments.until:
            argv.append(f"--until={self.arguments.until}")
        os.execv(sys.executable, [sys.executable, "-m", "article", *argv])

    def all(self):
        if self.arguments.memory_limit is None:
            self.measure_rates()
        self.measure_units()
        if self.left:
            print(f"{self.left} cases did not fit the budget; the same command measures them")


def write_report(arguments, measured):
    sanitized = arguments.output / "sanitizer.json"
    sanitized = json.loads(sanitized.read_text()) if sanitized.exists() else []
    whole = store.write_tables(measured, sanitized, arguments.output)
    paths = [report.write(whole, arguments.output, arguments.output / "article.md")]
    if arguments.publish:
        results = ROOT / "benchmarks/results/article"
        results.mkdir(parents=True, exist_ok=True)
        for name in ("article.json", "article.csv"):
            shutil.copyfile(arguments.output / name, results / name)
        paths.append(report.write(whole, results, ROOT / "docs/article.md"))
    for path in paths:
        print(f"    {path}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    arguments.argv = argv
    try:
        if arguments.under_sanitizer:
            return sanitize.steps(arguments.device, arguments.types[0], arguments.methods, arguments.expert_hidden_factor)
        if arguments.sanitize:
            arguments.output.mkdir(parents=True, exist_ok=True)
            given = [f"--types={arguments.types[0]}", f"--methods={','.join(arguments.methods)}"][: 1 + bool(arguments.methods)]
            given.append(f"--expert-hidden-factor={arguments.expert_hidden_factor}")
            clean = sanitize.run(arguments.output, given, arguments.sanitize)
            print("clean" if clean else f"not clean: see {arguments.output}/sanitizer.json")
            return 0 if clean else 1
        if arguments.report_only:
            measured = store.Store(arguments.output)
        else:
            if arguments.device == "cpu":
                print(f"There is no GPU here: {'a small grid' if arguments.small else 'the grid'} on the CPU.")
            experiment = Experiment(arguments)
            measured = experiment.store
            experiment.all()
        if not measured.of("step"):
            raise ValueError(f"nothing has been measured in {arguments.output}")
        write_report(arguments, measured)
    except (ValueError, FileNotFoundError) as error:
        print(f"article: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
