"""launch/test.sh and .ci/run: what they build, what they pass on, and their exit code."""

import shutil

import pytest
from conftest import ROOT


def test_builds_everything_and_runs_everything(project):
    project.run("test.sh")
    setup, configure, build, test = project.calls()
    assert setup == "setup"
    assert configure == "cmake --preset release"
    assert build.startswith("cmake --build --preset release") and "--target" not in build
    assert test.startswith("ctest --preset release")


def test_arguments_are_for_ctest(project):
    project.run("test.sh", "-R", "exchange", "-N")
    assert project.calls()[-1].endswith(" -R exchange -N")


@pytest.mark.parametrize("given", [["--preset", "asan"], ["--preset=asan"]])
def test_another_preset(project, given):
    project.run("test.sh", *given, "-L", "np2")
    _, configure, build, test = project.calls()
    assert configure == "cmake --preset asan"
    assert "--preset asan" in build
    assert test.startswith("ctest --preset asan") and test.endswith("-L np2")


def test_a_failed_build_is_not_tested(project):
    project.run("test.sh", expect=4, environment={"CMAKE_EXIT": "4"})
    assert not any(call.startswith("ctest") for call in project.calls())


def test_a_failed_test_fails_it(project):
    project.run("test.sh", expect=8, environment={"CTEST_EXIT": "8"})


def test_help(project):
    output = project.run("test.sh", "--help")
    assert "--preset NAME" in output and "asan" in output
    assert project.calls() == []


def test_a_preset_without_a_name(project):
    assert "--preset needs a name" in project.run("test.sh", "--preset", expect=1)


def test_continuous_integration_calls_it(project):
    shutil.copytree(ROOT / ".ci", project.root / ".ci")
    project.run("../.ci/run", expect=8, environment={"CTEST_EXIT": "8"})
    assert project.calls()[-1].startswith("ctest --preset release")
