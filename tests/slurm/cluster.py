#!/usr/bin/env python3
"""A Slurm cluster of virtual hosts on this machine: starts it, runs a command on its head, stops it.

    tests/slurm/cluster.py [--hosts 2] [--cpus 4] [--folder DIR] -- COMMAND [ARGUMENT...]

    tests/slurm/cluster.py -- bash             # a shell with sbatch, srun, squeue, ...
    tests/slurm/cluster.py -- srun -N 2 hostname

Needs Debian's slurm-wlm, munge and iproute2, and root (see virtual_hosts.py). Nothing of it survives the
command, whichever way it ends; DIR keeps the daemons' logs.
"""

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import virtual_hosts  # noqa: E402

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

# Credentials live for 5 s: that long a requeued job waits before it starts again. No cgroups and no
# binding: the hosts share the machine's cores, whose daemons may answer late where others compute.
CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={head}({head_address})
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait=10
MessageTimeout=60
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP OverSubscribe=NO
PartitionName=all Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent PriorityTier=2 PreemptMode=OFF
"""

# Slurm 22.05's fence by a tree now and then lets a rank through before the others are there: what it sends then ends
# rank 0 in MPI_Init, with Open MPI 4.1, in 1 of 300 steps on busy cores; by a ring in none of 1200.
MPI_CONFIGURATION = "PMIxCollFence=ring\n"


def require():
    """Throws virtual_hosts.Unavailable with the reason where no cluster can be started."""
    virtual_hosts.require(*DAEMONS)


class SlurmCluster(virtual_hosts.VirtualHosts):
    """Hosts n1, n2, ... that run slurmd, and `head`, which runs slurmctld; a context manager."""

    def __init__(self, folder, hosts=2, cpus=4, shared=()):
        folder = Path(folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__([f"n{number}" for number in range(1, hosts + 1)], [folder, *shared])
        self.folder = folder
        self.cpus = cpus

    def __enter__(self):
        require()
        super().__enter__()
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def slurm(self, *command, **options):
        """Runs a command on the head; returns what it printed."""
        return self.run(virtual_hosts.HEAD, command, env=self.environment(), **options).stdout

    def environment(self):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**inherited, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def job(self, number):
        """What `scontrol show job` says, as a dictionary."""
        text = self.slurm("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def logs(self):
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in sorted(self.folder.glob("*.log")))

    def _start_daemons(self):
        self._write_configuration()
        self._start_munge()
        self._daemon(virtual_hosts.HEAD, "slurmctld")
        for name in self.names:
            # Under a name of its own: slurmd asks for the host's.
            self._daemon(name, "slurmd", "-N", name)
        virtual_hosts.wait_until(self._is_idle, 60, lambda: self.slurm("sinfo", check=False) + self.logs())

    def _is_idle(self):
        states = self.slurm("sinfo", "--noheader", "--Node", "--partition=all", "--format=%T", check=False).split()
        return states == ["idle"] * len(self.names)

    def _write_configuration(self):
        nodes = "\n".join(
            f"NodeName={name} NodeAddr={self.addresses[name]} CPUs={self.cpus} RealMemory=1000 State=UNKNOWN"
            for name in self.names
        )
        head = virtual_hosts.HEAD
        text = CONFIGURATION.format(head=head, head_address=self.addresses[head], folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "mpi.conf").write_text(MPI_CONFIGURATION)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start_munge(self):
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        flags = [f"--{option}={self.folder / file}" for option, file in files.items()]
        # --force: it would refuse a folder that others may write to.
        self._daemon(virtual_hosts.HEAD, "munged", "--force", f"--seed-file={self.folder}/munge.seed", *flags)
        socket = self.folder / "munge.socket"
        virtual_hosts.wait_until(socket.exists, 20, self.logs)

    def _daemon(self, host, *command):
        self.run(host, command, env=self.environment())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=4, help="of a host, in Slurm's eyes")
    parser.add_argument("--folder", type=Path, help="where logs and state go (default: a temporary one)")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anabranch-slurm-") as temporary:
        folder = arguments.folder or Path(temporary)
        try:
            with SlurmCluster(folder, arguments.hosts, arguments.cpus) as cluster:
                command = [*cluster.enter(virtual_hosts.HEAD), *arguments.command]
                return subprocess.call(command, env=cluster.environment())
        except virtual_hosts.Unavailable as reason:
            parser.exit(1, f"no cluster here: {reason}\n")


if __name__ == "__main__":
    sys.exit(main())
