#!/usr/bin/env python3
"""Compares the C++ library's binary interface with that of another commit: whether programs built with it run with this one.

    tools/abi.py v0.2.0            # HEAD with that release
    tools/abi.py v0.2.0 v0.2.1     # two releases

Both are built here, without CUDA, with what a debugger knows, into build/abi (minutes). abidiff (Debian: abigail-tools) looks at
what public headers declare. Exit code 0: nothing differs but what was added; 1: programs must be built anew; 2: it could
not be done.
"""

import argparse
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / ".venv/bin"
FAILED = 1 | 2  # bits of abidiff's exit code
FLAGS = {
    "CMAKE_BUILD_TYPE": "Debug",
    "CMAKE_UNITY_BUILD": "ON",
    "LibTorch_PYTHON": str(PROGRAMS / "python"),
    "ANABRANCH_CUDA": "OFF",
    "ANABRANCH_TESTS": "OFF",
    "ANABRANCH_EXAMPLES": "OFF",
    "ANABRANCH_PYTHON": "OFF",
}


class Failed(Exception):
    pass


def checked(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False, **options)
    if done.returncode:
        output = done.stdout + done.stderr
        raise Failed(f"{' '.join(map(str, command))}\n{output.decode(errors='replace')[-4000:]}")
    return done.stdout


def built(root, commit):
    """(its library, its public headers)"""
    name = checked("git", "-C", root, "rev-parse", f"{commit}^{{commit}}").decode().strip()
    folder = root / "build/abi" / name
    source, build = folder / "source", folder / "build"
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(checked("git", "-C", root, "archive", name))) as archive:
            archive.extractall(source, filter="data")
        flags = [f"-D{name}={value}" for name, value in FLAGS.items()]
        checked(PROGRAMS / "cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={PROGRAMS / 'ninja'}", *flags)
        checked(PROGRAMS / "cmake", "--build", build, "--target", "anabranch")
        (folder / "complete").touch()
    (library,) = (path for path in build.rglob("libanabranch.so*") if not path.is_symlink())
    return library, source / "include"


def compare(root, before, after):
    """(whether programs built with `before` run with `after`, abidiff's words)"""
    if shutil.which("abidiff") is None:
        raise Failed("abidiff is missing (Debian: abigail-tools)")
    (old, old_headers), (new, new_headers) = built(root, before), built(root, after)
    # What was added harms nobody. Of what changed, abidiff leaves some to who reads it, as a struct's size: here all of it counts.
    flags = ["--headers-dir1", old_headers, "--headers-dir2", new_headers, "--drop-private-types", "--no-show-locs", "--no-added-syms"]
    done = subprocess.run(["abidiff", *flags, old, new], capture_output=True, text=True, check=False)
    if done.returncode & FAILED:
        raise Failed(f"abidiff ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0, done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after", nargs="?", default="HEAD")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        fits, words = compare(arguments.root, arguments.before, arguments.after)
    except Failed as problem:
        print(f"abi: {problem}", file=sys.stderr)
        return 2
    print(words.strip() or "nothing differs")
    print("programs need not be built anew" if fits else "PROGRAMS MUST BE BUILT ANEW")
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
