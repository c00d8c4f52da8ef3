"""The library beside torch on this machine. Both are given the same numbers, and compared before they are timed."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from .problem import Problem

Row = dict[str, Any]


def run(arguments: argparse.Namespace) -> list[Row]:
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() and _has_cuda() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not (torch.cuda.is_available() and _has_cuda())):
        raise Problem(f"--device {device}: " + ("there is no GPU that this build runs on" if device == "cuda" else "cpu or cuda"))
    arguments.device = device
    arguments.dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    for name in ("tokens", "hidden", "expert_hidden", "experts", "top_k", "ranks"):
        if getattr(arguments, name) < 1:
            raise Problem(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1")
    if arguments.top_k > arguments.experts:
        raise Problem(f"--top-k {arguments.top_k} of {arguments.experts} experts")
    return {"layer": _layer, "gemm": _gemm, "exchange": _exchange}[arguments.what](arguments)


def table(rows: list[Row]) -> str:
    lines = [f"{'':34s} {'ms':>10s} {'of torch':>9s}"]
    lines += [f"{row['what']:34s} {row['ms']:10.3f} {row['of_torch']:8.2f}x" for row in rows]
    return "\n".join(lines)


def _has_cuda() -> bool:
    from anabranch.features import with_cuda

    return with_cuda()


def _milliseconds(step: Callable[[], Any], device: str, seconds: float) -> float:
    """The median of as many calls as fit, behind two that nobody counts."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once(), once()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        times.append(once())
    return sorted(times)[len(times) // 2] * 1e3


def _timed(ways: dict[str, Callable[[], Any]], device: str, seconds: float) -> list[Row]:
    """Rows, each with its speed as a multiple of the way named torch."""
    times = {name: _milliseconds(step, device, seconds) for name, step in ways.items()}
    return [{"what": name, "ms": ms, "of_torch": times["torch"] / ms} for name, ms in times.items()]


def _compare(name: str, found: Any, expected: Any) -> None:
    """Within rounding: of sums of 16-bit products, a few of its units over the largest."""
    import torch

    unit = torch.finfo(expected.dtype).eps
    worst = (found.float() - expected.float()).abs().max().item() if found.numel() else 0.0
    allowed = 64 * unit * max(expected.float().abs().max().item() if expected.numel() else 0.0, 1e-30)
    if worst > allowed:
        raise Problem(f"{name} differs from torch by {worst}, more than {allowed}: please report it")


def _has_grouped_products(arguments: argparse.Namespace) -> bool:
    """Whether torch multiplies all experts at once at these sizes: rows of whole 16 bytes, on a GPU of bf16 alone."""
    import torch
    import torch.nn.functional as F

    dtype = getattr(torch, arguments.dtype)
    aligned = all(size * dtype.itemsize % 16 == 0 for size in (arguments.hidden, arguments.expert_hidden))
    return hasattr(F, "grouped_mm") and aligned and (arguments.device == "cpu" or dtype == torch.bfloat16)


def _of_torch(arguments: argparse.Namespace, loop: Callable[[], Any], grouped: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """The ways of torch, of which the one named torch is what the others are compared with."""
    if not _has_grouped_products(arguments):
        return {"torch": loop}
    _compare("torch's grouped product", grouped(), loop())
    return {"torch": grouped, "torch, an expert at a time": loop}


def _layer(arguments: argparse.Namespace) -> list[Row]:
    import anabranch
    import torch
    import torch.nn.functional as F
    from anabranch.groups import alone

    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(1)
    layer = anabranch.MoE(
        arguments.hidden, arguments.expert_hidden, arguments.experts, arguments.top_k, glu=True, activation="silu", group=alone(),
        device=arguments.device, dtype=dtype, seed=1,
    )  # fmt: skip
    weights = dict(layer.named_parameters())
    x = torch.randn(arguments.tokens, arguments.hidden, device=arguments.device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def route() -> Any:
        logits = x.float() @ weights["router.weight"].float().T
        share, chosen = logits.softmax(-1).topk(arguments.top_k)
        return share / share.sum(-1, keepdim=True), chosen

    def loop() -> Any:
        """An expert after the other, as one writes it first."""
        share, chosen = route()
        y = torch.zeros_like(x, dtype=torch.float32)
        for expert in range(arguments.experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], weights["experts.up_weight"][expert]).chunk(2, -1)
            result = F.linear(F.silu(gate) * up, weights["experts.down_weight"][expert])
            y = y.index_add(0, token, result.float() * share[token, slot, None])
        return y.to(dtype)

    def grouped() -> Any:
        share, chosen = route()
        order = chosen.flatten().argsort(stable=True)
        token = order // arguments.top_k
        ends = chosen.flatten().bincount(minlength=arguments.experts).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x[token], weights["experts.up_weight"].mT, offs=ends).chunk(2, -1)
        result = F.grouped_mm(F.silu(gate) * up, weights["experts.down_weight"].mT, offs=ends)
        weighted = result.float() * share.flatten()[order, None]
        return torch.zeros_like(x, dtype=torch.float32).index_add(0, token, weighted).to(dtype)

    def step(way: Callable[[], Any]) -> Any:
        return torch.autograd.grad(way(), [x, *weights.values()], dy)

    _compare("the layer", layer(x).output, loop())
    ways = {"anabranch": lambda: layer(x).output, **_of_torch(arguments, loop, grouped)}
    return _timed({name: functools.partial(step, way) for name, way in ways.items()}, arguments.device, arguments.seconds)


def _gemm(arguments: argparse.Namespace) -> list[Row]:
    import anabranch
    import torch
    import torch.nn.functional as F
    from anabranch import functional

    dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(1)
    chosen = torch.randint(arguments.experts, (arguments.tokens * arguments.top_k,))
    counts = torch.bincount(chosen, minlength=arguments.experts)
    x = torch.randn(len(chosen), arguments.hidden, device=arguments.device, dtype=dtype)
    weight = torch.randn(arguments.experts, arguments.expert_hidden, arguments.hidden, device=arguments.device, dtype=dtype)
    sizes = counts.tolist()
    ends = counts.cumsum(0).to(device=arguments.device, dtype=torch.int32)

    def loop() -> Any:
        return torch.cat([rows @ w.T for rows, w in zip(x.split(sizes), weight)])

    def grouped() -> Any:
        return F.grouped_mm(x, weight.mT, offs=ends)

    ways: dict[str, Callable[[], Any]] = {}
    for engine in ["auto", *anabranch.grouped_gemm_engines(arguments.device)]:
        try:
            found = functional.grouped_gemm(x, weight, counts, engine)
        except (RuntimeError, ValueError):  # not of this type or size
            continue
        _compare(f"engine {engine}", found, loop())
        ways[f"anabranch, {engine}"] = functools.partial(functional.grouped_gemm, x, weight, counts, engine)
    ways |= _of_torch(arguments, loop, grouped)
    return _timed(ways, arguments.device, arguments.seconds)


def _exchange(arguments: argparse.Namespace) -> list[Row]:
    """On ranks of their own, by torchrun."""
    given = json.dumps({name: value for name, value in vars(arguments).items() if not callable(value)})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // arguments.ranks)))
    path = os.pathsep.join(part for part in sys.path if part)
    result = subprocess.run(
        [*launcher, "-m", "anabranch_cli.bench_ranks", given], text=True, capture_output=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": path},
    )  # fmt: skip
    if result.returncode:
        raise Problem(f"{arguments.ranks} ranks did not come to an end:\n{result.stderr}")
    rows: list[Row] = json.loads(result.stdout.splitlines()[-1])
    return rows
