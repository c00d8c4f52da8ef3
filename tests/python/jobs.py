"""Runs programs as people start them: alone, or by torchrun or mpirun on two ranks."""

import os
import subprocess
import sys

ALONE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable]
ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
SAME_PATH = {"PYTHONPATH": os.pathsep.join(sys.path)}
"""With which a program finds what the test does."""


def run_job(*command, expect=0, timeout=200, environment=ENVIRONMENT, **options):
    """What it printed, errors last. A launcher that is out of time is asked to end, and then ends its ranks, which are in sessions of their
    own: killed, torchrun would leave them behind. It has 30 s of its own for ranks that do not heed it."""
    words = list(map(str, command))
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=os.environ | environment, **pipes, **options) as job:
        try:
            said = "".join(job.communicate(timeout=timeout))
        except subprocess.TimeoutExpired:
            job.terminate()
            said = "".join(job.communicate())
            raise AssertionError(f"{words} did not end within {timeout} s:\n{said[-6000:]}") from None
    assert job.returncode == expect, said[-9000:]
    return said
