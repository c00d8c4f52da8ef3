"""One rank of `anabranch bench exchange`: rows to their experts and back, by the library and by torch.distributed."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from anabranch import functional

from .bench import _compare


def main() -> None:
    arguments = argparse.Namespace(**json.loads(sys.argv[1]))
    rank, device = int(os.environ["RANK"]), torch.device(arguments.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    ranks = dist.get_world_size()
    torch.manual_seed(rank)
    dtype = getattr(torch, arguments.dtype)
    x = torch.randn(arguments.tokens, arguments.hidden, device=device, dtype=dtype)
    experts = arguments.experts - arguments.experts % ranks or ranks
    top_k = min(arguments.top_k, experts)
    ids = torch.rand(arguments.tokens, experts, device=device).topk(top_k).indices
    weights = torch.full((arguments.tokens, top_k), 1.0 / top_k, device=device)

    def library() -> Any:
        plan = functional.plan(ids, weights, experts, dist.group.WORLD)
        rows, _ = functional.dispatch(x, plan)
        return functional.combine(functional.unpermute(functional.permute(rows, plan), plan), plan)[0]

    def plain() -> Any:
        """A row for every assignment, as one writes it by all_to_all_single."""
        owner = (ids // (experts // ranks)).flatten()
        order = owner.argsort(stable=True)
        send = torch.bincount(owner, minlength=ranks)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send)
        sent, received = send.tolist(), receive.tolist()
        rows = x.new_empty(sum(received), arguments.hidden)
        dist.all_to_all_single(rows, x[order // top_k], received, sent)
        back = x.new_empty(len(order), arguments.hidden)
        dist.all_to_all_single(back, rows, sent, received)
        return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // top_k, back.float()).to(dtype)

    _compare("the exchange", library(), plain())
    times = {name: _seconds(step, device, arguments.seconds) for name, step in (("anabranch", library), ("torch", plain))}
    if rank == 0:
        print(json.dumps([{"what": n, "ms": s * 1e3, "of_torch": times["torch"] / s} for n, s in times.items()]))
    dist.destroy_process_group()


def _seconds(step: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """The median over as many calls as rank 0 has time for; in each, that of the slowest rank."""
    times: list[float] = []
    start = time.perf_counter()
    go_on = torch.ones(1, device=device)
    while go_on.item():
        dist.barrier()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took = torch.tensor([time.perf_counter() - begin], device=device)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        times.append(took.item())
        go_on.fill_(float(len(times) < 5 or time.perf_counter() - start < seconds))
        dist.broadcast(go_on, 0)
    counted = sorted(times[2:])
    return counted[len(counted) // 2]


if __name__ == "__main__":
    main()
