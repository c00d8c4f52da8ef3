"""anabranch-bind on machines that hwloc reads from a file: two sockets, GPUs and network adapters.

ANABRANCH_BIND names the built program.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BIND = Path(os.environ.get("ANABRANCH_BIND", ROOT / "build/release/tools/anabranch-bind"))
pytestmark = pytest.mark.skipif(not BIND.exists(), reason="anabranch-bind is not built (it needs hwloc)")

LAUNCHERS = ("OMPI_", "PMI", "SLURM_", "CUDA_", "UCX_", "TORCHELASTIC", "MPI_LOCAL")
SOCKETS, CORES, SWITCHES, GPUS = 2, 8, 2, 2  # cores of a socket, switches of a socket, GPUs of a switch


def clean_environment(**more):
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHERS) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
    }
    return {**kept, **more}


def device(bus, kind, ids, inside=""):
    return (
        f'<object type="PCIDev" gp_index="{1000 + bus}" pci_busid="0000:{bus:02x}:00.0" '
        f'pci_type="{kind} [{ids}] [0000:0000] 00" pci_link_speed="0.0">{inside}</object>'
    )


def socket(number):
    """Eight cores of two hardware threads (n and n + 16), and two switches of two GPUs and an adapter."""
    mask = 0
    cores = ""
    for core in range(number * CORES, (number + 1) * CORES):
        threads = (core, core + SOCKETS * CORES)
        own = sum(1 << thread for thread in threads)
        mask |= own
        sets = f'complete_nodeset="0x{1 << number:x}" nodeset="0x{1 << number:x}"'
        units = "".join(
            f'<object type="PU" os_index="{t}" cpuset="0x{1 << t:08x}" complete_cpuset="0x{1 << t:08x}" {sets} '
            f'gp_index="{100 + t}"/>'
            for t in threads
        )
        cores += (
            f'<object type="Core" os_index="{core}" cpuset="0x{own:08x}" complete_cpuset="0x{own:08x}" {sets} '
            f'gp_index="{200 + core}">{units}</object>'
        )
    first_bus = number * 64
    switches = ""
    for switch in range(SWITCHES):
        bus = first_bus + 1 + switch * 8
        name = f"mlx5_{number * SWITCHES + switch}"
        adapter = f'<object type="OSDev" gp_index="{400 + bus}" name="{name}" osdev_type="3"/>'
        devices = "".join(device(bus + 1 + gpu, "0302", "10de:2330") for gpu in range(GPUS))
        devices += device(bus + 1 + GPUS, "0207", "15b3:1021", adapter)
        switches += (
            f'<object type="Bridge" gp_index="{500 + bus}" bridge_type="1-1" depth="1" '
            f'bridge_pci="0000:[{bus + 1:02x}-{bus + 3:02x}]" pci_busid="0000:{first_bus:02x}:{switch + 1:02x}.0" '
            f'pci_type="0604 [8086:2030] [0000:0000] 04" pci_link_speed="0.0">{devices}</object>'
        )
    sets = f'cpuset="0x{mask:08x}" complete_cpuset="0x{mask:08x}" nodeset="0x{1 << number:x}" complete_nodeset="0x{1 << number:x}"'
    return (
        f'<object type="Package" os_index="{number}" {sets} gp_index="{10 + number}">'
        f'<object type="NUMANode" os_index="{number}" {sets} gp_index="{20 + number}" local_memory="1000000"/>'
        f'{cores}<object type="Bridge" gp_index="{30 + number}" bridge_type="0-1" depth="0" '
        f'bridge_pci="0000:[{first_bus:02x}-{first_bus + 32:02x}]">{switches}</object></object>'
    )


@pytest.fixture
def machine(tmp_path):
    """Environment in which hwloc sees 2 sockets × 8 cores, GPUs 0-3 and 4-7, mlx5_0 to mlx5_3."""
    everything = 'cpuset="0xffffffff" complete_cpuset="0xffffffff" allowed_cpuset="0xffffffff"'
    nodes = 'nodeset="0x3" complete_nodeset="0x3" allowed_nodeset="0x3"'
    file = tmp_path / "machine.xml"
    file.write_text(
        '<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE topology SYSTEM "hwloc2.dtd">\n<topology version="2.0">'
        f'<object type="Machine" os_index="0" {everything} {nodes} gp_index="1">'
        + "".join(map(socket, range(SOCKETS)))
        + "</object></topology>\n"
    )
    return {"HWLOC_XMLFILE": str(file), "HWLOC_COMPONENTS": "xml"}


def rank(local_rank, local_size):
    return {
        "OMPI_COMM_WORLD_RANK": str(local_rank),
        "OMPI_COMM_WORLD_SIZE": str(local_size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
    }


def run(*arguments, **environment):
    return subprocess.run(
        [BIND, *arguments], env=clean_environment(**environment), capture_output=True, text=True, timeout=60, check=False
    )


def bindings(machine, ranks, **environment):
    results = [run("--show", **machine, **rank(r, ranks), **environment) for r in range(ranks)]
    assert [result.returncode for result in results] == [0] * ranks, results
    return [json.loads(result.stdout) for result in results]


def threads(binding):
    numbers = set()
    for part in binding["cpus"].split(","):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def test_a_rank_a_gpu(machine):
    found = bindings(machine, 8)
    assert [b["gpu"] for b in found] == list(range(8))
    assert [b["visible_device"] for b in found] == [str(i) for i in range(8)]
    # The switch's own adapter, and two cores with both hardware threads each, of the GPU's socket.
    assert [b["nic"] for b in found] == [f"mlx5_{i // 2}" for i in range(8)]
    assert [threads(b) for b in found] == [{2 * i, 2 * i + 1, 2 * i + 16, 2 * i + 17} for i in range(8)]
    assert {b["cores"] for b in found} == {2}


@pytest.mark.parametrize("ranks", [1, 3, 5, 8, 11, 16])
def test_ranks_share_no_core_and_leave_none_of_their_sockets(machine, ranks):
    found = bindings(machine, ranks)
    all_threads = [thread for b in found for thread in threads(b)]
    assert len(all_threads) == len(set(all_threads))
    for binding in found:
        assert binding["gpu"] == binding["rank"] % 8
        on_socket = {thread % 16 // CORES for thread in threads(binding)}
        assert on_socket == {binding["gpu"] // 4}
    sockets = {b["gpu"] // 4 for b in found}
    assert len(all_threads) == len(sockets) * CORES * 2


def test_more_ranks_than_cores_are_left_alone(machine):
    found = bindings(machine, 17)
    # Nine ranks on the first socket's eight cores, eight on the other's.
    assert {b["cores"] for b in found if b["gpu"] < 4} == {0}
    assert {b["cores"] for b in found if b["gpu"] >= 4} == {1}


def test_of_the_gpus_that_a_scheduler_gave(machine):
    found = bindings(machine, 2, CUDA_VISIBLE_DEVICES="6,1")
    assert [b["visible_device"] for b in found] == ["6", "1"]
    assert [b["nic"] for b in found] == ["mlx5_3", "mlx5_0"]
    assert threads(found[1]) == set(range(8)) | set(range(16, 24))


def test_gpus_by_uuid_are_passed_on(machine):
    found = bindings(machine, 2, CUDA_VISIBLE_DEVICES="GPU-a,GPU-b")
    assert [(b["visible_device"], b["gpu"], b["nic"]) for b in found] == [("GPU-a", None, ""), ("GPU-b", None, "")]
    assert threads(found[0]) == set(range(8)) | set(range(16, 24))


def test_no_gpu(machine):
    found = bindings(machine, 4, CUDA_VISIBLE_DEVICES="")
    assert [b["cores"] for b in found] == [4] * 4
    assert [(b["visible_device"], b["nic"]) for b in found] == [("", "")] * 4


def test_executes_the_command_on_its_cores():
    program = "import json, os; print(json.dumps([sorted(os.sched_getaffinity(0)), dict(os.environ)]))"
    command = ["--", sys.executable, "-c", program, "--show"]
    result = run(*command)
    assert result.returncode == 0, result.stderr
    cpus, environment = json.loads(result.stdout)
    assert cpus == sorted(os.sched_getaffinity(0))
    assert int(environment["OMP_NUM_THREADS"]) >= 1
    assert run("sh", "-c", "exit 7").returncode == 7


def test_what_is_set_stays():
    result = run("sh", "-c", "echo $OMP_NUM_THREADS", OMP_NUM_THREADS="3")
    assert result.stdout == "3\n"


def test_what_it_refuses():
    assert run().returncode == 2
    missing = run("no-such-program")
    assert missing.returncode == 127 and "cannot execute 'no-such-program'" in missing.stderr
    disagreement = run("true", RANK="0", WORLD_SIZE="2", **rank(1, 2))
    assert disagreement.returncode == 127 and "disagree" in disagreement.stderr
    unknown = run("true", RANK="0", WORLD_SIZE="2")
    assert unknown.returncode == 127 and "which rank of its node" in unknown.stderr
