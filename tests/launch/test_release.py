"""tools/release: what it changes, commits and tags, and what it refuses."""

import runpy
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def repository(tmp_path):
    """With the project's version and changelog, the latter with something to say."""
    (tmp_path / "CMakeLists.txt").write_text("cmake_minimum_required(VERSION 3.25)\nproject(\n  anabranch\n  VERSION 1.2.3\n  LANGUAGES CXX)\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [1.2.3] - 2026-01-01\n")
    for command in (["init", "-q"], ["config", "user.name", "T"], ["config", "user.email", "t@t"], ["add", "."], ["commit", "-qm", "1"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


def release(repository, version):
    command = [sys.executable, ROOT / "tools/release", version, "--root", repository]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", ["1.2.4", "1.3.0", "2.0.0"])
def test_a_release(repository, version):
    assert release(repository, version).returncode == 0
    assert f"  VERSION {version}\n" in (repository / "CMakeLists.txt").read_text()
    assert "VERSION 3.25" in (repository / "CMakeLists.txt").read_text()
    lines = (repository / "CHANGELOG.md").read_text().splitlines()
    assert lines[2] == "## [Unreleased]" and lines[4].startswith(f"## [{version}] - 20") and "- A thing." in lines[5:]
    tagged = subprocess.run(["git", "-C", repository, "describe", "--dirty"], capture_output=True, text=True, check=True)
    assert tagged.stdout.strip() == f"v{version}"


@pytest.mark.parametrize("version", ["1.2.3", "1.2.5", "1.4.0", "3.0.0", "next"])
def test_another_version_does_not_follow(repository, version):
    result = release(repository, version)
    assert result.returncode == 2 and "does not follow 1.2.3: 1.2.4, 1.3.0, 2.0.0" in result.stderr


def test_nothing_to_say_and_changes_that_nobody_committed(repository):
    release(repository, "1.2.4")
    assert "says nothing" in release(repository, "1.2.5").stderr
    (repository / "CMakeLists.txt").write_text("")
    assert "not committed" in release(repository, "1.2.5").stderr


def test_the_project_s_own_files_are_as_it_wants_them():
    script = runpy.run_path(str(ROOT / "tools/release"))
    assert script["VERSION_LINE"].search((ROOT / "CMakeLists.txt").read_text())
    assert script["HEADING"] in (ROOT / "CHANGELOG.md").read_text()
