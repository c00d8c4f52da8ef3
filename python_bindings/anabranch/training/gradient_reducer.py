"""Gradients summed beside the backward that makes them."""

from __future__ import annotations

import atexit
import weakref
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .gradients import BUCKET_BYTES, ParallelGroups, finish_by, only_group, parameters_of
from .step_ends import end_step


class GradientReducer:
    """`finish_gradients`, of which the sums run beside the backward that makes the gradients. Once for a model, then in
    every step::

        for x in micro_batches[:-1]:
            loss(x).backward()
        reducer.start()
        loss(micro_batches[-1]).backward()
        reducer.finish()  # in the place of finish_gradients

    Gradients become those of `finish_gradients`, bit for bit. Messages go in one order on all ranks, from the last
    parameters of the model to the first; what a rank's backward does not reach, and what is behind it, goes in `finish`.
    So does all over groups that move a GPU's memory by torch's NCCL, which has one order of calls.

    Args:
        model: as `finish_gradients` takes it, but for experts that are DTensors. Its parameters that require gradients
            now are meant.
        groups: see `finish_gradients`.
        bucket_bytes: the least size of a message, where there are as many gradients.

    Collective.
    """

    def __init__(
        self, model: nn.Module, groups: ParallelGroups | None = None, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._model = model
        self._groups = groups or only_group(model)
        self._parameters = parameters_of(model, self._groups)
        for name, p in self._parameters.experts + self._parameters.shards_of_experts:
            if isinstance(p, DTensor):
                raise ValueError(f"{name} is a DTensor: finish_gradients takes it, a GradientReducer does not")
        world, replicas = self._parameters.groups_of(self._groups)
        self._reducer: Any = torch.classes.anabranch.GradientReducer(
            dict(self._parameters.experts), dict(self._parameters.replicated), world.name, replicas.name, bucket_bytes
        )
        _reducers.add(self)

    def start(self) -> None:
        """What the next backward brings is final. On every rank. ValueError where `finish_gradients` raises it, for
        parameters that require gradients and did not when this was made (or the reverse), and twice without
        `finish`."""
        if parameters_of(self._model, self._groups).names() != self._parameters.names():
            raise ValueError(
                "other parameters require gradients than when the GradientReducer was made: make another one"
            )
        self._reducer.start()

    def finish(self, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Waits for the sums. Collective. ValueError without `start`, and for a gradient that has changed since the
        backward after it came to it: by a second backward, `scaler.unscale_`, or `zero_grad`."""
        end_step(self._model, self._groups)
        finish_by(self._reducer.finish, self._model, self._parameters, self._groups, scaler)

    @property
    def summed(self) -> int:
        """Messages that have been summed since `start`; on a GPU, those that have been launched."""
        return int(self._reducer.summed())

    def _close(self) -> None:
        self._reducer = None


_reducers: weakref.WeakSet[GradientReducer] = weakref.WeakSet()


@atexit.register  # before the groups leave, whose own was registered earlier
def _close_reducers() -> None:
    for reducer in list(_reducers):
        reducer._close()
