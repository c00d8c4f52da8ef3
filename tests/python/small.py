"""A model of which every rank has its part, its batches, and the same model whole as the oracle has it."""

import anabranch
import reference
import torch
from torch import nn

HIDDEN, INNER, EXPERTS, TOP_K = 8, 12, 4, 2
OPTIONS = dict(activation="silu", glu=True)


class Small(nn.Module):
    """x [T, 8] → [T, 8]: a replicated projection, a layer whose experts are spread, another projection."""

    def __init__(self, seed, dtype=torch.float64, group=None, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.before = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.after = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.moe = anabranch.MoE(
            HIDDEN, INNER, EXPERTS, TOP_K, seed=seed, dtype=dtype, group=group, **{**OPTIONS, **options}
        )

    def forward(self, x):
        return self.after(x + self.moe(torch.tanh(self.before(x))).output)


def batch_of(seed, rank, size, tokens=12, dtype=torch.float64):
    """This rank's rows of a batch, and what the outputs are multiplied by in the loss."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    rows = slice(rank * tokens // size, (rank + 1) * tokens // size)
    return x[rows].to(dtype), dy[rows].to(dtype)


def whole_parameters(seed):
    """Of the model on one rank, in fp64, by name."""
    return {name: p.detach() for name, p in Small(seed, group=anabranch.groups.alone()).named_parameters()}


def expected_gradients(parameters, batches, ranks):
    """Of the mean over ranks of ⟨output, dy⟩, summed over the whole `batches` (x, dy): plain PyTorch."""
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    options = reference.Options(top_k=TOP_K, **OPTIONS)
    of_layer = {name.removeprefix("moe."): p for name, p in leaves.items() if name.startswith("moe.")}
    for x, dy in batches:
        rows = torch.tanh(nn.functional.linear(x, leaves["before.weight"], leaves["before.bias"]))
        y = x + reference.moe(rows, of_layer, options).output
        y = nn.functional.linear(y, leaves["after.weight"], leaves["after.bias"])
        ((y * dy).sum() / ranks).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def part_of(name, whole, rank, size):
    """This rank's rows of an expert parameter, else all of it."""
    if ".experts." not in name:
        return whole
    count = whole.shape[0] // size
    return whole[rank * count : (rank + 1) * count]


def assert_gradients(model, expected, rank, size):
    """fp64 throughout: sums of fewer than 100 terms, each through fewer than 10 products."""
    for name, p in model.named_parameters():
        name = name.removeprefix("module.").replace("_fsdp_wrapped_module.", "")
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        wanted = part_of(name, expected[name], rank, size)
        assert grad.shape == wanted.shape, name
        error = (grad - wanted).abs().max().item()
        assert error <= 1000 * 2.0**-53 * max(1.0, expected[name].abs().max().item()), f"{name} is off by {error}"
