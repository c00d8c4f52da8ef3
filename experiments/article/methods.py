"""What ways to run the layer have in common, and the plain one: a plain gate and plain experts.

A method takes a problem, shares its weights where the layouts agree, and computes y = method(x). `leaves` are what
gets gradients beside x; `gradients(units)` gives them as the oracle names them.
"""

import torch
from torch.profiler import record_function


class Unsupported(Exception):
    """The method does not do this problem; the message says what."""


class Missing(Exception):
    """A package that the method needs cannot be imported; the message names it."""


def leaf(values):
    """A parameter that shares the memory of `values`."""
    return torch.nn.Parameter(values.detach())


def adopt(owner, name, values):
    """Makes `values` a module's parameter of that name, in that parameter's shape."""
    parameter = leaf(values.reshape(getattr(owner, name).shape))
    setattr(owner, name, parameter)
    return parameter


def experts_of(values, units):
    """Of [E, n, h]: some hidden units of every expert."""
    return values if units is None else values[:, units]


class Gate:
    """Routing in plain PyTorch: weights [T, k] fp32 and ids [T, k], learned from x or as the problem gives them."""

    def __init__(self, problem):
        self.ids, self.top_k = problem.ids, problem.case.top_k
        self.learned = problem.gate is not None
        self.leaf = leaf((problem.gate if self.learned else problem.logits).clone())

    def __call__(self, x):
        with record_function("route"):
            if not self.learned:
                return torch.softmax(self.leaf, dim=1), self.ids
            values, ids = (x.float() @ self.leaf.t()).topk(self.top_k, dim=1)
            return torch.softmax(values, dim=1), ids

    def gradient(self):
        return {"dgate" if self.learned else "dlogits": self.leaf.grad}


class Method:
    coarse_logits = False  # whether it holds the routing's logits in the type of x
    tunes = False  # whether its first steps try ways to run, and choose among them

    def padding(self):
        """Rows computed beyond the assignments."""
        return 0


class Gated(Method):
    """A method behind the plain gate: `experts(x, weights, ids)`."""

    def __init__(self, problem):
        self.problem = problem
        self.gate = Gate(problem)

    def __call__(self, x):
        weights, ids = self.gate(x)
        return self.experts(x, weights, ids)

    @property
    def leaves(self):
        return [self.gate.leaf, *self.weights]

    def gradients(self, units):
        dup, ddown = self.up_and_down_gradients(units)
        return {"dup": dup, "ddown": ddown, **self.gate.gradient()}

    def up_and_down_gradients(self, units):
        """dup [E, m, h] and ddown [E, h, m]; here of weights [E, n, h] and [E, h, n]."""
        up, down = self.weights
        return experts_of(up.grad, units), down.grad if units is None else down.grad[:, :, units]


class PlainLoop(Gated):
    """What one writes in plain PyTorch: gather, two products an expert, index_add."""

    def __init__(self, problem):
        super().__init__(problem)
        self.weights = [leaf(problem.up), leaf(problem.down)]

    def experts(self, x, weights, ids):
        with record_function("permute"):
            order = ids.flatten().argsort(stable=True)
            tokens = order // ids.size(1)
            counts = torch.bincount(ids.flatten(), minlength=self.weights[0].size(0)).tolist()
            rows = x[tokens].split(counts)
        results = []
        for part, up, down in zip(rows, *(weight.unbind() for weight in self.weights)):
            with record_function("up"):
                hidden = part @ up.t()
            with record_function("activation"):
                hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
            with record_function("down"):
                results.append(hidden @ down.t())
        with record_function("unpermute"):
            scaled = torch.cat(results) * weights.flatten()[order, None].to(x.dtype)
            return torch.zeros_like(x).index_add(0, tokens, scaled)


def padded_to_fullest(counts):
    return len(counts) * max(counts) - sum(counts)


def padded_to_blocks(counts, block=128):
    return sum(-count % block for count in counts)
