"""Other libraries' layers through their public interfaces, each behind the same plain gate.

Written against MegaBlocks 0.10 with stanford-stk 0.7.1 and grouped_gemm 0.3, transformers 5.17, ScatterMoE 0.3,
Tutel 0.4 and FastMoE 1.1. SonicMoE 0.1.2 and liger-kernel 0.8.5 have gated experts alone: `benchmarks/gpu/layer.py`
measures them.
"""

import importlib
import types

import torch
from torch.profiler import record_function

from .methods import Gated, Missing, Unsupported, adopt, experts_of, leaf, padded_to_blocks, padded_to_fullest


def package(name):
    """An import that says which package is missing; anything else that goes wrong in it is told as it is."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"package {error.name.partition('.')[0]} is not installed") from error


def tanh_gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


class MegaBlocks(Gated):
    """`mlp_impl`: grouped, or sparse. Both weights are [E * n, h]. `lean`: with its memory_optimized_mlp."""

    def __init__(self, problem, mlp_impl, lean=False):
        super().__init__(problem)
        self.sparse = mlp_impl == "sparse"
        package("stk" if self.sparse else "grouped_gemm")
        arguments = package("megablocks.layers.arguments")
        if not self.sparse and problem.dtype is not torch.bfloat16:
            raise Unsupported("grouped_gemm takes bf16 alone")
        case = problem.case
        options = dict(hidden_size=case.hidden, ffn_hidden_size=case.expert_hidden, memory_optimized_mlp=lean)
        options.update(moe_num_experts=case.experts, moe_top_k=case.top_k, moe_loss_weight=0.0)
        options.update(bias=False, return_bias=False, mlp_type="mlp", mlp_impl=mlp_impl, device=problem.device)
        options.update(fp16=problem.dtype is torch.float16, bf16=problem.dtype is torch.bfloat16)
        try:
            options = arguments.Arguments(**options)
        except (ValueError, ImportError) as error:  # its own refusal: sparse with a newer triton
            raise Unsupported(str(error)) from error
        self.layer = package("megablocks.layers.dmoe").dMoE(options).experts
        mlp = self.layer.mlp
        self.weights = [adopt(mlp, "w1", problem.up), adopt(mlp, "w2", problem.down.transpose(1, 2))]

    def experts(self, x, weights, ids):
        return self.layer(x, None, weights.to(x.dtype), ids)

    def up_and_down_gradients(self, units):
        dup, ddown = (weight.grad.view_as(self.problem.up) for weight in self.weights)
        return experts_of(dup, units), experts_of(ddown, units).transpose(1, 2)

    def padding(self):
        return padded_to_blocks(self.problem.counts) if self.sparse else 0


class Transformers(Gated):
    """Its `grouped_mm` under experts of the form that it has for models without a gate's projection."""

    def __init__(self, problem):
        super().__init__(problem)
        own = package("transformers.integrations.moe")
        config = types.SimpleNamespace(_experts_implementation="grouped_mm")
        self.layer = own.use_experts_implementation(has_gate=False)(UngatedExperts)(config, problem)
        self.weights = [self.layer.up_proj, self.layer.down_proj]

    def experts(self, x, weights, ids):
        return self.layer(x, ids, weights)


class UngatedExperts(torch.nn.Module):
    """What transformers asks of a model's experts; it replaces their forward."""

    def __init__(self, _config, problem):
        super().__init__()
        self.num_experts, self.act_fn = problem.case.experts, tanh_gelu
        self.up_proj, self.down_proj = leaf(problem.up), leaf(problem.down)

    def forward(self, x, ids, weights):
        raise NotImplementedError("transformers has not taken its place")


class ScatterMoE(Gated):
    def __init__(self, problem):
        super().__init__(problem)
        case = problem.case
        mlp = package("scattermoe.mlp").MLP(
            input_size=case.hidden,
            hidden_size=case.expert_hidden,
            num_experts=case.experts,
            top_k=case.top_k,
            activation=tanh_gelu,
        )
        self.layer = mlp
        self.weights = [adopt(mlp.experts, "weight", problem.up), adopt(mlp.output_experts, "weight", problem.down)]
        self.layer.to(problem.device)

    def experts(self, x, weights, ids):
        return self.layer(x, weights.to(x.dtype), ids)


class TutelGate(torch.nn.Module):
    """Logits [T, E] whose softmax is the plain gate's choice and weights: minus infinity for experts left out."""

    def __init__(self, model_dim, num_global_experts, top_k, plain, **_):
        super().__init__()
        self.num_experts, self.top_k, self.plain = num_global_experts, top_k, plain

    def forward(self, x):
        weights, ids = self.plain(x)
        with record_function("route"):
            out = torch.full((x.size(0), self.num_experts), -torch.inf, dtype=weights.dtype, device=x.device)
            return out.scatter(1, ids, weights.log()).to(x.dtype)


