"""launch/train.sh, with real mpirun and a program in the place of the example."""

import os
import re
import shutil
import signal
import sys
import time

import pytest
from conftest import ROOT, executable

pytestmark = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")

# Writes what it was given, per rank, and what a run leaves behind. With --wait it waits for a signal,
# and then takes longer to save than mpirun's one second of patience.
PROGRAM = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
arguments = sys.argv[1:]
if "--help" in arguments:
    print("OPTIONS OF THE EXAMPLE")
    sys.exit()
output = pathlib.Path(arguments[arguments.index("--output") + 1])
rank = os.environ["OMPI_COMM_WORLD_RANK"]
received = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: received.append(number))
(output / f"rank{{rank}}.json").write_text(json.dumps(
    dict(arguments=arguments, threads=os.environ.get("OMP_NUM_THREADS"), folder=os.getcwd())))
if "--fail" in arguments:
    sys.exit(2)
(output / "metrics.jsonl").write_text('{{"step": 1, "loss": 2.0, "imbalance": 1.5, "tokens_per_second": 100.0, "load": [[0.5, 0.5]]}}\\n')
(output / "sample.txt").write_text("In the beginning was the stub")
if rank == "0":
    print("In the beginning was the stub")
if "--wait" in arguments:
    while not received:
        time.sleep(0.05)
    time.sleep(3)
    (output / f"saved{{rank}}").touch()
    # As ranks do that save together: mpirun ends the others as soon as one leaves with a code.
    while not all((output / f"saved{{r}}").exists() for r in range(int(os.environ["OMPI_COMM_WORLD_SIZE"]))):
        time.sleep(0.05)
    sys.exit(128 + received[0])
