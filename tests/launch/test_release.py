"""tools/release: what it changes, commits and tags, and what it refuses."""

import runpy
import shutil
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


LIBRARY = {
    "CMakeLists.txt": "cmake_minimum_required(VERSION 3.25)\nproject(\n  anabranch\n  VERSION 1.2.3\n  LANGUAGES CXX)\n"
    "add_library(anabranch SHARED library.cpp)\ntarget_include_directories(anabranch PUBLIC include)\n",
    "include/anabranch/options.h": "struct Options { int size; };\nint first(const Options& options);\nint second();\n",
    "library.cpp": '#include <anabranch/options.h>\nstruct Private { int x; };\nint hidden(Private p) { return p.x; }\n'
    "int first(const Options& options) { return options.size; }\nint second() { return 2; }\n",
    ".gitignore": "/build/\n",
}
CHANGES = {  # (file, what is there, what takes its place), and whether a patch may do so
    "nothing": (("library.cpp", "return 2", "return 3"), True),
    "added": (("library.cpp", "int second", "int third() { return 3; }\nint second"), True),
    "private": (("library.cpp", "int x;", "int x, y;"), True),
    "a larger struct": (("include/anabranch/options.h", "int size;", "int size, more;"), False),
    "removed": (("library.cpp", "int second() { return 2; }", ""), False),
    "another argument": (("library.cpp", "int second()", "int second(long)"), False),
}


@pytest.mark.skipif(shutil.which("abidiff") is None, reason="abidiff is not installed")
@pytest.mark.skipif(not (ROOT / ".venv/bin/cmake").exists(), reason="not set up here")
def test_a_patch_does_not_change_the_binary_interface(repository):
    for name, text in LIBRARY.items():
        path = repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    git = ["git", "-C", repository]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "2"], check=True)
    subprocess.run([*git, "tag", "v1.2.3"], check=True)
    for name, ((file, old, new), allowed) in CHANGES.items():
        (repository / file).write_text(LIBRARY[file].replace(old, new))
        subprocess.run([*git, "commit", "-qam", name], check=True)
        result = release(repository, "1.2.4")
        assert result.returncode == (0 if allowed else 2), (name, result.stdout, result.stderr)
        assert allowed or "at least a minor release" in result.stderr, (name, result.stderr)
        subprocess.run([*git, "reset", "-q", "--hard", "v1.2.3"], check=True)
        if allowed:
            subprocess.run([*git, "tag", "-d", "v1.2.4"], check=True, capture_output=True)
    (repository / "include/anabranch/options.h").write_text(LIBRARY["include/anabranch/options.h"].replace("int size;", "int size, more;"))
    subprocess.run([*git, "commit", "-qam", "larger"], check=True)
    assert "type size changed" in release(repository, "1.3.0").stdout


@pytest.mark.parametrize("version", ["1.2.3", "1.2.5", "1.4.0", "3.0.0", "next"])
def test_another_version_does_not_follow(repository, version):
    result = release(repository, version)
    assert result.returncode == 2 and "does not follow 1.2.3: 1.2.4, 1.3.0, 2.0.0" in result.stderr


def test_nothing_to_say_and_changes_that_nobody_committed(repository):
    release(repository, "1.2.4")
    assert "says nothing" in release(repository, "1.2.5").stderr
    (repository / "CMakeLists.txt").write_text("")
    assert "not committed" in release(repository, "1.2.5").stderr


def test_the_project_s_own_files_are_as_it_wants_them(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")  # as where it is started
    script = runpy.run_path(str(ROOT / "tools/release"))
    assert script["VERSION_LINE"].search((ROOT / "CMakeLists.txt").read_text())
    assert script["HEADING"] in (ROOT / "CHANGELOG.md").read_text()
