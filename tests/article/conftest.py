"""experiments/article as a package; PyTorch on one thread; methods that go wrong in one way each."""

import random
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("experiments", "benchmarks", "launch")]
torch.set_num_threads(1)

from article import cases, measure, methods, problem  # noqa: E402

SMALL = cases.Case(2, 32, 24, experts=4, top_k=2, expert_hidden=40)


@pytest.fixture
def seed():
    value = random.randrange(1 << 31)
    print(f"seed {value}")
    return value


@pytest.fixture
def small(seed):
    """make(dtype, routing, case) → a problem on the CPU."""

    def make(dtype="fp32", routing="learned", case=SMALL):
        return problem.Problem(cases.Unit(case, dtype, routing), "cpu", seed)

    return make


@pytest.fixture
def rows_of(seed):
    """run(factories, ...) → rows by (method, pass) of a first turn."""

    def run(factories, dtype="fp32", routing="learned", case=SMALL, begun=lambda name: None, **settings):
        settings = measure.Settings("cpu", seed, **{"seconds": 1e-3, "rounds": 2, **settings})
        turn = measure.UnitTurn(cases.Unit(case, dtype, routing), factories, settings, begun)
        return {(row["method"], row["pass"]): row for row in turn.first()}

    return run


class Spoiled(methods.PlainLoop):
    """The plain loop, with one result changed: y, or a gradient by its name."""

    def __init__(self, problem, name, change):
        super().__init__(problem)
        self.name, self.change = name, change

    def __call__(self, x):
        y = super().__call__(x)
        if self.name == "y":
            return self.change(y)
        if self.name == "dx" and y.requires_grad:
            x.register_hook(self.change)
        return y

    def gradients(self, units):
        return {name: self.change(g) if name == self.name else g for name, g in super().gradients(units).items()}
