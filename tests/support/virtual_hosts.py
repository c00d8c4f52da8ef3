"""Several hosts on one machine: network namespaces on a bridge, each with its own name, /tmp and /dev/shm.

Everything lives in one PID, mount and network namespace whose first process ends when its creator does:
nothing survives, however the creator ends. Needs Linux, root with CAP_SYS_ADMIN, and iproute2.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
HEAD = "head"

# For Open MPI's ranks on virtual hosts: more of them than cores, so who waits makes way; started by root; and
# without the right to read each other's memory.
MPI_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
}

# The first process of a namespace: reaps orphans, and ends when its standard input does.
INIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True); sys.stdin.read()"


class Unavailable(Exception):
    """This machine cannot have virtual hosts; the message says what is missing."""


def require(*programs):
    """Throws Unavailable unless namespaces can be made here and every one of `programs` is there."""
    missing = [name for name in ("unshare", "nsenter", "ip", "tc", "mount", *programs) if not shutil.which(name)]
    if missing:
        raise Unavailable(f"{', '.join(missing)} not found (launch/setup.sh --slurm installs them where it can)")
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    attempt = subprocess.run(
        ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    if attempt.returncode != 0:
        raise Unavailable(f"no right to make namespaces: {attempt.stderr.strip()}")


def start_init(command, enter=()):
    """Starts INIT under `command` and returns (process, PID of INIT in the PID namespace of /proc)."""
    process = subprocess.Popen(
        [*enter, *command, sys.executable, "-c", INIT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    if process.stdout.readline() != b"\n":
        raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
    return process


def only_child(pid):
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


class VirtualHosts:
    """`names` on one network, beside this process's machine as `head`; a context manager.

    `shared`: folders that every host sees at the same place, such as a file system of a cluster. What is
    not under /tmp, /run or /dev/shm is shared anyway.
    """

    def __init__(self, names, shared=()):
        self.names = list(names)
        self.shared = [ROOT, *map(Path, shared)]
        self.addresses = {HEAD: f"{NETWORK}.254"}
        self.addresses.update((name, f"{NETWORK}.{number}") for number, name in enumerate(names, start=1))
        self._pids = {}  # as the machine outside sees them
        self._processes = []

    def __enter__(self):
        require()
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception):
        if self._processes:
            # --kill-child: the first process of the namespace goes with it, and with that all others.
            self._processes[0].kill()
        for process in self._processes:
            process.stdin.close()
            process.stdout.close()
            process.wait()
        self._processes = []

    def enter(self, host):
        """The words that, in front of a command, run it on `host`."""
        pid = str(self._pids[host])
        return ["nsenter", "--target", pid, "--mount", "--net", "--uts", "--pid", f"--wd={os.getcwd()}", "--"]

    def run(self, host, command, check=True, timeout=120, **options):
        """Runs `command` on `host`; its output, both streams in one, is in the result's stdout."""
        result = subprocess.run(
            [*self.enter(host), *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            **options,
        )
        if check and result.returncode != 0:
            raise RuntimeError(f"{command} on {host} ended with {result.returncode}:\n{result.stdout}")
        return result

    def start(self, host, command, **options):
        """Starts `command` on `host` in the background; it ends with the hosts at the latest."""
        return subprocess.Popen([*self.enter(host), *map(str, command)], stdin=subprocess.DEVNULL, **options)

    def shape(self, host, megabits, packet_microseconds=0, burst_kilobytes=64):
        """Slows what `host` sends to `megabits` a second (a token bucket). A packet takes so many
        microseconds more than its bytes, as where a network is limited by messages rather than by bytes."""
        rate = ["rate", f"{megabits}mbit", "burst", f"{burst_kilobytes}kb", "latency", "100ms"]
        if packet_microseconds:
            rate += ["overhead", str(packet_microseconds * megabits // 8)]
        self.run(host, ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", *rate])

    def bytes_sent(self, host):
        """Bytes that have left `host` through its network interface."""
        link = self.run(host, ["ip", "-json", "-statistics", "link", "show", "eth0"])
        return json.loads(link.stdout)[0]["stats64"]["tx"]["bytes"]

    def remote_shell(self):
        """A program that runs a command on a host, as `ssh HOST COMMAND...` does, from within any."""
        return Path(self._folder) / "remote_shell"

    def _start(self):
        lab = start_init(["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"])
        self._processes.append(lab)
        self._pids[HEAD] = only_child(lab.pid)
        self._folder = f"/run/virtual_hosts_{os.getpid()}"
        self._prepare(HEAD)
        bridge = "ip link add lan type bridge && ip link set lan up && ip link set lo up"
        self._shell(HEAD, f"{bridge} && ip address add {self.addresses[HEAD]}/24 dev lan")
        for name in self.names:
            self._add(name)
        self._write_remote_shell()

    def _add(self, name):
        process = start_init(["unshare", "--mount", "--net", "--uts"], self.enter(HEAD))
        self._processes.append(process)
        # nsenter, asked for a PID namespace, forks; unshare without --fork does not.
        self._pids[name] = only_child(process.pid)
        inner = self._inner_pid(name)
        self._shell(
            HEAD,
            f"ip link add port-{name} type veth peer name eth0 netns {inner}"
            f" && ip link set port-{name} master lan up",
        )
        self._prepare(name)
        self._shell(name, f"ip link set lo up; ip address add {self.addresses[name]}/24 dev eth0; ip link set eth0 up")

    def _inner_pid(self, name):
        """PID of a host's first process, as the hosts see it."""
        status = Path(f"/proc/{self._pids[name]}/status").read_text().splitlines()
        return next(line.split()[-1] for line in status if line.startswith("NSpid:"))

    def _prepare(self, name):
        """A name of its own, and folders of its own where programs on one host find each other."""
        hosts = "\n".join(["127.0.0.1 localhost", *(f"{a} {n}" for n, a in self.addresses.items())])
        lines = ["set -e", "mount --make-rprivate /", "mount -t tmpfs tmpfs /run"]
        if name != HEAD:
            # Shared folders below a place that is about to be covered are kept, and put back.
            kept = list(enumerate(folder for folder in self.shared if Path("/tmp") in folder.parents))
            lines += [f"mkdir /run/kept{i}; mount --rbind '{folder}' /run/kept{i}" for i, folder in kept]
            lines += ["mount -t tmpfs tmpfs /tmp", "mount -t tmpfs tmpfs /dev/shm", "chmod 1777 /tmp /dev/shm"]
            lines += [f"mkdir -p '{folder}'; mount --rbind /run/kept{i} '{folder}'" for i, folder in kept]
        lines += [
            f"hostname {name}",
            f"mkdir {self._folder}",
            f"printf '%s\\n' '{hosts}' > {self._folder}/hosts",
            f"mount --bind {self._folder}/hosts /etc/hosts",
        ]
        self._shell(name, "\n".join(lines))

    def _write_remote_shell(self):
        cases = "\n".join(f"  {name}) pid={self._inner_pid(name)} ;;" for name in self.names)
        script = (
            f'#!/bin/bash\nhost=$1\nshift\ncase $host in\n{cases}\n  *) echo "no host $host" >&2; exit 1 ;;\nesac\n'
            'exec nsenter --target "$pid" --mount --net --uts -- bash -c "$*"\n'
        )
        for name in (HEAD, *self.names):
            subprocess.run(
                [*self.enter(name), "bash", "-c", f"cat > {self.remote_shell()} && chmod +x {self.remote_shell()}"],
                input=script,
                text=True,
                check=True,
            )

    def _shell(self, host, script):
        self.run(host, ["bash", "-c", script])


def wait_until(condition, seconds, what):
    """Polls `condition` until it is true; throws RuntimeError with `what()` after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {seconds} s: {what()}")
        time.sleep(0.1)
