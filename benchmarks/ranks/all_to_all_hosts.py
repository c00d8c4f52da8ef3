#!/usr/bin/env python3
"""Flat and hierarchical all-to-all between virtual hosts on links of several speeds: where each one wins.

    benchmarks/ranks/all_to_all_hosts.py            # as root, on an idle machine; minutes

Writes benchmarks/results/all_to_all_hosts.json and .png. The hosts are network namespaces of this machine
(tests/support/virtual_hosts.py), whose links a token bucket slows; their ranks share this machine's cores.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "launch")]
import scaling  # noqa: E402
import virtual_hosts  # noqa: E402

PROGRAM = ROOT / "build/release/benchmarks/benchmark_all_to_all"
LAYOUTS = [(2, 4), (4, 2)]  # hosts, ranks on each
# Mb/s of a host's link (0: as fast as the kernel copies) and microseconds that a packet costs besides
LINKS = {"not slowed": (0, 0), "100 Mb/s": (100, 0), "100 Mb/s, 1 ms a packet": (100, 1000)}
SIZES = [16, 256, 1024, 4096, 16384, 65536]
ENVIRONMENT = {**os.environ, **virtual_hosts.MPI_ENVIRONMENT}


def mpirun(hosts, names, ranks):
    """The words before a program that start `ranks` ranks on each of the hosts."""
    slots = ",".join(f"{name}:{ranks}" for name in names)
    flags = f"--mca plm_rsh_agent {hosts.remote_shell()} --mca btl_tcp_if_include eth0"
    script = ROOT / "launch/mpirun.sh"
    return [script, "-n", ranks * len(names), "--no-bind", "--hosts", slots, "--mpirun-flags", flags]


def measure(count, ranks, link, rounds):
    names = [f"n{number}" for number in range(1, count + 1)]
    with virtual_hosts.VirtualHosts(names) as hosts:
        for name in names:
            if LINKS[link][0]:
                hosts.shape(name, *LINKS[link])
        file = ROOT / f"build/all_to_all_{os.getpid()}.json"
        sizes = ",".join(map(str, SIZES))
        program = [PROGRAM, "--bytes", sizes, "--rounds", rounds, "--json", file]
        try:
            hosts.run("n1", [*mpirun(hosts, names, ranks), *program], env=ENVIRONMENT, timeout=500)
            return json.loads(file.read_text())
        finally:
            file.unlink(missing_ok=True)


def draw(runs, path):
    figure, all_axes = plt.subplots(1, len(LAYOUTS), figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, (count, ranks) in zip(all_axes, LAYOUTS):
        for link, colour in zip(LINKS, ("tab:green", "tab:blue", "tab:red")):
            run = next(r for r in runs if (r["hosts"], r["ranks_a_host"], r["link"]) == (count, ranks, link))
            ratios = [point["flat_ms"] / point["hierarchical_ms"] for point in run["results"]]
            axes.plot(SIZES, ratios, marker="o", color=colour, label=link)
        axes.axhline(1, color="grey", lw=1, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(SIZES, [f"{s}" if s < 1024 else f"{s // 1024} Ki" for s in SIZES])
        axes.minorticks_off()
        axes.set_title(f"{count} hosts, {ranks} ranks on each")
        axes.set_xlabel("mean bytes from a rank to another")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("flat's time / hierarchical's\n(above 1: hierarchical wins)")
    all_axes[0].legend(title="a host's link")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", help="folder")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    grid = [(count, ranks, link) for count, ranks in LAYOUTS for link in LINKS]
    runs = []
    for count, ranks, link in tqdm(grid, unit="network"):
        run = measure(count, ranks, link, arguments.rounds)
        runs.append({"hosts": count, "ranks_a_host": ranks, "link": link, "results": run["results"]})
    arguments.output.mkdir(parents=True, exist_ok=True)
    whole = {"provenance": scaling.provenance(["benchmarks/ranks/all_to_all_hosts.py"]), "runs": runs}
    (arguments.output / "all_to_all_hosts.json").write_text(json.dumps(whole, indent=1) + "\n")
    draw(runs, arguments.output / "all_to_all_hosts.png")


if __name__ == "__main__":
    sys.exit(main())
