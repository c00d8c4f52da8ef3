"""What a layer must give, in fp64 by plain products, and how far a right result may lie from it.

Every rounding to the unit's type, of unit roundoff u, counts with six whole roundoffs of what is rounded; a sum of L
terms in fp32 (u') with L u' times the root of its terms' squares. These deviations are independent, so their squares
add, and pass through each product as squares do. That is tests/support/tolerance.h, element by element. Six deviations
are for the worst element; the root mean square of all must stay within two.

Large cases: outputs are checked for some tokens, weight gradients for some of every expert's hidden units, these
summed over all rows.
"""

import dataclasses
import math

import torch

ACCUMULATION_ROUNDOFF = 2.0**-24
DEVIATIONS = 6
CHUNK_BYTES = 1 << 30  # of fp64 intermediate values alive at once, about
CHECK_FLOPS = 2e12  # of each of the two halves of a check; what is more is sampled


def gelu(x):
    """Its tanh form, and the derivative."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * scale * (1 + 3 * cubic * x**2)
    return 0.5 * x * (1 + tanh), slope


GELU_CURVATURE = 2 / math.sqrt(2 * math.pi)  # most of |gelu''|: at 0


def unit_roundoff(dtype):
    """Half the distance from 1 to the next larger number."""
    return torch.finfo(dtype).eps / 2


@dataclasses.dataclass
class Comparison:
    """`used`: the largest error as a part of what is allowed there, or that of the root mean square; `relative`: error
    of the whole over its value, by root mean squares."""

    error: float
    used: float
    relative: float

    @property
    def right(self):
        return self.used <= 1.0


@dataclasses.dataclass
class Expected:
    value: torch.Tensor
    allowed: torch.Tensor

    def compare(self, actual):
        if actual is None or actual.shape != self.value.shape:
            return Comparison(math.inf, math.inf, math.inf)
        error = (actual.double() - self.value).abs()
        used = torch.where(error <= self.allowed, error / self.allowed, torch.inf)  # NaN is never close
        used = torch.where((error > self.allowed) & error.isfinite(), error / self.allowed, used)
        of_all = DEVIATIONS / 2 * error.norm() / self.allowed.norm()
        used = torch.maximum(used.max(), of_all.nan_to_num(nan=math.inf))
        return Comparison(error.max().item(), used.item(), (error.norm() / self.value.norm().clamp_min(1e-300)).item())


class Hidden:
    """One expert's rows at some hidden units: values [R, m] and the squares of their deviations, `*_var`."""

    def __init__(self, oracle, x, dy, weight, weight_var, up, down):
        u, a = oracle.roundoff, ACCUMULATION_ROUNDOFF
        rounded, h = oracle.rounded, x.size(1)
        pre = x @ up.t()
        pre_var = rounded(pre) + (h * a) ** 2 * (x**2 @ (up**2).t())
        self.activated, slope = gelu(pre)
        # 1 + tanh cancels where `pre` is negative: what is left has the error of `pre`, in the slope that of 1.
        self.activated_var = slope**2 * pre_var + rounded(self.activated) + rounded(pre / 2)
        self.upstream = dy @ down  # gradient at the activation, before the routing weight
        self.upstream_var = ((DEVIATIONS * u) ** 2 + (h * a) ** 2) * (dy**2 @ down**2) + rounded(self.upstream)
        w, w_var = weight[:, None], weight_var[:, None]
        self.dpre = w * self.upstream * slope
        self.dpre_var = (
            w**2 * (slope**2 * self.upstream_var + (GELU_CURVATURE * self.upstream) ** 2 * pre_var)
            + w_var * (self.upstream * slope) ** 2
            + 2 * rounded(w * self.upstream)
            + rounded(self.dpre)
        )
        self.weighted = w * self.activated
        self.weighted_var = w**2 * self.activated_var + w_var * self.activated**2 + rounded(self.weighted)


