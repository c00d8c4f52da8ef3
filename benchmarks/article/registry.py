"""The methods there are, and the versions of the packages that they come from."""

import importlib.metadata

from . import engines
from . import peers as peer_methods
from .methods import PlainLoop


def methods_for(device, peers=False):
    """Factories by name: the library's engines where it is installed, plain PyTorch, and peers if asked for."""
    return {**engines.factories(device), "plain loop": PlainLoop, **(peer_methods.FACTORIES if peers else {})}


PACKAGES = ("anabranch", "megablocks", "grouped_gemm", "scattermoe", "sonic-moe", "tutel", "fastmoe", "triton", "numpy")


def versions():
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