"""


@pytest.fixture
def project(project):
    executable(project.root / "build/release/examples/train_lm", PROGRAM)
    project.text = project.root / "a text.txt"
    project.text.write_text("text")
    project.output = project.root / "an output"
    return project


def started(project, rank):
    import json

    return json.loads((project.output / f"rank{rank}.json").read_text())


def train(project, *arguments, **options):
    return project.run("train.sh", "--data", project.text, "--output", project.output, *arguments, **options)


def test_help_has_the_script_s_options_and_the_example_s(project):
    output = project.run("train.sh", "--help")
    for option in ("-n", "--steps", "--data", "--output", "--seed", "--batch-size", "--experts", "--top-k", "--resume"):
        assert re.search(rf"^ *{option}\b|, {option}\b", output, re.MULTILINE), option
    assert "OPTIONS OF THE EXAMPLE" in output
    assert "shellcheck" not in output and "set -euo" not in output
    assert project.calls() == []  # neither set up nor built


def test_sets_up_and_builds_the_example_alone(project):
    train(project)
    assert project.calls()[0] == "setup"
    assert re.fullmatch(r"cmake --preset release", project.calls()[1])
    assert re.search(r"--build --preset release .*--target train_lm$", project.calls()[2])


@pytest.mark.parametrize(
    "gpu, built, preset", [(False, "cuda", "cpu"), (True, "cuda", "release"), (False, "release", "release")]
)
def test_without_a_gpu_nothing_of_cuda_is_built(project, gpu, built, preset):
    """Unless there is a build that has it already."""
    shutil.move(project.root / "build/release", project.root / "build" / built)
    project.command("nvidia-smi", "echo 'GPU 0: one'" if gpu else "exit 9")
    path = f"{project.root / '.venv/bin'}:{os.environ['PATH']}"
    output = project.run("train.sh", "--help", environment={"PATH": path})
    assert f"build/{preset}/examples/train_lm" in output


def test_options_reach_every_rank_as_they_were_given(project):
    given = ["--steps", "3", "--prompt", "two words and an *", "--experts=4", "--resume", "--top-k", "1"]
    train(project, "-n", "3", *given)
    for rank in range(3):
        arguments = started(project, rank)["arguments"]
        assert arguments[-len(given) :] == given
        assert arguments[arguments.index("--data") + 1] == str(project.text)
        assert arguments[arguments.index("--output") + 1] == str(project.output)
    assert not (project.output / "rank3.json").exists()


def test_options_with_an_equals_sign(project):
    other = project.root / "elsewhere"
    train(project, "-n", "1", f"--output={other}")
    assert (other / "rank0.json").exists() and not project.output.exists()


def test_two_ranks_are_the_default_and_share_the_cores(project):
    train(project, environment={"OMP_NUM_THREADS": ""})
    assert not (project.output / "rank2.json").exists()
    cores = len(os.sched_getaffinity(0))
    assert [started(project, rank)["threads"] for rank in (0, 1)] == [str(max(1, cores // 2))] * 2


def test_threads_can_be_set(project):
    train(project, environment={"OMP_NUM_THREADS": "7"})
    assert started(project, 1)["threads"] == "7"


def test_more_ranks_than_cores(project):
    ranks = len(os.sched_getaffinity(0)) + 2
    train(project, "-n", ranks, environment={"OMP_NUM_THREADS": ""})
    assert started(project, ranks - 1)["threads"] == "1"


def test_relative_paths_are_those_of_the_caller(project):
    project.run("train.sh", "--data", "a text.txt", "--output", "here", cwd=project.root)
    assert (project.root / "here/loss.png").exists()


def test_ends_with_plots_sample_and_where_they_are(project):
    output = train(project)
    assert "In the beginning was the stub" in output
    for name in ("metrics.jsonl", "loss.png", "load.png", "sample.txt"):
        assert str(project.output / name) in output[output.index("==> Done") :]
    assert (project.output / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("ranks", ["0", "-1", "two", "1.5", ""])
def test_ranks_must_be_a_number(project, ranks):
    assert "-n" in train(project, "-n", ranks, expect=1)
    assert project.calls() == []


@pytest.mark.parametrize("option", ["-n", "--data", "--output"])
def test_an_option_without_its_value(project, option):
    assert f"{option} needs a value" in project.run("train.sh", option, expect=1)


def test_a_text_that_is_not_there(project):
    assert "missing.txt" in project.run("train.sh", "--data", "missing.txt", expect=1)
    assert project.calls() == []


def test_a_failed_build_ends_it(project):
    output = train(project, expect=3, environment={"CMAKE_EXIT": "3"})
    assert "Training" not in output and not project.output.exists()


def test_the_program_s_exit_code_is_the_script_s(project):
    output = train(project, "--fail", expect=2)
    assert "exit code 2" in output and "Done" not in output
    assert not (project.output / "loss.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_ranks_and_they_have_time_to_save(project, number):
    process = project.start(
        "train.sh", "--data", project.text, "--output", project.output, "--wait", start_new_session=True
    )
    for _ in range(600):
        if all((project.output / name).exists() for name in ("rank0.json", "rank1.json", "sample.txt")):
            break
        time.sleep(0.05)
    # To the script alone for SIGTERM, as `kill` does; to its whole group for SIGINT, as Ctrl-C does.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert (project.output / "saved0").exists() and (project.output / "saved1").exists(), output
    assert "--resume continues" in output
    assert (project.output / "loss.png").exists()


def test_without_data_the_king_james_text_is_printed_once(project):
    commands = project.root / "commands"
    executable(commands / "bible", '#!/bin/bash\necho "called with $*"\n')
    environment = {"PATH": f"{commands}:{os.environ['PATH']}"}
    for _ in range(2):
        project.run("train.sh", "--output", project.output, environment=environment)
        executable(commands / "bible", "#!/bin/bash\nexit 1\n")
    data = started(project, 0)["arguments"]
    text = project.root / "build/data/king_james.txt"
    assert data[data.index("--data") + 1] == str(text)
    assert text.read_text() == "called with -f gen1:1-rev22:21\n"


def test_a_text_that_could_not_be_printed_is_not_kept(project):
    commands = project.root / "commands"
    executable(commands / "bible", "#!/bin/bash\necho half\nexit 1\n")
    environment = {"PATH": f"{commands}:{os.environ['PATH']}"}
    project.run("train.sh", "--output", project.output, environment=environment, expect=1)
    assert not (project.root / "build/data/king_james.txt").exists()


@pytest.mark.skipif(shutil.which("bible") is None, reason="needs Debian's bible-kjv")
def test_the_real_text(project):
    project.run("train.sh", "--output", project.output)
    text = (project.root / "build/data/king_james.txt").read_text()
    assert text.startswith("Ge1:1 In the beginning God created the heaven and the earth.")
    assert 4_300_000 < len(text) < 4_500_000


def test_the_real_scripts_are_clean():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck")
    import subprocess

    scripts = [*map(str, (ROOT / "launch").rglob("*.sh")), *map(str, (ROOT / "launch/slurm").iterdir()), str(ROOT / ".ci/run")]
    result = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stdout