class Oracle:
    """Expected results of a problem. `tokens` [S], `units` [m]: what is checked of them; None: all.

    `coarse_logits`: those of a method that holds its routing's logits in the unit's type.
    """

    def __init__(self, problem, check_flops=CHECK_FLOPS, coarse_logits=False):
        self.problem, self.case = problem, problem.case
        self.roundoff = unit_roundoff(problem.dtype)
        self.smallest = torch.finfo(problem.dtype).smallest_normal * torch.finfo(problem.dtype).eps
        case, device = self.case, problem.device
        wide = 16 * case.top_k * case.hidden * case.expert_hidden  # flops a token
        deep = 16 * case.assignments * case.hidden  # flops a hidden unit
        generator = torch.Generator(device).manual_seed(0)

        def some(of, count):
            return torch.randperm(of, generator=generator, device=device)[: max(1, int(count))].sort().values

        self.tokens = some(case.tokens, check_flops / wide) if check_flops < wide * case.tokens else None
        self.units = some(case.expert_hidden, check_flops / deep) if check_flops < deep * case.expert_hidden else None
        self.weights = torch.softmax(problem.exact_logits, dim=1)
        self.weights_var = self._weights_var(coarse_logits)

    def rounded(self, values, roundoff=None):
        """Square of the deviation that storing the values adds."""
        return (DEVIATIONS * (values.abs() * (roundoff or self.roundoff) + self.smallest / 2)) ** 2

    def _weights_var(self, coarse_logits):
        logits = self.problem.exact_logits
        logits_var = self.rounded(logits, None if coarse_logits else ACCUMULATION_ROUNDOFF)
        if self.problem.gate is not None:
            terms = self.problem.x[:1024].double().norm(dim=1).max() * self.problem.gate.double().norm(dim=1).max()
            logits_var = logits_var + (ACCUMULATION_ROUNDOFF * self.case.hidden**0.5 * terms) ** 2
        return 2 * self.weights**2 * logits_var.amax(dim=1, keepdim=True) + self.rounded(self.weights)

    def chosen(self, values):
        return values if self.tokens is None else values[self.tokens]

    def chunks(self, expert, among, width):
        """(tokens [R], slots [R]) of an expert among some tokens, in parts that fit."""
        ids = self.problem.ids if among is None else self.problem.ids[among]
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        size = max(64, CHUNK_BYTES // (8 * 12 * width))
        for start in range(0, rows.numel(), size):
            yield rows[start : start + size], slots[start : start + size]

    def expected(self):
        """Expected results by name: y and dx [S, h], dup [E, m, h], ddown [E, h, m], dlogits [S, k] or dgate [E, h].

        Where tokens are sampled, dgate is that of a dy which is zero elsewhere (`masked_dy`).
        """
        return {**self._of_tokens(), **self._of_units()}

    def masked_dy(self):
        masked = torch.zeros_like(self.problem.dy)
        masked[self.tokens] = self.problem.dy[self.tokens]
        return masked

    def _of_tokens(self):
        problem, a = self.problem, ACCUMULATION_ROUNDOFF
        x, dy = self.chosen(problem.x).double(), self.chosen(problem.dy).double()
        weights, weights_var = self.chosen(self.weights), self.chosen(self.weights_var)
        y, y_var, dx, dx_var = (torch.zeros_like(x) for _ in range(4))
        dweights, dweights_var = torch.zeros_like(weights), torch.zeros_like(weights)
        h, n = self.case.hidden, self.case.expert_hidden
        for expert in range(self.case.experts):
            up, down = problem.up[expert].double(), problem.down[expert].double()
            for rows, slots in self.chunks(expert, self.tokens, max(h, n)):
                w, w_var, dys = weights[rows, slots], weights_var[rows, slots], dy[rows]
                hidden = Hidden(self, x[rows], dys, w, w_var, up, down)
                out = hidden.activated @ down.t()
                out_var = (hidden.activated_var + (n * a * hidden.activated) ** 2) @ (down**2).t() + self.rounded(out)
                w, w_var = w[:, None], w_var[:, None]
                y.index_add_(0, rows, w * out)
                y_var.index_add_(0, rows, w**2 * out_var + w_var * out**2 + self.rounded(w * out))
                row_dx = hidden.dpre @ up
                row_dx_var = (hidden.dpre_var + (n * a * hidden.dpre) ** 2) @ up**2 + self.rounded(row_dx)
                dx.index_add_(0, rows, row_dx)
                dx_var.index_add_(0, rows, row_dx_var)
                dweights[rows, slots] = (dys * out).sum(1)
                dweights_var[rows, slots] = (
                    (dys**2 * (out_var + (h * a * out) ** 2)).sum(1)
                    + (hidden.upstream**2 * (hidden.activated_var + (n * a * hidden.activated) ** 2)).sum(1)
                    + (hidden.upstream_var * hidden.activated**2).sum(1)
                )
        dweights_var += self.rounded(dweights)
        routing, gate_dx, gate_dx_var = self._of_routing(x, weights, weights_var, dweights, dweights_var)
        dx_var += self.rounded(dx) + self.rounded(gate_dx) + gate_dx_var
        dx += gate_dx
        y_var, dx_var = y_var + self.rounded(y), dx_var + self.rounded(dx)
        return {"y": Expected(y, y_var.sqrt()), "dx": Expected(dx, dx_var.sqrt()), **routing}

    def _of_routing(self, x, weights, weights_var, dweights, dweights_var):
        """Gradients on the gate's side, and what they add to dx."""
        off = dweights - (weights * dweights).sum(1, keepdim=True)
        dlogits = weights * off
        shared = (weights**2 * dweights_var + weights_var * dweights**2).sum(1, keepdim=True)
        dlogits_var = weights**2 * (dweights_var + shared) + weights_var * off**2 + self.rounded(dlogits)
        if self.problem.gate is None:
            none = torch.zeros_like(x)
            return {"dlogits": Expected(dlogits, dlogits_var.sqrt())}, none, none
        ids, gate, a = self.chosen(self.problem.ids), self.problem.gate.double(), ACCUMULATION_ROUNDOFF
        every = torch.zeros(x.size(0), self.case.experts, dtype=x.dtype, device=x.device)
        every_var = torch.zeros_like(every).scatter_(1, ids, dlogits_var)
        every = every.scatter_(1, ids, dlogits)
        dgate = every.t() @ x
        length = self.case.tokens * a
        dgate_var = (every_var + (length * every) ** 2).t() @ x**2 + self.rounded(dgate, a)
        return {"dgate": Expected(dgate, dgate_var.sqrt())}, every @ gate, every_var @ gate**2

    def _of_units(self):
        problem, a, u = self.problem, ACCUMULATION_ROUNDOFF, self.roundoff
        units = slice(None) if self.units is None else self.units
        width = max(self.case.hidden, self.case.expert_hidden if self.units is None else len(self.units))
        dups, ddowns = [], []
        for expert in range(self.case.experts):
            up, down = problem.up[expert, units].double(), problem.down[expert][:, units].double()
            dup, dup_var, ddown, ddown_var = (torch.zeros_like(t) for t in (up, up, down, down))
            length = (problem.counts[expert] * a) ** 2
            for rows, slots in self.chunks(expert, None, width):
                x, dy = problem.x[rows].double(), problem.dy[rows].double()
                hidden = Hidden(self, x, dy, self.weights[rows, slots], self.weights_var[rows, slots], up, down)
                dup += hidden.dpre.t() @ x
                dup_var += (hidden.dpre_var + length * hidden.dpre**2).t() @ x**2
                ddown += dy.t() @ hidden.weighted
                ddown_var += (dy**2).t() @ (hidden.weighted_var + (length + (DEVIATIONS * u) ** 2) * hidden.weighted**2)
            dups.append((dup, dup_var + self.rounded(dup)))
            ddowns.append((ddown, ddown_var + self.rounded(ddown)))
        stacked = ([torch.stack(parts) for parts in zip(*pairs)] for pairs in (dups, ddowns))
        return {name: Expected(value, var.sqrt()) for name, (value, var) in zip(("dup", "ddown"), stacked)}
