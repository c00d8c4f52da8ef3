"""launch/slurm/train.sbatch on a real Slurm: jobs that end early go on where they were."""

import json
import re

import pytest
from conftest import BUILD, ROOT
from metrics_fields import without_the_machine

STEPS = 60
MODEL = {
    "hidden": 32,
    "expert-hidden": 64,
    "layers": 2,
    "heads": 2,
    "experts": 5,
    "steps": STEPS,
    "batch-size": 8,
    "sequence-length": 32,
    "warmup": 4,
    "validation-interval": STEPS,
    "validation-sequences": 4,
    "log-interval": 1,
    "checkpoint-interval": 10,
    "sample-length": 8,
    "deadline": 20,
}

pytestmark = pytest.mark.skipif(not (BUILD / "examples/train_lm").exists(), reason="train_lm is not built")


class Run:
    """One submitted training run on `ranks` ranks of two hosts."""

    def __init__(self, cluster, name, ranks, launcher="srun", options=None):
        self.cluster = cluster
        self.output = cluster.base / name
        self.log = cluster.base / f"{name}.log"
        options = {"data": ROOT / "docs/architecture.md", "output": self.output, **MODEL, **(options or {})}
        arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
        flags = ["--nodes=2", f"--ntasks-per-node={ranks // 2}", f"--output={self.log}"]
        environment = {"ANABRANCH_LAUNCHER": launcher, "ANABRANCH_PROGRAM": BUILD / "examples/train_lm"}
        self.job = cluster.submit("train.sbatch", *arguments, flags=flags, environment=environment)

    def finish(self, state="COMPLETED"):
        self.cluster.wait_for_end(self.job, self.log, state)
        return self

    def steps(self):
        file = self.output / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_step(self, step):
        self.cluster.wait_until(lambda: len(self.steps()) >= step, 60, self.log)

    def curve(self):
        """What does not depend on the machine, of every step."""
        return list(map(without_the_machine, self.steps()))


def time_is_near(cluster, run):
    # What --signal=B:USR1@300 does 300 s before the limit.
    cluster.slurm("scancel", "--batch", "--signal=USR1", run.job)


def requeued(cluster, run):
    # What pre-emption without a grace time does, too.
    cluster.slurm("scontrol", "requeue", run.job)


def a_rank_is_killed(cluster, run):
    # The hosts share one PID namespace.
    kill = f"pkill -KILL --oldest --ns $$ --nslist net -f -- '--output {run.output} '"
    cluster.run("n2", ["bash", "-c", f"exec {kill}"])


# What names the rank that was killed on n2: the launcher, or a rank that has lost it.
NAMES_THE_KILLED = {
    "srun": r"srun: error: n2: task [23]: Killed",
    "mpirun": r"process rank 1 with PID \d+ on node n2 exited on signal 9|rank 0: error: .*rank 1\b",
}


# Ranks, launcher, and what happens at a third of the steps.
CASES = [
    (2, "srun", time_is_near),
    (2, "mpirun", time_is_near),
    (4, "srun", requeued),
    (4, "srun", a_rank_is_killed),
    (2, "mpirun", a_rank_is_killed),
]


@pytest.fixture(scope="session")
def uninterrupted(cluster, interrupted):
    """Curves by number of ranks."""
    runs = {ranks: Run(cluster, f"uninterrupted{ranks}", ranks) for ranks in (2, 4)}
    return {ranks: run.finish().curve() for ranks, run in runs.items()}


@pytest.fixture(scope="session")
def interrupted(cluster):
    """A run of each case, all at once, after its interruption."""
    runs = {case: Run(cluster, f"{case[2].__name__}_{case[1]}", *case[:2]) for case in CASES}
    waiting = dict(runs)

    def interrupt_those_due():
        for case, run in list(waiting.items()):
            if len(run.steps()) >= STEPS // 3:
                case[2](cluster, run)
                del waiting[case]
        return not waiting

    cluster.wait_until(interrupt_those_due, 120, next(iter(runs.values())).log)
    return runs


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2].__name__}-{case[1]}-{case[0]}")
def test_an_interrupted_job_goes_on_by_itself(cluster, uninterrupted, interrupted, case):
    ranks, launcher, interrupt = case
    run = interrupted[case].finish()
    assert cluster.job(run.job)["Restarts"] == "1", cluster.explain(run.job, run.log)
    log = run.log.read_text()
    resumed = re.search(r"resuming after step (\d+)", log)
    assert resumed and STEPS // 6 <= int(resumed[1]) < STEPS, log
    assert f"on {ranks} ranks (mpi" in log
    assert [step["step"] for step in run.curve()] == list(range(1, STEPS + 1))
    assert run.curve() == uninterrupted[ranks]
    if interrupt is a_rank_is_killed:
        assert re.search(NAMES_THE_KILLED[launcher], log), log
    assert no_process_is_left(cluster, run), cluster.explain(run.job, run.log)


def no_process_is_left(cluster, run):
    return cluster.run("head", ["pgrep", "--full", f"[-]-output {run.output}"], check=False).stdout == ""


def test_a_job_of_a_higher_partition_has_it_make_way(cluster, uninterrupted):
    run = Run(cluster, "preempted", 2)
    run.wait_for_step(STEPS // 6 + 2)
    # So that it is still there when Slurm comes to it, with CONT and TERM to the ranks.
    cluster.slurm("scancel", "--signal=STOP", run.job)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    other = cluster.slurm(*urgent, "--wrap=sleep 0.1").strip()
    run.finish()
    log = run.log.read_text()
    assert cluster.state(other) == "COMPLETED"
    assert cluster.job(run.job)["Restarts"] == "1", cluster.explain(run.job, run.log)
    assert "pre-empted: requeued" in log
    # The ranks have saved after the step in which they were told, rather than lost what came after step 10.
    saved = re.search(r"stopped after step (\d+), saved", log)
    assert saved and f"resuming after step {saved[1]} of" in log, log
    assert run.curve() == uninterrupted[2]


def test_a_job_that_can_not_save_at_its_time_limit_stays_down(cluster):
    run = Run(cluster, "unsaved", 2, options={"steps": 10**6, "checkpoint-interval": 0})
    run.wait_for_step(3)
    (run.output / "checkpoint").write_text("a file where the folder should be")
    time_is_near(cluster, run)
    run.finish("FAILED")
    assert cluster.job(run.job)["Restarts"] == "0"
    log = run.log.read_text()
    assert "the time limit is near: saving" in log and "without a checkpoint since it started: not requeued" in log


def test_wrong_options_end_the_job_for_good(cluster):
    run = Run(cluster, "refused", 2, options={"top-k": 9}).finish("FAILED")
    assert cluster.job(run.job)["Restarts"] == "0"
    assert "--top-k 9 is more than --experts 5" in run.log.read_text()
    assert "not requeued" in run.log.read_text()


def test_a_cancelled_job_stays_cancelled(cluster):
    run = Run(cluster, "cancelled", 2)
    run.wait_for_step(5)
    cluster.slurm("scancel", run.job)
    run.finish("CANCELLED")
    # The ranks' last words come after the end of the job's state.
    cluster.wait_until(lambda: "to continue: the same command" in run.log.read_text(), 20, run.log)
    assert cluster.job(run.job)["Restarts"] == "0"
