"""The library's engines and its baselines, each through `anabranch.MoE`: its own router where the gate is learned."""

import contextlib
import functools

import torch

from .methods import Gate, Method, adopt, experts_of, padded_to_blocks, padded_to_fullest


def padding_of(engine, counts):
    if engine in ("padded_bmm", "block_diagonal"):
        return padded_to_fullest(counts)
    if engine.startswith("block_sparse"):
        return padded_to_blocks(counts, int(engine.removeprefix("block_sparse").lstrip("_") or 128))
    return 0


class Engine(Method):
    def __init__(self, problem, engine):
        import anabranch

        case = problem.case
        self.problem, self.engine, self.tunes = problem, engine, engine == "auto"
        sizes = (case.hidden, case.expert_hidden, case.experts, case.top_k)
        several = case.top_k > 1  # a single weight that is always 1 is no router's of ours: the plain gate gives it
        self.layer = anabranch.MoE(
            *sizes, renormalize=several, engine=engine, seed=0, device="meta", dtype=problem.dtype
        )
        self.layer.to_empty(device=problem.device)
        self.leaves = [
            adopt(self.layer.experts, "up_weight", problem.up),
            adopt(self.layer.experts, "down_weight", problem.down),
        ]
        self.gate = None
        if problem.gate is None or not several:
            self.gate = Gate(problem)
            self.leaves.append(self.gate.leaf)
        else:
            self.leaves.append(adopt(self.layer.router, "weight", problem.gate))

    def __call__(self, x):
        if self.gate is None:
            return self.layer(x).output
        weights, ids = self.gate(x)
        return self.layer(x, (ids, weights)).output

    def gradients(self, units):
        dup, ddown, routing = (parameter.grad for parameter in self.leaves)
        ddown = ddown if units is None else ddown[:, :, units]
        name = "dlogits" if self.problem.gate is None else "dgate"
        return {"dup": experts_of(dup, units), "ddown": ddown, name: routing}

    def padding(self):
        return padding_of(self.engine, self.problem.counts)


def factories(device):
    """A factory an engine; none where the package is not installed, no baselines where it is without them."""
    try:
        import anabranch
    except ModuleNotFoundError as error:
        if error.name != "anabranch":
            raise
        return {}
    with contextlib.suppress(ModuleNotFoundError):
        import anabranch_baselines  # noqa: F401 (adds them to the engines)
    names = ["auto", *anabranch.grouped_gemm_engines(torch.device(device))]
    return {name: functools.partial(Engine, engine=name) for name in names}
