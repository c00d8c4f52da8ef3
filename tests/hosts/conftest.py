"""Hosts joined by a network, for all tests of this folder; without the rights they are skipped."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("ANABRANCH_BUILD", ROOT / "build/release"))
sys.path.insert(0, str(ROOT / "tests/support"))
import virtual_hosts  # noqa: E402

ENVIRONMENT = {**os.environ, **virtual_hosts.MPI_ENVIRONMENT}


class Hosts(virtual_hosts.VirtualHosts):
    """n1, n2, ... with the project's mpirun.sh."""

    def command(self, hosts, ranks_a_host, *program):
        """launch/mpirun.sh on the first `hosts` hosts, as started on n1."""
        slots = ",".join(f"{name}:{ranks_a_host}" for name in self.names[:hosts])
        flags = f"--mca plm_rsh_agent {self.remote_shell()} --mca btl_tcp_if_include eth0"
        script = [ROOT / "launch/mpirun.sh", "-n", hosts * ranks_a_host, "--hosts", slots, "--mpirun-flags", flags]
        return [*map(str, script), *map(str, program)]

    def mpirun(self, hosts, ranks_a_host, *program, **options):
        return self.run("n1", self.command(hosts, ranks_a_host, *program), env=ENVIRONMENT, **options)


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    base = tmp_path_factory.mktemp("hosts")
    try:
        virtual_hosts.require("mpirun")
    except virtual_hosts.Unavailable as reason:
        pytest.skip(f"no virtual hosts here: {reason}")
    with Hosts(["n1", "n2", "n3", "n4"], shared=[base]) as running:
        running.base = base
        yield running
