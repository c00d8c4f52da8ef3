"""launch/test.sh and .ci/run: what they build, what they pass on, and their exit code."""

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT


def test_builds_everything_and_runs_everything(project):
    project.run("test.sh")
    setup, configure, build, test = project.calls()
    assert setup in ("setup --tests", "setup --tests --slurm")
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
    calls = project.calls()
    assert calls[0] == "setup --tests --slurm"
    assert calls[-1].startswith("ctest --preset release") and "--slurm" not in calls[-1]


def test_slurm_is_set_up_unasked_only_where_no_systemd_would_run_it(project):
    project.run("test.sh")
    assert (project.calls()[0] == "setup --tests --slurm") == (not Path("/run/systemd/system").is_dir())
    project.run("test.sh", "--slurm", "-N")
    assert project.calls()[4] == "setup --tests --slurm" and project.calls()[-1].endswith(" -N")


def test_the_dockerfile_runs_the_commands_of_continuous_integration(project):
    """Its set-up is the one of test.sh, its build is test.sh's, and what a container runs is .ci/run."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    project.run("test.sh", "--slurm", "-N")
    assert any(line.startswith(f"RUN launch/{project.calls()[0].replace('setup', 'setup.sh')} ") for line in lines)
    assert "RUN CI=true launch/test.sh --slurm -N" in lines and lines[-1] == 'CMD ["bash", ".ci/run"]'
    assert "launch/test.sh\" --slurm" in (ROOT / ".ci/run").read_text()


@pytest.mark.skipif(not (ROOT / ".venv/bin/ninja").exists(), reason="not set up here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_is_no_success(tmp_path, number):
    """Ninja 1.13.0 reports one as a success, and tests would run on what there was before."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(slow LANGUAGES NONE)\n"
        "add_custom_target(wait ALL COMMAND cmake -E touch started COMMAND cmake -E sleep 60)\n"
    )
    cmake, ninja = (ROOT / ".venv/bin" / name for name in ("cmake", "ninja"))
    build = tmp_path / "build"
    subprocess.run(
        [cmake, "-G", "Ninja", "-D", f"CMAKE_MAKE_PROGRAM={ninja}", "-S", tmp_path, "-B", build], check=True
    )
    process = subprocess.Popen([cmake, "--build", build])
    for _ in range(400):
        if (build / "started").exists():
            break
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        subprocess.run(["kill", "-s", str(number.value), child], check=True)
    assert process.wait(timeout=30) != 0
