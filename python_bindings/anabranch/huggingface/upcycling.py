"""Dense feed-forward layers into experts (sparse upcycling, arXiv:2212.05055; with granularity, arXiv:2410.07524)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..groups import Group, as_group
from ..layer.activations import activation_name
from ..layer.held import first_expert
from ..layer.moe import MoE


class UpcycledFeedForward(nn.Module):
    """An anabranch layer in the place of a dense feed-forward: x [..., h] → [..., h]. Collective."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x).output


def upcycle(
    model: nn.Module,
    num_experts: int,
    top_k: int,
    *,
    granularity: int = 1,
    noise: float = 0.0,
    layers: list[str] | None = None,
    seed: int = 0,
    group: object = None,
    **options: Any,
) -> nn.Module:
    """Swaps the dense feed-forwards of a transformers model for layers whose experts are copies of them. In place, and
    returns the model, each rank with its experts only. Without noise the model computes what it did before.

    Every feed-forward becomes `num_experts` experts, of which a token takes `top_k`. With a `granularity` g > 1 each copy
    is cut into g experts of a g-th of the width: `num_experts · g` experts, of which a token takes `top_k · g`. Experts of
    one copy begin with the same row in the router, so that they are chosen together, and the weights are scaled by
    g.

    Args:
        model: with modules of `gate_proj`, `up_proj`, `down_proj` and an activation (Llama, Mistral, Qwen, Gemma, …), the
            same on every rank.
        noise: the experts' weights are multiplied by 1 + noise · ε, ε normal, each expert's own, to part them.
        layers: names of the modules to swap; None: all there are.
        seed: of the routers and the noise.
        options: more of `MoE`'s arguments. `attach_losses=True` with `balance_coefficient` balances a model that does not
            hand losses on.
        group: the expert-parallel group, see `as_group`. Collective over it.
    """
    found = {name: module for name, module in model.named_modules() if _is_feed_forward(module)}
    wanted = list(found) if layers is None else layers
    missing = [name for name in wanted if name not in found]
    if not wanted or missing:
        raise ValueError(f"upcycle: {missing or 'the model'} is no feed-forward of gate_proj, up_proj and down_proj")
    ranks = as_group(group)
    for place, name in enumerate(wanted):
        moe = upcycled(
            found[name],
            num_experts,
            top_k,
            granularity=granularity,
            noise=noise,
            seed=seed + place,
            group=ranks,
            **options,
        )
        model.set_submodule(name, UpcycledFeedForward(moe))
    return model


def upcycled(
    dense: nn.Module,
    num_experts: int,
    top_k: int,
    *,
    granularity: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    group: object = None,
    **options: Any,
) -> MoE:
    """One layer whose experts are copies of `dense`, a module of gate_proj, up_proj and down_proj; see `upcycle`."""
    name = activation_name(dense.act_fn)
    gate, up, down = (getattr(dense, part) for part in ("gate_proj", "up_proj", "down_proj"))
    inner, hidden = up.weight.shape
    if name is None:
        raise ValueError(f"upcycle: the activation {dense.act_fn} is not known here")
    if granularity < 1 or inner % granularity:
        raise ValueError(f"upcycle: granularity = {granularity} does not divide the feed-forward's width {inner}")
    if not 1 <= top_k <= num_experts or (top_k * granularity == 1 and num_experts > 1):
        raise ValueError(f"upcycle: top_k = {top_k} of {num_experts} copies, expected 2 or more, or a granularity")
    biases = [part.bias is not None for part in (gate, up, down)]
    if any(biases) and not all(biases):
        raise ValueError("upcycle: some of gate_proj, up_proj and down_proj have biases, and some have not")
    fixed: dict[str, Any] = {"renormalize": True, "routing_scale": float(granularity), "glu": True, "activation": name, "bias": all(biases)}
    if clash := sorted(fixed.keys() & options.keys()):
        raise ValueError(f"upcycle: {', '.join(clash)} follow from the dense layer")
    layer = MoE(
        hidden,
        inner // granularity,
        num_experts * granularity,
        top_k * granularity,
        seed=seed,
        group=group,
        device=up.weight.device,
        dtype=up.weight.dtype,
        **fixed,
        **options,
    )
    _fill(layer, (gate, up, down), granularity, noise, seed, as_group(group))
    return layer.train(dense.training)


def _is_feed_forward(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return all(isinstance(part, nn.Linear) for part in parts) and hasattr(module, "act_fn")


def _fill(layer: MoE, dense: tuple[Any, Any, Any], granularity: int, noise: float, seed: int, group: Group) -> None:
    gate, up, down = dense
    experts: Any = layer.get_submodule("experts")
    router: Any = layer.get_submodule("router")
    width = up.weight.shape[0] // granularity
    first = first_expert(layer.options["num_experts"], group)
    with torch.no_grad():
        for place in range(layer._any_weight().shape[0]):
            expert = first + place
            generator = torch.Generator().manual_seed((seed * 1_000_003 + expert) % 2**63)

            def parted(weight: Tensor, generator: torch.Generator = generator) -> Tensor:
                if noise == 0:
                    return weight
                drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
                return (weight * (1 + noise * drawn)).to(weight.dtype)

            rows = slice(expert % granularity * width, (expert % granularity + 1) * width)
            experts.up_weight[place] = torch.cat([parted(gate.weight[rows]), parted(up.weight[rows])])
            experts.down_weight[place] = parted(down.weight[:, rows])
            if layer.options["bias"]:
                experts.up_bias[place] = torch.cat([gate.bias[rows], up.bias[rows]])
                experts.down_bias[place] = down.bias / granularity
        # One row for all experts of a copy: they have the same scores, and are chosen together.
        copies = router.weight[::granularity].clone()
        router.weight.copy_(copies.repeat_interleave(granularity, 0))
