"""same_bits.py: a build is the same as itself, and one changed bit is found.

Where the programs are: ANABRANCH_BUILD, a folder that something was built in (default: build/release).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("ANABRANCH_BUILD", ROOT / "build/release"))

pytestmark = pytest.mark.skipif(
    not (BUILD / "examples/train_lm").exists() or not shutil.which("mpirun"), reason="train_lm is not built"
)

ALONE = ["--ranks", 1, "--programs"]
# Runs the program, and on rank 0 changes the lowest bit of the last byte of the file that the pattern finds last.
CHANGED = """#!{python}
import os, pathlib, subprocess, sys
code = subprocess.run(["{program}", *sys.argv[1:]]).returncode
folder = pathlib.Path(sys.argv[sys.argv.index("{option}") + 1])
for file in sorted(folder.parent.glob("{pattern}"))[-1:]:
    if os.environ["OMPI_COMM_WORLD_RANK"] == "0":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
sys.exit(code)
"""


def same_bits(base, *arguments, expect):
    command = [ROOT / "tests/equivalence/same_bits.py", base, "--build", BUILD, "--steps", 2, *arguments]
    result = subprocess.run(
        list(map(str, [sys.executable, *command])), capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def changed(tmp_path):
    """A folder of programs, one of which changes a bit of what it has computed."""

    def make(name, option, pattern):
        programs = tmp_path / "examples"
        programs.mkdir()
        for program in ("quickstart", "train_lm"):
            (programs / program).symlink_to((BUILD / "examples" / program).resolve())
        (programs / name).unlink()
        text = CHANGED.format(python=sys.executable, program=BUILD / "examples" / name, option=option, pattern=pattern)
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
        return tmp_path

    return make


def test_a_build_is_the_same_as_itself():
    output = same_bits(BUILD, "--ranks", 2, expect=0)
    assert output.count("none differ") == 3 and "the same, bit for bit" in output
    assert "cannot write" not in output


def test_a_changed_bit_of_what_quickstart_computes_is_found(changed):
    output = same_bits(changed("quickstart", "--dump", "computed.*"), *ALONE, "quickstart", expect=1)
    assert "quickstart, 1 ranks: 2 results, 1 differ\n  computed.0: 1 of" in output


def test_a_changed_bit_of_a_checkpoint_is_found(changed):
    output = same_bits(changed("train_lm", "--output", "output/checkpoint/*.safetensors"), *ALONE, "train_lm", expect=1)
    assert output.count(" results, 1 differ\n") == 2 and output.count(": 1 of ") == 2


def test_a_copied_build_runs_over_its_own_library(tmp_path):
    """Not over that of the folder that it was built in, which may be this build's."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "src").mkdir()
    shutil.copy(BUILD / "examples/quickstart", tmp_path / "examples")
    for library in (BUILD / "src").glob("libanabranch.so*"):
        (tmp_path / "src" / library.name).write_text("no library")
    result = same_bits(tmp_path, *ALONE, "quickstart", expect=1)
    assert "the same, bit for bit" not in result


def test_a_program_that_can_not_write_what_it_computes_is_compared_by_what_it_prints(changed):
    folder = changed("quickstart", "--dump", "computed.*")
    (folder / "examples/quickstart").write_text(f'#!/bin/bash\nexec "{BUILD}/examples/quickstart"\n')
    output = same_bits(folder, *ALONE, "quickstart", expect=0)
    assert "only its output is compared" in output
