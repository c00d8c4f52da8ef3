"""What launch/article.sh calls: measures what is missing, then writes tables, plots and the report."""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("launch", "benchmarks")]

from article import options, report, sanitize, store  # noqa: E402
from article.experiment import Experiment  # noqa: E402


def write_report(arguments, measured):
    if not measured.of("step"):
        raise ValueError(f"nothing has been measured in {arguments.output}")
    sanitized = arguments.output / "sanitizer.json"
    sanitized = json.loads(sanitized.read_text()) if sanitized.exists() else []
    whole = store.write_tables(measured, sanitized, arguments.output)
    paths = [report.write(whole, arguments.output, arguments.output / "article.md")]
    if arguments.publish:
        results = ROOT / "benchmarks/results"
        own = results / ("article_peers" if arguments.peers else "article")
        own.mkdir(parents=True, exist_ok=True)
        for name in ("article.json", "article.csv"):
            shutil.copyfile(arguments.output / name, own / name)
        paths.append(report.publish(results, ROOT / "docs/article.md"))
    for path in paths:
        print(f"    {path}")


def run_sanitizer(arguments):
    """Starts this command anew under the tool, with what concerns it there."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    given = [f"--device={arguments.device}", f"--types={arguments.types[0]}"]
    given.append(f"--expert-hidden-factor={arguments.expert_hidden_factor}")
    if arguments.peers:
        given.append("--peers")
    if arguments.methods:
        given.append(f"--methods={','.join(arguments.methods)}")
    if arguments.cases:
        given += ["--cases", arguments.cases[0]]
    clean = sanitize.run(arguments.output, given, arguments.sanitize)
    print("clean" if clean else f"not clean: see {arguments.output}/sanitizer.json and the log beside it")
    return 0 if clean else 1


def run_under_sanitizer(arguments):
    sizes = [int(size) for size in arguments.cases[0].split(",")] if arguments.cases else sanitize.SIZES
    factor = arguments.expert_hidden_factor
    return sanitize.steps(arguments.device, arguments.types[0], arguments.methods, factor, sizes, arguments.peers)


def run(arguments):
    if arguments.under_sanitizer:
        return run_under_sanitizer(arguments)
    if arguments.sanitize:
        return run_sanitizer(arguments)
    if arguments.published:
        store.adopt(arguments.published, arguments.output)
    if arguments.report_only:
        measured = store.Store(arguments.output)
    else:
        if arguments.device == "cpu":
            print(f"There is no GPU here: {'a small' if arguments.small else 'the'} grid on the CPU.", flush=True)
        experiment = Experiment(arguments)
        measured = experiment.store
        experiment.measure()
    write_report(arguments, measured)
    return 0


def main(argv=None):
    try:
        return run(options.parse(sys.argv[1:] if argv is None else argv))
    except (ValueError, FileNotFoundError) as error:
        print(f"article: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
