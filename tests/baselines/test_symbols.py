"""The shipped library holds nothing of the engines that it is compared with."""

import os
import subprocess
from pathlib import Path

LIBRARY = Path(os.environ["ANABRANCH_LIBRARY"])
BASELINES = Path(os.environ["ANABRANCH_BASELINES"])


def defined(path, *flags):
    """(kind, name) of every symbol that a file defines."""
    listed = subprocess.run(
        ["nm", "--demangle", "--defined-only", *flags, path], capture_output=True, text=True, check=True
    )
    return {(line.split(maxsplit=2)[1], line.split(maxsplit=2)[2]) for line in listed.stdout.splitlines()}


def test_no_symbol_of_a_baseline():
    # What is inline or a template may lie in both.
    own = {name for kind, name in defined(BASELINES) if kind in "TDBR" and "anabranch::" in name}
    assert any("make_padded_bmm_engine" in name for name in own) and any("block_sparse" in name for name in own)
    shipped = {name for _, name in defined(LIBRARY) | defined(LIBRARY, "--dynamic")}
    assert any("make_grouped_gemm_engine" in name for name in shipped)
    assert not own & shipped
    words = ("block_sparse", "PaddedEngine", "BlockDiagonal", "TorchEngine", "baseline")
    assert not [name for name in shipped if any(word in name for word in words)]


def test_no_name_of_a_baseline():
    names = (b"padded_bmm", b"block_diagonal", b"block_sparse", b"torch_grouped_mm")
    assert all(name in BASELINES.read_bytes() for name in names)
    assert not [name for name in names if name in LIBRARY.read_bytes()]