class Tutel(Gated):
    """No capacity is given, so it pads every expert to the fullest. Its second weight is [E, n, h]."""

    coarse_logits = True

    def __init__(self, problem):
        super().__init__(problem)
        case = problem.case
        gate = {"type": "custom", "module": TutelGate, "top_k": case.top_k, "plain": self.gate, "capacity_factor": 0}
        experts = {"type": "ffn", "num_experts_per_device": case.experts, "hidden_size_per_expert": case.expert_hidden}
        experts.update(activation_fn=tanh_gelu, has_fc1_bias=False, has_fc2_bias=False)
        self.layer = package("tutel.moe").moe_layer(gate_type=gate, experts=experts, model_dim=case.hidden)
        own = self.layer.experts
        second = problem.down.transpose(1, 2)
        self.weights = [adopt(own, "batched_fc1_w", problem.up), adopt(own, "batched_fc2_w", second)]
        self.layer.to(problem.device)

    def __call__(self, x):
        return self.layer(x)

    def up_and_down_gradients(self, units):
        dup, ddown = (experts_of(weight.grad, units) for weight in self.weights)
        return dup, ddown.transpose(1, 2)

    def padding(self):
        return padded_to_fullest(self.problem.counts)


class FastMoEGate(torch.nn.Module):
    """The plain gate, in the form FastMoE asks of one. `plain` is set before the layer is made."""

    plain = None

    def __init__(self, d_model, num_expert, world_size, top_k):
        super().__init__()

    def forward(self, x):
        weights, ids = self.plain(x)
        return ids, weights.to(x.dtype)


class FastMoE(Gated):
    """One module an expert; its biases are there, and zero."""

    def __init__(self, problem):
        super().__init__(problem)
        case = problem.case
        gate = type("Gate", (FastMoEGate,), {"plain": staticmethod(self.gate)})
        self.layer = package("fmoe").FMoETransformerMLP(
            num_expert=case.experts,
            d_model=case.hidden,
            d_hidden=case.expert_hidden,
            activation=tanh_gelu,
            top_k=case.top_k,
            gate=gate,
        )
        self.layer.to(device=problem.device, dtype=problem.dtype)
        pairs = [
            (adopt(expert.htoh4, "weight", problem.up[e]), adopt(expert.h4toh, "weight", problem.down[e]))
            for e, expert in enumerate(self.layer.experts)
        ]
        self.ups, self.downs = zip(*pairs)
        self.weights = list(self.layer.parameters())

    def __call__(self, x):
        return self.layer(x)

    def up_and_down_gradients(self, units):
        units = slice(None) if units is None else units
        shape = (self.problem.case.expert_hidden, self.problem.case.hidden)
        dup = torch.stack([up.grad.view(shape)[units] for up in self.ups])
        return dup, torch.stack([down.grad.view(shape[::-1])[:, units] for down in self.downs])


def gated_alone(name, module):
    """Of a library whose experts are all gated, which the article's are not."""

    def refuse(_problem):
        package(module)
        raise Unsupported(f"{name} has gated experts alone")

    return refuse


FACTORIES = {
    "MegaBlocks grouped": lambda problem: MegaBlocks(problem, "grouped"),
    "MegaBlocks grouped lean": lambda problem: MegaBlocks(problem, "grouped", lean=True),
    "MegaBlocks sparse": lambda problem: MegaBlocks(problem, "sparse"),
    "MegaBlocks sparse lean": lambda problem: MegaBlocks(problem, "sparse", lean=True),
    "transformers": Transformers,
    "ScatterMoE": ScatterMoE,
    "SonicMoE": gated_alone("SonicMoE", "sonicmoe"),
    "liger-kernel": gated_alone("liger-kernel", "liger_kernel"),
    "Tutel": Tutel,
    "FastMoE": FastMoE,
}
DESCRIPTIONS = {
    "MegaBlocks grouped": "MegaBlocks with grouped_gemm, as it comes: one cuBLAS product an expert, on one stream",
    "MegaBlocks grouped lean": "the same with memory_optimized_mlp",
    "MegaBlocks sparse": "MegaBlocks with stanford-stk: Triton kernels over blocks of 128",
    "MegaBlocks sparse lean": "the same with memory_optimized_mlp",
    "transformers": "transformers' grouped_mm: index operations and LibTorch's grouped product",
}
