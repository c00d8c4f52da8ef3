"""What else one would use for the layer of layer.py on one GPU, each over the same parameters and the same x.

A peer is made of a `Case` and the tensors of it, and gives a function from x to y, and its parameters. Written against
transformers 5.17, liger-kernel 0.8.5 and SonicMoE 0.1.2.
"""

import importlib

import torch


class Missing(Exception):
    """Why a peer cannot take part."""


def package(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"package {(error.name or name).partition('.')[0]} is not installed") from error


def leaf(values):
    return values.detach().clone().requires_grad_()


def gated(case, name):
    if not case.glu:
        raise Missing(f"{name} is for gated activations")


def choose(x, gate, top_k):
    """Weights [T, k] fp32, which sum to 1, and ids [T, k]."""
    weights, ids = torch.softmax((x @ gate.t()).float(), dim=1).topk(top_k, dim=1)
    return weights / weights.sum(1, keepdim=True), ids


def grouped_experts(case, rows, up, down, ends):
    """Rows in the order of their experts, of which e's end before ends[e], through PyTorch's own grouped product."""
    hidden = torch._grouped_mm(rows, up.transpose(1, 2), ends)
    if case.glu:
        first, second = hidden.chunk(2, dim=1)
        hidden = torch.nn.functional.silu(first) * second
    else:
        hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    return torch._grouped_mm(hidden, down.transpose(1, 2), ends)


def grouped_mm(case, gate, up, down):
    """What one writes by hand: index operations and PyTorch's own grouped product."""
    gate, up, down = parameters = [leaf(gate), leaf(up), leaf(down)]

    def forward(x):
        weights, ids = choose(x, gate, case.top_k)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        token = order // case.top_k
        ends = torch.bincount(flat, minlength=case.experts).cumsum(0).int()
        rows = grouped_experts(case, x[token], up, down, ends)
        return torch.zeros_like(x).index_add(0, token, rows * weights.flatten()[order, None].to(x.dtype))

    return forward, parameters


def transformers(case, gate, up, down):
    """Qwen3-MoE's block with its experts' `grouped_mm`."""
    gated(case, "Qwen3-MoE's block")
    config = package("transformers").Qwen3MoeConfig(
        hidden_size=case.hidden,
        moe_intermediate_size=case.inner,
        num_experts=case.experts,
        num_experts_per_tok=case.top_k,
        norm_topk_prob=True,
        hidden_act="silu",
        num_hidden_layers=1,
    )
    config._experts_implementation = "grouped_mm"
    block = package("transformers.models.qwen3_moe.modeling_qwen3_moe").Qwen3MoeSparseMoeBlock(config)
    block.to(up.device, up.dtype).train()
    with torch.no_grad():
        block.gate.weight.copy_(gate)
        block.experts.gate_up_proj.copy_(up)
        block.experts.down_proj.copy_(down)

    def forward(x):
        y = block(x[None])
        return (y[0] if isinstance(y, tuple) else y).view_as(x)

    return forward, list(block.parameters())


def liger(case, gate, up, down):
    """liger-kernel's fused experts, which tune themselves for a minute or two at the first step of a shape."""
    gated(case, "liger-kernel's MoE")
    experts = package("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    gate, up, down = parameters = [leaf(gate), leaf(up), leaf(down)]

    def forward(x):
        weights, ids = choose(x, gate, case.top_k)
        return experts.apply(x, up, down, ids.int(), weights)

    return forward, parameters


def sonic(case, gate, up, down):
    """SonicMoE's layer with its own router; its gate and up rows alternate."""
    gated(case, "SonicMoE's layer")
    activation = package("sonicmoe.enums").ActivationType.SWIGLU
    layer = package("sonicmoe").MoE(case.experts, case.top_k, case.hidden, case.inner, activation, False, 0.02)
    layer.to(up.device, up.dtype).train()
    with torch.no_grad():
        layer.router.weight.copy_(gate)
        layer.c_fc.weight.copy_(torch.stack(up.chunk(2, dim=1), dim=2).flatten(1, 2))
        layer.c_proj.weight.copy_(down)
    return lambda x: layer(x)[0], list(layer.parameters())


PEERS = {"grouped_mm": grouped_mm, "transformers": transformers, "liger": liger, "sonic": sonic}
