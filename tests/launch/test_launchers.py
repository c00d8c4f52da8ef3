"""launch/mpirun.sh and launch/torchrun.sh, with the real launchers and small programs."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, executable

BIND = Path(os.environ.get("ANABRANCH_BIND", ROOT / "build/release/tools/anabranch-bind"))
SHOW = [str(BIND), "--show"]
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
needs_bind = pytest.mark.skipif(not BIND.exists(), reason="anabranch-bind is not built (it needs hwloc)")


@pytest.fixture
def project(project):
    """With the built anabranch-bind in its place."""
    if BIND.exists():
        tools = project.root / "build/release/tools"
        tools.mkdir(parents=True)
        (tools / "anabranch-bind").symlink_to(BIND)
    return project


def ranks_in(output):
    return sorted((json.loads(line) for line in re.findall(r"\{.*\}", output)), key=lambda rank: rank["rank"])


@needs_mpirun
@needs_bind
def test_mpirun_starts_bound_ranks(project):
    ranks = ranks_in(project.run("mpirun.sh", "-n", "3", *SHOW))
    assert [(r["rank"], r["size"], r["local_rank"], r["local_size"]) for r in ranks] == [(i, 3, i, 3) for i in range(3)]
    assert {r["launcher"] for r in ranks} == {"Open MPI"}


@needs_mpirun
def test_the_program_s_words_arrive_as_they_are(project):
    program = executable(project.root / "program", '#!/bin/bash\nprintf "<%s>" "$@"\n')
    output = project.run("mpirun.sh", "-n", "1", "--", program, "two words", "--help", "*", "")
    assert "<two words><--help><*><>" in output


@needs_mpirun
def test_ranks_can_be_left_unbound(project):
    program = executable(project.root / "program", '#!/bin/bash\necho "threads ${OMP_NUM_THREADS:-none}"\n')
    environment = {"OMP_NUM_THREADS": ""}
    assert "threads none" in project.run("mpirun.sh", "-n", "1", "--no-bind", program, environment=environment)
    if BIND.exists():
        del environment["OMP_NUM_THREADS"]
        assert "threads 5" in project.run("mpirun.sh", "-n", "1", program, environment={"OMP_NUM_THREADS": "5"})


@needs_mpirun
def test_without_anabranch_bind_it_says_so(project):
    shutil.rmtree(project.root / "build", ignore_errors=True)
    output = project.run("mpirun.sh", "-n", "1", "true")
    assert "ranks are not bound" in output


@needs_mpirun
def test_the_exit_code_is_the_program_s(project):
    project.run("mpirun.sh", "-n", "2", "sh", "-c", "exit 9", expect=9)


@needs_mpirun
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_have_time_after_a_signal(project, number):
    program = executable(
        project.root / "program",
        f"#!{sys.executable}\n"
        "import os, pathlib, signal, sys, time\n"
        "me = os.environ['OMPI_COMM_WORLD_RANK']\n"
        "received = []\n"
        "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, lambda n, _: received.append(n))\n"
        "pathlib.Path(f'started{me}').touch()\n"
        "while not received: time.sleep(0.05)\n"
        "time.sleep(2)\n"
        "pathlib.Path(f'saved{me}').touch()\n"
        # As ranks do that save together: mpirun ends the others as soon as one leaves with a code.
        "while not all(pathlib.Path(f'saved{r}').exists() for r in (0, 1)): time.sleep(0.05)\n"
        "sys.exit(128 + received[0])\n",
    )
    process = project.start("mpirun.sh", "-n", "2", program, cwd=project.root, start_new_session=True)
    for _ in range(600):
        if (project.root / "started0").exists() and (project.root / "started1").exists():
            break
        time.sleep(0.05)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert (project.root / "saved0").exists() and (project.root / "saved1").exists(), output


@needs_mpirun
def test_site_settings_reach_every_rank(project):
    (project.launch / "site.sh").write_text(
        'export FROM_SITE=modules\nrank_prefix=(env FROM_PREFIX=container)\nsite_mpirun_flags=(-x FROM_SITE)\n'
    )
    program = executable(project.root / "program", '#!/bin/bash\necho "$FROM_SITE $FROM_PREFIX"\n')
    assert "modules container" in project.run("mpirun.sh", "-n", "1", program)


@pytest.mark.parametrize("script", ["mpirun.sh", "torchrun.sh"])
def test_what_is_refused(project, script):
    for ranks in ("0", "two", "-1", ""):
        assert "-n must be a number" in project.run(script, "-n", ranks, "true", expect=1)
    assert "-n must be a number" in project.run(script, "true", expect=1)
    assert "no program" in project.run(script, "-n", "1", expect=1)
    assert "-n needs a value" in project.run(script, "-n", expect=1)
    assert "unknown option '--ranks'" in project.run(script, "--ranks", "2", "true", expect=1)
    assert "Usage: launch/" in project.run(script, "--help")


@needs_bind
def test_torchrun_starts_bound_ranks(project):
    ranks = ranks_in(project.run("torchrun.sh", "-n", "2", *SHOW))
    assert [(r["rank"], r["size"], r["local_rank"], r["local_size"]) for r in ranks] == [(i, 2, i, 2) for i in range(2)]
    assert {r["launcher"] for r in ranks} == {"torchrun"}


def test_torchrun_on_several_nodes_needs_a_place_to_meet(project):
    environment = {"SLURM_JOB_NODELIST": "", "SLURM_JOB_NUM_NODES": ""}
    output = project.run("torchrun.sh", "-n", "1", "--nodes", "2", "true", expect=1, environment=environment)
    assert "where do the 2 nodes meet" in output


def test_torchrun_takes_nodes_and_meeting_place_from_slurm(project):
    """With a scontrol that knows where the first node is, and a Python that says what it was given."""
    commands = project.root / "commands"
    executable(commands / "scontrol", "#!/bin/bash\nprintf '%s\\n' first second\n")
    executable(project.root / ".venv/bin/python", '#!/bin/bash\nprintf "%s\\n" "$@"\n')
    environment = {
        "SLURM_JOB_NODELIST": "first,second",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "12345",  # names the port
        "PATH": f"{commands}:{os.environ['PATH']}",
    }
    output = project.run("torchrun.sh", "-n", "4", "--no-bind", "train.sh", environment=environment)
    given = output.splitlines()
    options = dict(itertools.pairwise(given))
    assert options["-m"] == "torch.distributed.run"
    assert options["--nproc-per-node"] == "4"
    assert options["--nnodes"] == "2"
    assert options["--rdzv-endpoint"] == "first:22345"
    assert options["--rdzv-id"] == "12345"
    assert given[-1] == "train.sh"


def test_mpirun_says_when_there_is_none(project):
    environment = {"PATH": str(project.root / "empty")}
    (project.root / "empty").mkdir()
    for name in ("bash", "dirname", "env", "cat", "awk"):
        (project.root / "empty" / name).symlink_to(shutil.which(name))
    result = subprocess.run(
        [shutil.which("bash"), project.launch / "mpirun.sh", "-n", "1", "true"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1 and "there is no mpirun" in result.stderr
