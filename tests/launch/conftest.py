"""A project folder with the real scripts, in which what they call is recorded instead of done."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Project:
    """`launch` holds the real scripts but setup.sh; cmake and ctest write their arguments to a log."""

    def __init__(self, folder):
        self.root = folder
        self.launch = folder / "launch"
        self.log = folder / "calls.txt"
        shutil.copytree(ROOT / "launch", self.launch, ignore=shutil.ignore_patterns("__pycache__"))
        executable(self.launch / "setup.sh", f'#!/bin/bash\necho "setup${{*:+ $*}}" >> "{self.log}"\n')
        for name in ("cmake", "ctest"):
            self.command(name, f'echo "{name} $*" >> "{self.log}"\nexit "${{{name.upper()}_EXIT:-0}}"')
        executable(self.root / ".venv/bin/python", f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')

    def command(self, name, text):
        executable(self.root / ".venv/bin" / name, f"#!/bin/bash\n{text}\n")

    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []

    def start(self, script, *arguments, environment=None, **options):
        return subprocess.Popen(
            [str(self.launch / script), *map(str, arguments)],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            **options,
        )

    def run(self, script, *arguments, expect=0, **options):
        process = self.start(script, *arguments, **options)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == expect, output
        return output


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "project")
