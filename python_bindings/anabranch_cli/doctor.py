"""What training needs of a machine: looked at, and what to change where it lacks something."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MEBI = 1 << 20


class Check(NamedTuple):
    name: str
    status: str
    """"ok", "warn": slower or weaker than it could be, "bad": something will fail."""
    found: str
    advice: str = ""


def examine() -> list[Check]:
    """All of them; one that fails in a way nobody thought of is a finding, too."""
    checks: list[Check] = []
    for examiner in (_package, _gpus, _mpi, _udp, _shared_memory, _limits, _processors):
        try:
            checks += examiner()
        except Exception as error:
            checks.append(Check(examiner.__name__.strip("_"), "bad", f"{type(error).__name__}: {error}"))
    return checks


def table(checks: list[Check]) -> str:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:4s}  {check.name:{width}s}  {check.found}")
        if check.advice:
            lines.append(f"{'':4s}  {'':{width}s}  → {check.advice}")
    return "\n".join(lines)


def _output(*command: str) -> str | None:
    """What it printed; None: it is not there, or failed."""
    if not shutil.which(command[0]):
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout if result.returncode == 0 else None


def _package() -> Iterator[Check]:
    try:
        import anabranch
    except ImportError as error:
        yield Check("package", "bad", str(error))
        return
    import torch
    from anabranch import _build, features

    yield Check("package", "ok", f"anabranch {anabranch.__version__}, torch {torch.__version__}")
    if _build.WHY_NO_CUDA:
        status = "bad" if _output("nvidia-smi", "-L") else "ok"
        advice = "build anew: pip install --force-reinstall --no-deps -v ." if status == "bad" else ""
        yield Check("kernels for GPUs", status, f"none: {_build.WHY_NO_CUDA}", advice)
    else:
        yield Check("kernels for GPUs", "ok", "built")
    yield Check("transports", "ok", ", ".join(features.transports()))


def _gpus() -> Iterator[Check]:
    import torch

    listed = _output("nvidia-smi", "-L")
    if not torch.cuda.is_available():
        if listed:
            yield Check("GPUs", "bad", "nvidia-smi lists some, torch sees none", "install the torch of this driver's CUDA")
        else:
            yield Check("GPUs", "ok", "none: layers run on the CPU")
        return
    count = torch.cuda.device_count()
    yield Check("GPUs", "ok", f"{count}: {torch.cuda.get_device_name(0)}")
    version = torch.cuda.nccl.version()
    yield Check("NCCL", "ok", ".".join(map(str, version)) if isinstance(version, tuple) else str(version))
    apart = [(a, b) for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        advice = "rows between them go through NCCL; see nvidia-smi topo -p2p r, and IOMMU or ACS in the BIOS"
        yield Check("peer access", "warn", f"not between {len(apart)} pairs, as GPU {apart[0][0]} and {apart[0][1]}", advice)
    elif count > 1:
        yield Check("peer access", "ok", "between all GPUs")
    query = _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm,clocks_throttle_reasons.active", "--format=csv,noheader,nounits")
    for number, line in enumerate((query or "").splitlines()):
        clock, most, reasons = (part.strip() for part in line.split(","))
        harmful = int(reasons, 16) & 0xE8 if re.fullmatch(r"0x[0-9a-fA-F]+", reasons) else 0  # slow-downs by heat or power
        advice = "cool it, or raise its power limit: nvidia-smi -q -d PERFORMANCE" if harmful else ""
        yield Check(f"clock of GPU {number}", "warn" if harmful else "ok", f"{clock} of {most} MHz", advice)


def _mpi() -> Iterator[Check]:
    version = _output("mpirun", "--version")
    if version is None:
        yield Check("mpirun", "warn", "not there", "jobs start by torchrun or srun; for mpirun: apt-get install openmpi-bin")
        return
    first = version.splitlines()[0]
    environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    flags = ["--oversubscribe"] if "Open MPI" in first else []
    started = subprocess.run(
        ["mpirun", *flags, "-n", "2", "true"], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )
    if started.returncode:
        yield Check("mpirun", "bad", f"{first}; two processes do not start", started.stderr.strip().splitlines()[0])
    elif os.geteuid() == 0 and flags and "OMPI_ALLOW_RUN_AS_ROOT" not in os.environ:
        yield Check("mpirun", "ok", first, "as root: export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
    else:
        yield Check("mpirun", "ok", first)


def _udp() -> Iterator[Check]:
    """Heartbeats beside NCCL are datagrams between this machine's addresses."""
    addresses = {"127.0.0.1"}
    try:
        addresses |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    except OSError:
        yield Check("host name", "warn", f"{socket.gethostname()} has no address", "put it into /etc/hosts: Gloo asks for it")
    lost = [address for address in sorted(addresses) if not _datagram_arrives(address)]
    if lost:
        yield Check("UDP", "warn", f"no datagram arrives at {', '.join(lost)}", "let a firewall pass UDP between ranks: a dead rank is then named")
    else:
        yield Check("UDP", "ok", f"arrives at {', '.join(sorted(addresses))}")


def _datagram_arrives(address: str) -> bool:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            receiver.bind((address, 0))
            receiver.settimeout(1.0)
            sender.sendto(b"anabranch", receiver.getsockname())
            return receiver.recv(64) == b"anabranch"
    except OSError:
        return False


def _shared_memory(folder: Path = Path("/dev/shm"), enough: int = 512 * MEBI) -> Iterator[Check]:
    if not folder.is_dir():
        yield Check("shared memory", "bad", f"there is no {folder}", "mount tmpfs there: MPI and NCCL move data through it")
        return
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    advice = "" if free >= enough else "in a container: --shm-size=8g or --ipc=host"
    yield Check("shared memory", "warn" if advice else "ok", f"{free // MEBI} MiB free in {folder}", advice)


def _limits() -> Iterator[Check]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    low = files != resource.RLIM_INFINITY and files < 1024
    yield Check("open files", "warn" if low else "ok", _limit(files), "ulimit -n 65536" if low else "")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()):
        low = locked != resource.RLIM_INFINITY
        advice = "ulimit -l unlimited (/etc/security/limits.conf): InfiniBand pins memory" if low else ""
        yield Check("locked memory", "warn" if low else "ok", _limit(locked), advice)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)


def _processors() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS", "")
    many = threads.isdecimal() and int(threads) > cores
    advice = f"OMP_NUM_THREADS of at most {cores} over the ranks of a machine" if many else ""
    yield Check("cores", "warn" if many else "ok", f"{cores}, OMP_NUM_THREADS {threads or 'not set'}", advice)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists():
        name = governor.read_text().strip()
        slow = name == "powersave" and not Path("/sys/devices/system/cpu/intel_pstate").exists()
        yield Check("CPU clock", "warn" if slow else "ok", f"governor {name}", "cpupower frequency-set -g performance" if slow else "")
