"""The command line of the experiment."""

import argparse
import re
import time
from pathlib import Path

import torch

from . import cases


def size(text):
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(GiB|MiB|KiB|B)?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 16GiB")
    return int(float(match[1]) * {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}.get(match[2], 1))


def some_of(known):
    def parse_some(text):
        values = text.split(",")
        if not set(values) <= set(known):
            raise argparse.ArgumentTypeError(f"'{text}': expected some of {','.join(known)}")
        return [value for value in known if value in values]

    return parse_some


def positive(kind):
    def parse_positive(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")
        return value

    return parse_positive


def parser():
    made = argparse.ArgumentParser(prog="launch/article.sh", description="The article's experiment.")
    add = made.add_argument
    add("--output", type=Path, default=Path("runs/article"), metavar="DIR", help="default: runs/article")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto")
    add("--grid", choices=["auto", "article", "small"], default="auto", help="auto: small without a GPU")
    add("--cases", nargs="+", default=[], metavar="CASE", help="sequences,length,hidden,experts,top-k; * for any")
    add("--types", type=some_of(cases.TYPES), default=list(cases.TYPES), help="of bf16,fp16,fp32")
    add("--routings", type=some_of(cases.ROUTINGS), default=list(cases.ROUTINGS), help="of learned,even,uneven")
    add("--methods", type=lambda text: text.split(","), default=[], help="only these, by their names in the report")
    add("--expert-hidden-factor", type=int, choices=[2, 4], default=2, help="expert hidden over hidden size")
    add("--peers", action="store_true", help="MegaBlocks, transformers, ScatterMoE, Tutel, FastMoE as well")
    add("--memory-limit", type=size, metavar="SIZE", help="such as 16GiB, the article's GPU; what needs more is a row")
    add("--budget", type=positive(float), metavar="MINUTES", help="begin nothing that will not fit; again: the rest")
    add("--seconds", type=positive(float), default=0.1, help="of measuring, for a method and pass of a case (0.1)")
    add("--rounds", type=positive(int), default=3, help="turns over which these are spread, each over all cases (3)")
    add("--seed", type=int, default=1, help="of the inputs")
    add("--again", action="store_true", help="measure once more what failed, was wrong, missing or out of memory")
    add("--continue", dest="published", type=Path, nargs="+", metavar="DIR", help="go on from DIR/article.json of each")
    add("--report-only", action="store_true", help="measure nothing")
    add("--publish", action="store_true", help="write benchmarks/results/article and docs/article.md too")
    add("--sanitize", nargs="?", const="memcheck", metavar="TOOL", help="only run the engines under compute-sanitizer")
    add("--under-sanitizer", action="store_true", help=argparse.SUPPRESS)
    add("--until", type=float, help=argparse.SUPPRESS)  # seconds since 1970: the budget, over a restart
    return made


def parse(argv):
    arguments = parser().parse_args(argv)
    arguments.argv = argv
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.small = arguments.grid == "small" or (arguments.grid == "auto" and arguments.device == "cpu")
    if arguments.budget and not arguments.until:
        arguments.until = time.time() + 60 * arguments.budget
    return arguments
