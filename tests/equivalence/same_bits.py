#!/usr/bin/env python3
"""Whether this build computes, bit for bit, what another does: for changes that may change no result.

    tests/equivalence/same_bits.py BASE [--build build/release] [--ranks 1,2,4] [--steps 20] [--programs quickstart]

BASE is a commit, which is built in a worktree of its own under build/base (in minutes; again at once), or a
folder that something was built in. Both builds' `quickstart` and `train_lm` run on each number of ranks. What
is compared: of quickstart all that every rank has computed and what it prints; of train_lm every tensor of the
checkpoint, the lines of metrics without their times, and the sample. Exit code 1, and a line for each
difference, where there is one.
"""

import argparse
import functools
import json
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))
from metrics_fields import without_the_machine  # noqa: E402

SAVED_AT = re.compile("-[0-9a-f]{16}-")
MODEL = {
    "hidden": 64, "expert-hidden": 96, "layers": 2, "heads": 4, "experts": 6, "batch-size": 10,
    "sequence-length": 48, "warmup": 4, "log-interval": 1, "validation-interval": 5,
    "validation-sequences": 8, "sample-length": 40, "checkpoint-interval": 0,
}  # fmt: skip
PROGRAMS = ["quickstart", "train_lm"]
# Two models that share no path of an expert.
VARIANTS = {"plain": [], "glu, recomputed, float64": ["--glu", "--recompute", "--dtype", "float64", "--top-k", "3"]}
# Threads split sums, so their number is fixed; more ranks than cores make way for each other.
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
}


def run(command, **options):
    """What it prints on standard output; ends this program where it fails."""
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, text=True, errors="replace", check=False, **options
    )
    if result.returncode:
        sys.exit(f"failed with {result.returncode}: {' '.join(map(str, command))}\n{result.stdout[-2000:]}")
    return result.stdout


def mpirun(ranks, build, program, *arguments):
    """Runs a program of a build over that build's own library, also where its folder has been moved or copied."""
    launcher = ["mpirun", "-n", ranks, "--oversubscribe", "--bind-to", "none"]
    libraries = [str((build / "src").resolve()), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment = {**ENVIRONMENT, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    return run([*launcher, build / "examples" / program, *arguments], env=environment, timeout=600)


def build_of(base):
    """The folder that BASE was built in; a commit is built first, its quickstart by this tree's file."""
    if Path(base).is_dir():
        return Path(base)
    git = ["git", "-C", ROOT]
    commit = run([*git, "rev-parse", "--verify", f"{base}^{{commit}}"]).strip()
    tree = ROOT / "build/base" / commit
    if not tree.exists():
        run([*git, "worktree", "prune"])
        run([*git, "worktree", "add", "--detach", tree, commit])
    (tree / "examples/quickstart.cpp").write_bytes((ROOT / "examples/quickstart.cpp").read_bytes())
    tools = ROOT / ".venv/bin"
    only = [f"-DANABRANCH_{part}=OFF" for part in ("CUDA", "TESTS", "PYTHON", "BENCHMARKS")]
    with_torch = f"-DLibTorch_PYTHON={tools / 'python'}"
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    build = tree / "build"
    run([tools / "cmake", "-S", tree, "-B", build, "-G", "Ninja", *only, with_torch, ninja])
    run([tools / "cmake", "--build", build, "--target", "quickstart", "train_lm"])
    return build


def write_text(file):
    generator = random.Random(20240521)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(60)]
    file.write_text(" ".join(generator.choices(words, k=3000)))


def tensors_of(checkpoint):
    """Bytes by file, name, type and shape, of all safetensors files of a folder. Their names have a part drawn for
    each time of saving, which is left out."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        for name, about in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in about["data_offsets"])
                found[f"{SAVED_AT.sub('-', file.name)}: {name} {about['dtype']} {about['shape']}"] = content[begin:end]
    return found


def metrics_of(file):
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {f"step {line['step']}: {name}": value for line in lines for name, value in without_the_machine(line).items()}


def results_of_quickstart(ranks, build, folder):
    """By what they are called: standard output, and each rank's bytes where the program can write them."""
    printed = mpirun(ranks, build, "quickstart", "--dump", folder / "computed")
    computed = {file.name: file.read_bytes() for file in sorted(folder.glob("computed.*"))}
    return {"output": printed, **computed}


def results_of_train_lm(ranks, steps, options, build, folder):
    text = folder / "text"
    write_text(text)
    output = folder / "output"
    model = [word for name, value in MODEL.items() for word in (f"--{name}", value)]
    given = ["--data", text, "--output", output, "--steps", steps, "--progress", "lines", *model, *options]
    mpirun(ranks, build, "train_lm", *given)
    results = {**tensors_of(output / "checkpoint"), **metrics_of(output / "metrics.jsonl")}
    return {**results, "sample": (output / "sample.txt").read_bytes()}


def differences(here, base):
    """A line for each thing that is not the same in both, or not in both."""
    for name in sorted(here.keys() | base.keys()):
        if name not in here or name not in base:
            yield f"{name}: only in {'this build' if name in here else 'the base'}"
        elif here[name] != base[name]:
            what, other = here[name], base[name]
            if isinstance(what, bytes):
                count = sum(a != b for a, b in zip(what, other)) + abs(len(what) - len(other))
                yield f"{name}: {count} of {len(what)} bytes differ"
            else:
                yield f"{name}: {what!r}, in the base {other!r}"


def compare(title, builds, measure):
    """Prints what `measure(build, folder)` gives otherwise for this build than for the base; returns how often."""
    with tempfile.TemporaryDirectory(prefix="anabranch-same-bits-") as scratch:
        results = []
        for name, build in zip(("here", "base"), builds):
            folder = Path(scratch) / name
            folder.mkdir()
            results.append(measure(build, folder))
    here, base = results
    without = {name for name in here.keys() - base.keys() if name.startswith("computed.")}
    if without:
        print(f"{title}: the base's program cannot write what it has computed; only its output is compared")
        here = {name: value for name, value in here.items() if name not in without}
    found = list(differences(here, base))
    print("\n  ".join([f"{title}: {len(here)} results, {len(found) or 'none'} differ", *found[:20]]), flush=True)
    return len(found)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="a commit, or a folder that something was built in")
    parser.add_argument("--build", type=Path, default=ROOT / "build/release", help="this build's folder")
    parser.add_argument("--ranks", type=lambda text: [int(word) for word in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=20, help="of train_lm")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS, help="default: both")
    arguments = parser.parse_args(argv)
    builds = (arguments.build, build_of(arguments.base))
    found = 0
    for ranks in arguments.ranks:
        if "quickstart" in arguments.programs:
            found += compare(f"quickstart, {ranks} ranks", builds, functools.partial(results_of_quickstart, ranks))
        for name, options in VARIANTS.items() if "train_lm" in arguments.programs else ():
            title = f"train_lm, {arguments.steps} steps, {name}, {ranks} ranks"
            found += compare(title, builds, functools.partial(results_of_train_lm, ranks, arguments.steps, options))
    print("not the same" if found else "the same, bit for bit")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
