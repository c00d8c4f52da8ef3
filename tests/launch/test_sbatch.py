"""launch/slurm/train.sbatch and scaling.sbatch: the command lines they start ranks with, and what they ask of
Slurm. srun, scontrol and scancel only say what they were given; tests/slurm has a real Slurm."""

import os

import pytest
from conftest import executable

JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_SUBMIT_DIR": "",
}


@pytest.fixture
def job(project):
    """Runs a script of launch/slurm as Slurm would on the first node of a job; `job.calls` then has a list of
    words for each call. srun ends with SRUN_EXIT; before that it saves a checkpoint if SAVES is set, and Slurm says
    that the time limit is near if TIME_IS_UP is."""
    commands = project.root / "commands"
    log = project.root / "slurm_calls"
    executable(project.root / "build/release/tools/anabranch-bind", "#!/bin/bash\n")
    executable(project.root / "build/release/examples/train_lm", "#!/bin/bash\n")
    index = project.root / "run/checkpoint/checkpoint.index.json"
    index.parent.mkdir(parents=True)
    for name in ("srun", "scontrol", "scancel"):
        executable(
            commands / name,
            f'#!/bin/bash\nprintf "%s\\x1f" {name} "$@" >> "{log}"; echo >> "{log}"\n'
            f'if [[ {name} == srun && -n "${{SAVES:-}}" ]]; then echo {{}} > "{index}"; fi\n'
            f'if [[ {name}:$1 == scontrol:show ]]; then echo "PreemptTime=${{PREEMPT_TIME:-None}}"; fi\n'
            f'if [[ {name} == srun && -n "${{TIME_IS_UP:-}}" ]]; then kill -s USR1 "$PPID"; sleep 0.5; fi\n'
            f'if [[ {name} == srun ]]; then exit "${{SRUN_EXIT:-0}}"; fi\n',
        )

    def run(script, *arguments, expect=0, site="", **environment):
        (project.launch / "site.sh").write_text(site)
        log.unlink(missing_ok=True)
        path = f"{commands}:{os.environ['PATH']}"
        given = {**JOB, "ANABRANCH_ROOT": str(project.root), "PATH": path, **environment}
        words = ["--data", "text", "--output", project.root / "run", *arguments] if script == "train.sbatch" else arguments
        run.output = project.run(f"slurm/{script}", *words, expect=expect, environment=given)
        run.calls = [line.split("\x1f")[:-1] for line in log.read_text().splitlines()] if log.exists() else []
        return run.calls

    run.root = project.root
    run.index = index
    return run


def of(calls, command):
    return [words for words in calls if words[0] == command]


def test_ranks_are_started_bound_by_the_project_and_not_by_slurm(job):
    (words,) = job("train.sbatch", "--steps", "3")
    assert words[:4] == ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "--cpu-bind=none"]
    bind, program, *arguments = words[4:]
    assert bind == str(job.root / "build/release/tools/anabranch-bind")
    assert program == str(job.root / "build/release/examples/train_lm")
    assert arguments[:2] == ["--progress", "lines"] and arguments[-2:] == ["--steps", "3"]
    assert "--resume" not in arguments
    job.index.write_text("{}")
    assert of(job("train.sbatch", ANABRANCH_MPI_TYPE="pmi2"), "srun")[0][-1] == "--resume"
    assert job.calls[0][1] == "--mpi=pmi2"


def test_an_apptainer_container_is_around_binding_and_program(job):
    site = 'rank_prefix=(apptainer exec --nv --bind "$project_root" "/images/with space.sif")\n'
    (words,) = job("train.sbatch", site=site)
    prefix = ["apptainer", "exec", "--nv", "--bind", str(job.root), "/images/with space.sif"]
    assert words[4:11] == [*prefix, str(job.root / "build/release/tools/anabranch-bind")]


def test_pyxis_and_gpu_flags_are_srun_s_own(job):
    site = 'site_srun_flags=(--gpu-bind=none --container-image=a.sqsh "--container-mounts=$project_root:$project_root")\n'
    for script, more in (("train.sbatch", {}), ("scaling.sbatch", {"SLURM_ARRAY_TASK_ID": "8"})):
        flags = ["--gpu-bind=none", "--container-image=a.sqsh", f"--container-mounts={job.root}:{job.root}"]
        program = executable(job.root / "step", "#!/bin/bash\n")
        options = ["--output", job.root / "study", "--program", program] if script == "scaling.sbatch" else []
        # The study fails: this srun measures nothing.
        job(script, *options, site=site, expect=0 if script == "train.sbatch" else 1, **more)
        words = of(job.calls, "srun")[0]
        place = words.index("--gpu-bind=none")
        assert words[place : place + 4] == [*flags, str(job.root / "build/release/tools/anabranch-bind")]


def test_a_study_uses_as_few_nodes_as_its_ranks_fill(job):
    program = executable(job.root / "step", "#!/bin/bash\n")
    for ranks, nodes in ((1, 1), (4, 1), (5, 2), (8, 2)):
        options = ["--output", job.root / f"study{ranks}", "--program", program, "--scaling", "weak"]
        job("scaling.sbatch", *options, expect=1, SLURM_ARRAY_TASK_ID=str(ranks))
        assert {f"--nodes={nodes}", f"--ntasks={ranks}"} <= set(of(job.calls, "srun")[0])
    job("scaling.sbatch", expect=1, SLURM_ARRAY_TASK_ID="9")
    assert "array task 9 needs as many ranks; the job has 8" in job.output


@pytest.mark.parametrize(
    ("environment", "expect", "requeued", "says"),
    [
        ({}, 0, False, "Done"),
        ({"SRUN_EXIT": "2"}, 2, False, "refused"),
        ({"SRUN_EXIT": "137"}, 137, False, "without a checkpoint since it started"),
        ({"SRUN_EXIT": "137", "SAVES": "1"}, 0, True, "failed with exit code 137"),
        # The ranks were told before they could listen, or could not save: again would be for ever.
        ({"SRUN_EXIT": "143", "TIME_IS_UP": "1"}, 143, False, "time is up, without a checkpoint since it started"),
        ({"SRUN_EXIT": "1", "TIME_IS_UP": "1"}, 1, False, "time is up, without a checkpoint since it started"),
        ({"SRUN_EXIT": "143", "TIME_IS_UP": "1", "SAVES": "1"}, 0, True, "time is up: requeued"),
        ({"SRUN_EXIT": "143", "PREEMPT_TIME": "2026-01-01T00:00:00"}, 0, True, "pre-empted"),
    ],
)
def test_what_becomes_of_a_job_that_has_ended(job, environment, expect, requeued, says):
    calls = job("train.sbatch", expect=expect, **environment)
    assert (["scontrol", "requeue", "7"] in calls) == requeued
    assert says in job.output


@pytest.mark.parametrize("signal", ["USR1", "TERM"])
def test_a_signal_before_there_are_ranks_is_heard(job, signal):
    # While the site's own script runs, which may load modules.
    calls = job("train.sbatch", site=f"kill -s {signal} $$\n", expect=143)
    assert not of(calls, "srun") and ["scontrol", "requeue", "7"] not in calls
    assert "told to end before any rank was started" in job.output
