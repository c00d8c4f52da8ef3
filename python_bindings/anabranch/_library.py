"""Loads the operators: libanabranch_operators, in the type of the installed torch."""

from __future__ import annotations

import pathlib

try:
    import torch
except ImportError as error:
    raise ImportError("anabranch needs PyTorch: pip install torch, then anabranch on top of it") from error

from . import _build


def _versions_differ() -> str | None:
    """What keeps the installed torch from loading the library, as far as versions tell."""
    installed = torch.__version__.split("+")[0].split(".")[:2]
    built = _build.TORCH_VERSION.split(".")[:2]
    if installed != built:
        return (
            f"anabranch was built against torch {_build.TORCH_VERSION}, but torch {torch.__version__} "
            "is installed"
        )
    if torch.compiled_with_cxx11_abi() != _build.CXX11_ABI:
        return "anabranch was built against a torch of another C++ ABI than the installed one"
    return None


def load() -> None:
    """Registers torch.ops.anabranch; ImportError says what does not fit."""
    series = ".".join(torch.__version__.split(".")[:2])
    remedy = f"take the wheel for this torch, +pt{series}..., or build it anew: pip install --force-reinstall --no-deps ."
    problem = _versions_differ()
    if problem is not None:
        raise ImportError(f"{problem}: {remedy}")
    library = pathlib.Path(__file__).with_name("libanabranch_operators.so")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(f"{library} cannot be loaded with torch {torch.__version__}: {error}; {remedy}") from error


load()
