"""The products with a block-sparse matrix S, one by one: MegaBlocks' Triton kernels beside the library's own.

S [P, E n] has a token's own expert's columns alone; D [P, h] is dense, W [E, n, h]:

    SDD    S = D Wᵀ    the first projection forward; S's gradient from that of the second's output
    DSD    D = S W     the second projection forward; the gradient of the layer's rows
    DSᵀD   W = Sᵀ D    both weights' gradients: S read column by column, by an index of its blocks (BCSC), no copy
    DDS    Wᵀ = Dᵀ S   the same weights' gradients the other way round, by the same index
"""

import statistics

import torch

from .measure import why
from .oracle import ACCUMULATION_ROUNDOFF, unit_roundoff
from .peers import package
from .registry import versions
from .stages import stage_of_kernel

BLOCK = 128
TURNS = 3
STEPS = 5


class Operands:
    """Random ones: `dense` [P, h], `weight` [E, n, h], and `values`: S as rows [P, n]."""

    def __init__(self, problem):
        case, self.counts = problem.case, problem.counts
        generator = torch.Generator(problem.device).manual_seed(2)

        def normal(*shape, scale):
            values = torch.randn(shape, generator=generator, device=problem.device, dtype=problem.dtype)
            return values.mul_(scale)

        rows = sum(self.counts)
        self.dense = normal(rows, case.hidden, scale=1.0)
        self.values = normal(rows, case.expert_hidden, scale=1.0)
        self.weight = normal(case.experts, case.expert_hidden, case.hidden, scale=case.hidden**-0.5)

    def expected(self, form):
        """In fp64."""
        dense, values = (rows.double().split(self.counts) for rows in (self.dense, self.values))
        weights = self.weight.double().unbind()
        if form == "SDD":
            return torch.cat([d @ w.t() for d, w in zip(dense, weights)])
        if form == "DSD":
            return torch.cat([s @ w for s, w in zip(values, weights)])
        return torch.stack([s.t() @ d for s, d in zip(values, dense)])  # [E, n, h]

    def terms(self, form):
        """Of the longest sum of a result."""
        return {"SDD": self.weight.size(2), "DSD": self.weight.size(1)}.get(form, max(self.counts))


def ours(operands, engine):
    """Form → product. DDS is DSᵀD with its operands exchanged, and has no kernel of its own."""
    counts = torch.tensor(operands.counts)
    own = torch.ops.anabranch
    return {
        "SDD": lambda: own.grouped_gemm(operands.dense, operands.weight, counts, engine),
        "DSD": lambda: own.grouped_gemm_dgrad(operands.values, operands.weight, counts, engine),
        "DSᵀD": lambda: own.grouped_gemm_wgrad(operands.values, operands.dense, counts, engine),
    }


class MegaBlocks:
    """Their topology over rows that are padded to blocks, and stk's products."""

    def __init__(self, problem, operands):
        self.stk, arguments = package("stk"), package("megablocks.layers.arguments")
        case = problem.case
        options = dict(hidden_size=case.hidden, ffn_hidden_size=case.expert_hidden, moe_num_experts=case.experts)
        # Of the layer its topology is used alone; what has sparse experts refuses newer Tritons, which stk does not.
        options.update(bias=False, mlp_impl="grouped", device=problem.device)
        options.update(fp16=problem.dtype is torch.float16, bf16=problem.dtype is torch.bfloat16)
        layer = package("megablocks.layers.dmoe").ParallelDroplessMLP(arguments.Arguments(**options))
        self.counts, self.width = operands.counts, case.expert_hidden
        self.padded = [-(-count // BLOCK) * BLOCK for count in self.counts]
        bins = torch.tensor(self.padded, device=problem.device).cumsum(0).int()
        self.dense, values = self.pad(operands.dense), self.pad(operands.values)
        self.topology = layer.topology(self.dense, bins)
        self.weight = operands.weight.flatten(0, 1)
        blocks = values.view(-1, BLOCK, self.width // BLOCK, BLOCK).transpose(1, 2).reshape(-1, BLOCK, BLOCK)
        self.sparse = self.with_values(blocks)

    def pad(self, rows):
        """[P, n] with rows of zeros after each expert's, up to whole blocks."""
        parts = rows.split(self.counts)
        return torch.cat([torch.nn.functional.pad(p, (0, 0, 0, n - len(p))) for p, n in zip(parts, self.padded)])

    def with_values(self, blocks):
        t = self.topology
        of_rows = (t.row_indices, t.column_indices, t.offsets)
        return self.stk.Matrix(t.size(), blocks, *of_rows, t.column_indices_t, t.offsets_t, t.block_offsets_t)

    def products(self):
        ops, sparse = self.stk.ops, self.sparse
        return {
            "SDD": lambda: ops.sdd(self.dense, self.weight.t(), sparse),
            "DSD": lambda: ops.dsd(sparse, self.weight),
            "DSᵀD": lambda: ops.dsd(sparse.t(), self.dense),
            "DDS": lambda: ops.dds(self.dense.t(), sparse),
        }

    def as_ours(self, form, result):
        """A product's result in the shape of Operands.expected."""
        if form == "SDD":
            blocks = result.data.view(-1, self.width // BLOCK, BLOCK, BLOCK)
            result = blocks.transpose(1, 2).reshape(-1, self.width)
        elif form in ("DSᵀD", "DDS"):
            result = result.t() if form == "DDS" else result
            return result.reshape(len(self.counts), self.width, -1)
        parts = result.split(self.padded)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts)])


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def measure(problem, clock, engines):
    """Records {method, form, status, ms, turns, relative, allowed} or {method, status, reason}; products take turns.

    `ms`: the GPU's, of products' kernels alone. `relative`: the error by root mean squares; rounding the result, and a
    sum in fp32, allow as much as `allowed`.
    """
    operands = Operands(problem)
    of_stk = f"stk, Triton {versions().get('triton')}"
    methods = {engine: (ours(operands, engine), lambda form, result: result) for engine in engines}
    try:
        theirs = MegaBlocks(problem, operands)
        methods[of_stk] = (theirs.products(), theirs.as_ours)
    except Exception as error:
        status, reason = why(error)
        yield dict(method=of_stk, form=None, status=status, reason=reason)
    found = {}
    for form in ("SDD", "DSD", "DSᵀD", "DDS"):
        expected = operands.expected(form)
        allowed = unit_roundoff(problem.dtype) + operands.terms(form) * ACCUMULATION_ROUNDOFF
        for method, (products, as_expected) in methods.items():
            if form in products:
                error = relative(as_expected(form, products[form]()), expected)
                found[method, form] = dict(relative=error, allowed=allowed, turns=[])
    for _ in range(TURNS):
        for (method, form), record in found.items():
            product = methods[method][0][form]
            product()
            ms = clock.busy_milliseconds(product, STEPS, lambda kernel: stage_of_kernel(kernel) == "GEMM")
            record["turns"].append(ms)
    for (method, form), record in found.items():
        status = "ok" if record["relative"] <= record["allowed"] else "wrong"
        yield dict(method=method, form=form, status=status, ms=statistics.median(record["turns"]), **record)
