"""The methods there are, and the versions of the packages that they come from."""

import importlib.metadata

from . import engines
from . import peers as peer_methods
from .methods import PlainLoop

# In the order of every report.
DESCRIPTIONS = {
    "auto": "the library's default: measures the engines that do not pad, and takes the fastest",
    "hopper": "our own kernel, the activation in its epilogue",
    "ampere": "our own kernel of any GPU since Ampere, the same",
    **{
        f"cublas_loop_{streams}": f"one cuBLAS product an expert, over {streams} stream{'s' * (streams > 1)}"
        for streams in (1, 2, 4, 8)
    },
    "cublas_grouped": "cuBLAS's grouped batched product",
    "cublaslt_grouped": "cuBLASLt's, whose sizes lie on the GPU",
    "torch_grouped_mm": "LibTorch's own grouped product",
    "block_sparse": "MegaBlocks' way, our own: rows padded to blocks of 128",
    "block_sparse_64": "the same with blocks of 64",
    "block_sparse_32": "the same with blocks of 32",
    "padded_bmm": "every expert padded to the fullest, one batched product",
    "block_diagonal": "blocks on a diagonal, each as large as the fullest expert, in 128 rows",
    "cpu": "the library's engine on the CPU",
    "plain loop": "index operations and one product an expert in plain PyTorch",
    **peer_methods.DESCRIPTIONS,
}


def methods_for(device, peers=False):
    """Factories by name: the library's engines where it is installed, plain PyTorch, and peers if asked for."""
    return {**engines.factories(device), "plain loop": PlainLoop, **(peer_methods.FACTORIES if peers else {})}


PACKAGES = (
    "anabranch", "megablocks", "stanford-stk", "grouped_gemm", "transformers", "scattermoe", "sonic-moe", "liger-kernel",
    "tutel", "fastmoe", "triton", "numpy",
)  # fmt: skip


def versions():
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
