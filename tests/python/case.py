"""A layer, what it is given, what it should return, and how far from that a right answer may lie."""

from __future__ import annotations

import dataclasses

import reference
import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = list(UNIT_ROUNDOFF)


@dataclasses.dataclass
class Expected:
    """Of a whole batch: values, and for each the sum of its terms' magnitudes."""

    result: reference.Result
    gradients: dict[str, Tensor]
    magnitudes: dict[str, Tensor]


def parameters_of(layer: torch.nn.Module) -> dict[str, Tensor]:
    """In fp64."""
    return {name: parameter.detach().cpu().double() for name, parameter in layer.named_parameters()}


def expect(
    x: Tensor,
    dy: Tensor,
    parameters: dict[str, Tensor],
    options: reference.Options,
    routing: tuple[Tensor, Tensor] | None = None,
) -> Expected:
    """Of the loss ⟨output, dy⟩: gradients by "x", "weights" (with routing) and the parameters' names."""
    x, dy = x.detach().cpu().double().requires_grad_(), dy.detach().cpu().double()
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    if routing is not None:
        routing = (routing[0].cpu(), routing[1].detach().cpu().double().requires_grad_())
    result = reference.moe(x, leaves, options, routing)
    (result.output * dy).sum().backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None} | {"x": x.grad}
    if routing is not None:
        gradients["weights"] = routing[1].grad
    return Expected(result, gradients, _magnitudes(x, dy, leaves, options, result, routing is None))


def _magnitudes(x, dy, leaves, options, result, with_gate: bool) -> dict[str, Tensor]:
    """With absolute values everywhere and no activation (none is steeper than 1.13) the same sums bound
    their terms; softmax adds each token's weights' gradients up once more."""
    linear = dataclasses.replace(options, activation="identity", limit=torch.inf)
    size = x.detach().abs().requires_grad_()
    weights = result.weights.detach().abs().requires_grad_()
    sizes = {name: leaf.detach().abs().requires_grad_() for name, leaf in leaves.items()}
    tokens = size.reshape(-1, size.shape[-1])
    output = reference.mix(tokens, sizes, result.expert_ids, weights, linear).reshape(x.shape)
    (output * dy.abs()).sum().backward()
    found = {name: leaf.grad for name, leaf in sizes.items() if leaf.grad is not None}
    found |= {"output": output.detach(), "x": size.grad, "weights": weights.grad}
    if with_gate:
        # |dlogits| ≤ Σ_k |dweight|, up to a factor of 2 (4 where they are renormalised by a sum below 1).
        dlogits = 4 * weights.grad.sum(-1, keepdim=True).expand(-1, leaves["router.weight"].shape[0])
        if options.renormalize:
            dlogits = dlogits / reference.route(
                x.detach().reshape(tokens.shape) @ leaves["router.weight"].detach().T,
                dataclasses.replace(options, renormalize=False),
            )[2].sum(-1, keepdim=True).clamp(max=1)
        found["router.weight"] = dlogits.T @ tokens.detach()
        found["x"] = found["x"] + (dlogits @ sizes["router.weight"].detach()).reshape(x.shape)
    return found


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype, length: int, what: str) -> None:
    """|actual − expected| ≤ magnitude · (length · u(fp32 or fp64) + roundings · u(dtype)): each of `length`
    additions and of a few roundings on the way errs by one unit roundoff of what is added or rounded."""
    roundings = 8
    accumulation = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    allowed = 1.3 * magnitude * (length * accumulation + roundings * UNIT_ROUNDOFF[dtype]) + 1e-300
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    error = (actual.detach().cpu().double() - expected).abs()
    worst = (error / allowed).max().item() if error.numel() else 0.0
    assert worst <= 1 and not error.isnan().any(), f"{what}: {worst:.3g} times the allowed error"


def separated(x: Tensor, gate: Tensor, top_k: int) -> bool:
    """Whether fp32 cannot choose other experts than fp64 does."""
    logits = x.detach().cpu().double().reshape(-1, x.shape[-1]) @ gate.detach().cpu().double().T
    ordered = logits.sort(-1, descending=True).values
    if top_k == gate.shape[0] or not logits.numel():
        return True
    return bool((ordered[:, top_k - 1] - ordered[:, top_k]).min() > 1e-5)
