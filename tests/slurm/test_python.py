"""The Python package under srun, which starts its ranks over both hosts: it finds them by itself."""

import os
import shlex
import sys

import pytest
from conftest import BUILD

PACKAGE = BUILD / "python"

PROGRAM = """
import torch, anabranch
found = anabranch.discover_rank()
layer = anabranch.MoE(16, 24, num_experts=6, top_k=2, seed=3)
torch.manual_seed(found.rank)
x = torch.randn(5 + found.rank, 16, requires_grad=True)
layer(x).output.square().sum().backward()
anabranch.finish_gradients(layer)
assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0
group = layer.group
norm = torch.stack([p.grad.square().sum() for p in layer.router.parameters()]).sum().sqrt()
print(f"{found.launcher}: rank {found.rank} of {found.size} on {found.node}, layer {group.rank} of {group.size},"
      f" router's gradient {norm.item():.6e}", flush=True)
"""


@pytest.mark.skipif(not (PACKAGE / "anabranch").exists(), reason="the Python package is not built")
def test_srun_ties_the_ranks_of_a_layer(cluster):
    script, log = cluster.base / "layer.py", cluster.base / "layer.log"
    script.write_text(PROGRAM)
    command = ["srun", "--mpi=pmix", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", f"--output={log}"]
    path = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
    cluster.slurm("env", f"PYTHONPATH={path}", *command, sys.executable, script, timeout=120)
    lines = sorted(log.read_text().splitlines(), key=lambda line: line.partition("rank ")[2])
    assert len(lines) == 4, log.read_text()
    gradients = {line.rpartition(" ")[2] for line in lines}
    assert len(gradients) == 1, shlex.join(lines)  # finished: the same on every rank
    for rank, line in enumerate(lines):
        host = "n1" if rank < 2 else "n2"
        assert f"rank {rank} of 4 on {host}, layer {rank} of 4," in line, log.read_text()
