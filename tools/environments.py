"""Virtual environments with another torch than .venv's, for tools/build_wheels and tools/matrix."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = (ROOT / "launch/requirements.txt").read_text().splitlines()
PINNED = next(line.removeprefix("torch==") for line in REQUIREMENTS if line.startswith("torch=="))
"""The version of torch that the project takes by default."""


def run(*command, **options):
    print("+", *command, flush=True)
    return subprocess.run([str(part) for part in command], check=True, **options)


def install(python, *packages):
    """By uv, whose cache makes a second environment of one torch cost seconds and no memory on the disk."""
    run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", python, *packages)


def environment_of(torch, *more):
    """The Python of an environment of launch/requirements.txt with that torch in the place of its own, and with `more`, which is
    not taken out for who wants less. It is made once, in build/environments, and takes 5 GB."""
    folder = ROOT / "build/environments" / torch
    python = folder / "bin/python"
    wanted = [*(line for line in REQUIREMENTS if re.match(r"\w", line) and not line.startswith("torch==")), f"torch=={torch}", *more]
    stamp = folder / "complete.txt"
    if not stamp.exists() or not set(wanted) <= set(stamp.read_text().splitlines()):
        run(sys.executable, "-m", "venv", "--clear", folder)
        (folder / "requirements.txt").write_text("\n".join(wanted) + "\n")
        install(python, "--requirement", folder / "requirements.txt")
        stamp.write_text("\n".join(wanted))
    return python
