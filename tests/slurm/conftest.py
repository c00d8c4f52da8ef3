"""A Slurm cluster of two virtual hosts for all tests of this folder; without one they are skipped."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import cluster as slurm  # noqa: E402
import virtual_hosts  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("ANABRANCH_BUILD", ROOT / "build/release"))

# Inherited by the jobs.
os.environ.update(virtual_hosts.MPI_ENVIRONMENT, ANABRANCH_ROOT=str(ROOT))


class Cluster(slurm.SlurmCluster):
    """With what the tests ask of it."""

    def submit(self, script, *arguments, flags=(), environment=None):
        """Submits a script of launch/slurm; returns the job's number."""
        variables = [f"{name}={value}" for name, value in (environment or {}).items()]
        command = ["env", *variables, "sbatch", "--parsable", *flags, ROOT / "launch/slurm" / script, *arguments]
        return self.slurm(*command).strip()

    def state(self, job):
        return self.job(job)["JobState"]

    def wait_for_end(self, job, log, state="COMPLETED", seconds=90):
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        self.wait_until(lambda: self.state(job) in ended, seconds, log)
        assert self.state(job) == state, self.explain(job, log)

    def wait_until(self, condition, seconds, log):
        virtual_hosts.wait_until(condition, seconds, lambda: self.explain(None, log))

    def explain(self, job, log):
        text = log.read_text() if log.exists() else "(no log)"
        return f"{self.slurm('squeue')}\n{self.job(job) if job else ''}\n{text}\n{self.logs()}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    base = tmp_path_factory.mktemp("cluster")
    try:
        slurm.require()
    except virtual_hosts.Unavailable as reason:
        pytest.skip(f"no Slurm cluster here: {reason}")
    with Cluster(base / "slurm", shared=[base]) as running:
        running.base = base
        yield running
