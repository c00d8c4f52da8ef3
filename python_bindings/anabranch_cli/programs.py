"""Programs of the project that are scripts with options of their own: planner, tokenizer, trainer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from .problem import Problem

INSTALLED = Path(__file__).parent / "programs"
CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "plan": ("tools/plan/plan.py", ["matplotlib", "numpy"], "predicts training steps on clusters of up to 16,384 GPUs"),
    "tokenize": ("tools/tokenize/main.py", ["numpy", "tokenizers", "tqdm"], "turns text into token files for train"),
    "train": ("examples/train_lm.py", ["numpy", "tensorboard", "tqdm"], "trains a language model; -n RANKS: on that many ranks"),
}
"""The script, from the checkout's root; what it needs that the package does not; what it does."""


def script_of(name: str) -> Path:
    """In the installed package, or in the checkout that the package is linked from."""
    relative = SCRIPTS[name][0]
    for root in (INSTALLED, CHECKOUT):
        if (root / relative).exists():
            return root / relative
    raise Problem(f"{relative} is neither in {INSTALLED} nor in {CHECKOUT}")


def run(name: str, arguments: list[str]) -> int:
    """In a process of its own, which is told the name it goes by, and whose exit code is returned."""
    missing = [package for package in SCRIPTS[name][1] if importlib.util.find_spec(package) is None]
    if missing:
        raise Problem(f"anabranch {name} needs {', '.join(missing)}: pip install 'anabranch[programs]'")
    launcher = [sys.executable]
    if name == "train" and arguments[:1] == ["-n"]:
        if len(arguments) < 2 or not arguments[1].isdecimal() or int(arguments[1]) < 1:
            raise Problem("-n needs a number of ranks")
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", arguments[1]]
        arguments = arguments[2:]
    path = os.pathsep.join(part for part in sys.path if part)  # a package that was found through PYTHONPATH, also
    command = [*launcher, str(script_of(name)), *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "ANABRANCH_PROGRAM": f"anabranch {name}"}
    return subprocess.run(command, env=environment, check=False).returncode
