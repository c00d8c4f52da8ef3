"""What a layer has done: load of its experts, bytes, time of its stages."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from .. import _library  # noqa: F401


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Since the last `MoE.reset_stats`; of this rank, where nothing else is said."""

    expert_load: Tensor | None
    """[num_experts] int64, on the host: assignments of each expert in the last forward, over all ranks of
    the group (in an evaluation of this rank's tokens, see `MoE.evaluation_losses`); None before it."""
    imbalance: float | None
    """Fullest expert's assignments over the mean: 1 is perfect balance."""
    forwards: int
    """Forward passes, those of checkpointing included."""
    bytes_sent: int
    """To other ranks, in forward and backward, by whatever used the layer's communicator meanwhile."""
    bytes_received: int
    collectives: int
    """Calls of that communicator."""
    seconds: dict[str, float]
    """By stage, "route" to "combine", and "combine.backward" to "route.backward": on the host, or on a GPU
    between what the stage puts on the stream. Empty unless `reset_stats(timed=True)`. Within them, "exchange": from
    when rows set out for other ranks until they are known to have come, what is under way at the same time as one;
    and of that "exchange.exposed": while nothing else was done."""

    @property
    def exposed_exchange_seconds(self) -> float:
        """While this rank did nothing but wait for rows: what a faster network, or more overlap, would save. 0 of a
        rank alone, and unless timed."""
        return self.seconds.get("exchange.exposed", 0.0)

    @property
    def hidden_exchange_seconds(self) -> float:
        """While rows were under way, or had come already, and this rank computed: the most that overlap has hidden."""
        return max(0.0, self.seconds.get("exchange", 0.0) - self.exposed_exchange_seconds)


class Probe:
    """The library's counters for one layer; a copy of a layer has its own."""

    def __init__(self) -> None:
        number = torch.ops.anabranch.new_probe()
        self.tensor = torch.tensor([number], dtype=torch.int64, device="cpu")
        weakref.finalize(self, torch.ops.anabranch.release_probe, number)

    def __deepcopy__(self, memo: dict[int, Any]) -> Probe:
        return Probe()

    def __reduce__(self) -> Any:
        return Probe, ()

    def reset(self, timed: bool) -> None:
        torch.ops.anabranch.reset_probe(self.tensor, timed)

    def stats(self) -> LayerStats:
        forwards, sent, received, collectives, stages, seconds, last_load = torch.ops.anabranch.read_probe(self.tensor)
        load = last_load.cpu() if len(last_load) else None
        return LayerStats(
            expert_load=load,
            imbalance=None if load is None else imbalance(load),
            forwards=forwards,
            bytes_sent=sent,
            bytes_received=received,
            collectives=collectives,
            seconds={stage.removeprefix("anabranch."): taken for stage, taken in zip(stages, seconds)},
        )


def imbalance(expert_load: Tensor) -> float:
    """Fullest expert's assignments over the mean of [num_experts]: 1 is perfect balance."""
    return torch.ops.anabranch.imbalance(expert_load)
