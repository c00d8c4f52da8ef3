"""`anabranch COMMAND ...`: the commands, their options, and how results are shown."""

# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import programs
from .problem import Problem

COMPLETION = """\
Completion of commands and options by Tab, for bash or zsh (in ~/.bashrc, ~/.zshrc):

    eval "$(register-python-argcomplete anabranch)"
"""


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: something was found wrong; 2: it could not be done, and why is on standard error."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in programs.SCRIPTS:
            return programs.run(argv[0], argv[1:])
        parser = make_parser()
        try:
            import argcomplete

            argcomplete.autocomplete(parser)
        except ImportError:  # only completion needs it
            pass
        arguments = parser.parse_args(argv)
        result, text, code = arguments.run(arguments)
        print(json.dumps(result, indent=1) if arguments.json else text)
        return code
    except Problem as problem:
        print(f"anabranch: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130


Result = tuple[Any, str, int]
"""What a command found: for machines, for people, and the exit code."""


def make_parser() -> argparse.ArgumentParser:
    """All commands, also those that are programs of their own, for help and completion."""
    parser = argparse.ArgumentParser(
        prog="anabranch",
        description="Expert-parallel Mixture-of-Experts training.",
        epilog=COMPLETION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(group: Any, name: str, run: Callable[[argparse.Namespace], Result], text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    command(commands, "info", _info, "what this installation is and finds: versions, devices, engines, transports")
    command(commands, "doctor", _doctor, "checks what training needs of this machine, and says what to change")
    _add_bench(command(commands, "bench", _bench, "times the library beside torch on this machine"))
    for name, (_, _, text) in programs.SCRIPTS.items():
        commands.add_parser(name, help=text, add_help=False)

    checkpoint = commands.add_parser("checkpoint", help="looks into a checkpoint, or writes it in another form")
    actions = checkpoint.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = command(actions, "inspect", _inspect, "what is in it; --verify: whether every byte is as it was written")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--verify", action="store_true", help="read all of it, and compare checksums")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")
    convert = command(actions, "convert", _convert, "the model's tensors as one plain file, without the optimizer's")
    convert.add_argument("folder", type=Path)
    convert.add_argument("output", type=Path, help="NAME.safetensors, or NAME.pt for torch.load")
    reshard = command(actions, "reshard", _reshard, "the same checkpoint in another number of files")
    reshard.add_argument("folder", type=Path)
    reshard.add_argument("output", type=Path, help="a folder that is empty or not there yet")
    reshard.add_argument("--ranks", type=int, required=True, help="files: one for each rank that will load it")

    watch = command(commands, "watch", _watch, "a training run's loss, speed, expert load and slow rank, as they come")
    watch.add_argument("folder", type=Path, help="that has metrics.jsonl: train's --output")
    watch.add_argument("--interval", type=float, default=1.0, help="seconds between looks")
    watch.add_argument("--once", action="store_true", help="one look, and no more")
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["layer", "gemm", "exchange"])
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where it can be)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, else float32")
    for name, value in dict(tokens=2048, hidden=512, expert_hidden=1024, experts=32, top_k=4, ranks=2).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to time each (default 1)")


def _info(arguments: argparse.Namespace) -> Result:
    from anabranch.info import describe, facts

    return facts(), describe(), 0


def _doctor(arguments: argparse.Namespace) -> Result:
    from . import doctor

    checks = doctor.examine()
    return [check._asdict() for check in checks], doctor.table(checks), int(any(check.status == "bad" for check in checks))


def _bench(arguments: argparse.Namespace) -> Result:
    from . import bench

    rows = bench.run(arguments)
    return rows, bench.table(rows), 0


def _inspect(arguments: argparse.Namespace) -> Result:
    from . import checkpoints

    found = checkpoints.inspect(arguments.folder, arguments.verify)
    text = checkpoints.table(found, arguments.tensors)
    if not arguments.tensors:
        found.pop("tensors")
    return found, text, int(bool(found.get("damaged")))


def _convert(arguments: argparse.Namespace) -> Result:
    from . import checkpoints

    done = checkpoints.convert(arguments.folder, arguments.output)
    return done, f"{done['tensors']} tensors, {done['bytes']} bytes: {done['output']}", 0


def _reshard(arguments: argparse.Namespace) -> Result:
    from . import checkpoints

    done = checkpoints.reshard(arguments.folder, arguments.output, arguments.ranks)
    return done, f"{done['tensors']} tensors in {done['files']} files: {done['output']}", 0


def _watch(arguments: argparse.Namespace) -> Result:
    from . import watch

    if not arguments.once and not arguments.json:
        watch.follow(arguments.folder, arguments.interval)
    found = watch.look(arguments.folder)
    return found, watch.text(found), 0
