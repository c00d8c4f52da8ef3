"""Whether what is replicated is still the same on all ranks: asked with each step's gradients, at no message's cost."""

from __future__ import annotations

import warnings
import weakref

import torch
from torch import Tensor, nn

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(parameter: Tensor) -> Tensor:
    """[2] fp32: a number c < 64 from the parameter's bits, and c². Their means over up to 4096 ranks are exact in
    fp32, and the second is the first's square if and only if c is the same on all. Two that differ have the same c
    once in 64 times; what has drifted differs again after the next step."""
    bits = parameter.detach().contiguous().view(_BITS[parameter.element_size()])
    c = (bits.sum(dtype=torch.int64) % 64).float()
    return torch.stack((c, c.square()))


class Drift:
    """What a model's last means said. Read one step later, when the device has long been done with them."""

    def __init__(self) -> None:
        self._means: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._warned = False

    def warn(self, name: str) -> None:
        """Once, if the ranks' values of parameter `name` differed when `keep` was called last."""
        if self._means is None or self._warned:
            return
        if self._arrived is not None:
            self._arrived.synchronize()
        mean, of_squares = self._means.tolist()
        self._warned = mean * mean < of_squares
        if self._warned:
            warnings.warn(
                f"{name} is not the same on all ranks, so replicated parameters drift apart. The norm that "
                "torch.nn.utils.clip_grad_norm_ goes by is each rank's own, of its own experts: "
                "anabranch.clip_gradient_norm's is the same on all. So must be whether ranks skip a step, their "
                "learning rate, and what they load.",
                stacklevel=3,
            )

    def keep(self, means: Tensor) -> None:
        if means.device.type != "cuda":
            self._means = means
            return
        self._means = torch.empty(means.shape, dtype=means.dtype, pin_memory=True)
        self._means.copy_(means, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()


_of: weakref.WeakKeyDictionary[nn.Module, Drift] = weakref.WeakKeyDictionary()


def drift_of(model: nn.Module) -> Drift:
    return _of.setdefault(model, Drift())
