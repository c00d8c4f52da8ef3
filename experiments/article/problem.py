"""The inputs of a unit: tokens, gradient of the output, weights and routing, equal for every method."""

import torch

from . import cases

# How far a token's last expert must be ahead of the first one left out (logits have a deviation of about 1):
# far beyond fp32's rounding, so that every gate makes the same choice.
LEAST_GAP = 1e-3


class Problem:
    """
    x, dy [T, h]; up [E, n, h]; down [E, h, n], in the unit's type. The experts' outputs are weighted by the softmax
    of the logits of a token's experts, taken over these alone: of `gate` [E, h] fp32 where it is learned, otherwise
    of `logits` [T, k] fp32 for the experts `ids` [T, k]. `counts`: assignments of each expert.
    """

    def __init__(self, unit, device, seed):
        case = unit.case
        self.unit, self.case, self.device = unit, case, torch.device(device)
        self.dtype = cases.TYPES[unit.dtype]
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape, dtype=self.dtype):
            return torch.randn(shape, generator=generator, device=self.device, dtype=dtype)

        counts = None if unit.routing == "learned" else cases.counts_of(case, unit.routing)
        self.x, self.dy = normal(case.tokens, case.hidden), normal(case.tokens, case.hidden)
        self.up = normal(case.experts, case.expert_hidden, case.hidden).mul_(case.hidden**-0.5)
        self.down = normal(case.experts, case.hidden, case.expert_hidden).mul_(case.expert_hidden**-0.5)
        self.gate = self.logits = None
        if counts is None:
            self.gate = normal(case.experts, case.hidden, dtype=torch.float32).mul_(case.hidden**-0.5)
            self.exact_logits, self.ids = self._choose()
            counts = torch.bincount(self.ids.flatten(), minlength=case.experts).tolist()
        else:
            self.ids = cases.expert_ids(counts, case.tokens, case.top_k, generator)
            self.logits = normal(case.tokens, case.top_k, dtype=torch.float32)
            self.exact_logits = self.logits.double()
        self.counts = counts

    def _choose(self):
        """(logits [T, k] fp64, ids [T, k]); tokens on the brink become copies of one that is not."""
        case, gate = self.case, self.gate.double()
        logits = torch.cat([part.double() @ gate.t() for part in self.x.split(1 << 14)])
        if case.top_k < case.experts:
            best = logits.topk(case.top_k + 1, dim=1).values
            gap = best[:, -2] - best[:, -1]
            clear, brink = gap.argmax(), gap < LEAST_GAP
            self.x[brink] = self.x[clear].clone()
            logits[brink] = logits[clear].clone()
        values, ids = logits.topk(case.top_k, dim=1)
        return values, ids

    def bytes_of_inputs(self):
        return self.x.nbytes + self.dy.nbytes
