"""What Python hears of a build without MPI, NCCL and CUDA, whose stubs are loaded before the library."""

import os
import subprocess
import sys

import pytest

STUBS = os.environ.get("ANABRANCH_NOT_BUILT")
pytestmark = pytest.mark.skipif(not STUBS, reason="CTest names the stubs in ANABRANCH_NOT_BUILT")


def error_of(code, **variables):
    """The RuntimeError that ends `code`."""
    lines = ["import anabranch, torch", "try:", f"    {code}", "except RuntimeError as error:", "    print(error)"]
    environment = dict(os.environ, LD_PRELOAD=STUBS, PYTHONPATH=os.pathsep.join(sys.path), **variables)
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ranks_of_mpirun_without_mpi():
    ranks = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    assert "this build of anabranch has no MPI" in error_of("anabranch.as_group()", **ranks)


def test_a_layer_on_a_gpu_without_cuda():
    said = error_of("anabranch.MoE(8, 12, 4, device='cuda')")
    assert "needs a build of anabranch with CUDA" in said


def test_nccl_without_nccl():
    code = "torch.ops.anabranch.nccl_group('x', anabranch.groups.alone().name, torch.device('cuda', 0), 1.0)"
    assert "this build of anabranch has no NCCL" in error_of(code)
