"""Packages with the peers' interfaces, that compute in plain PyTorch: for the plumbing of their adapters."""

import dataclasses
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


def feed_forward(x, weights, ids, up, down, activation):
    """up [E, n, h], down [E, h, n]; every assignment in a loop over experts."""
    y = torch.zeros_like(x)
    for expert in range(up.size(0)):
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        out = activation(x[rows] @ up[expert].t()) @ down[expert].t()
        y = y.index_add(0, rows, out * weights[rows, slots, None].to(x.dtype))
    return y


def garbage(*shape):
    """What an adapter does not fill is seen."""
    return nn.Parameter(torch.full(shape, torch.nan))


# MegaBlocks


@dataclass
class Arguments:
    hidden_size: int
    ffn_hidden_size: int
    moe_num_experts: int
    bias: bool
    mlp_impl: str
    fp16: bool
    bf16: bool
    device: torch.device
    moe_top_k: int = 1
    return_bias: bool = False
    moe_loss_weight: float = 0.0
    mlp_type: str = "mlp"
    memory_optimized_mlp: bool = False
    activation_fn: Callable = staticmethod(lambda x: nn.functional.gelu(x, approximate="tanh"))

    def __post_init__(self):
        if self.mlp_impl == "sparse" and self.hidden_size % 8:
            raise ValueError("Sparse MLP is not supported with triton >=3.2.0.")
        assert not self.bias and not self.return_bias and self.moe_loss_weight == 0 and self.mlp_type == "mlp"


class MegaBlocksExperts(nn.Module):
    def __init__(self, arguments):
        super().__init__()
        self.arguments = arguments
        self.mlp = nn.Module()
        wide = arguments.moe_num_experts * arguments.ffn_hidden_size
        self.mlp.w1, self.mlp.w2 = garbage(wide, arguments.hidden_size), garbage(wide, arguments.hidden_size)

    def forward(self, x, scores, expert_weights, top_experts):
        assert expert_weights.dtype == x.dtype and top_experts.shape == (x.size(0), self.arguments.moe_top_k)
        shape = (self.arguments.moe_num_experts, self.arguments.ffn_hidden_size, self.arguments.hidden_size)
        up, down = self.mlp.w1.view(shape), self.mlp.w2.view(shape).transpose(1, 2)
        return feed_forward(x, expert_weights, top_experts, up, down, self.arguments.activation_fn)


class ParallelDroplessMLP(nn.Module):
    def __init__(self, arguments):
        super().__init__()
        self.wide = arguments.ffn_hidden_size
        self.experts = arguments.moe_num_experts

    def topology(self, x, padded_bins):
        """The blocks of each token's own expert, in rows of blocks."""
        across = self.wide // BLOCK
        rows = torch.arange(x.size(0) // BLOCK).repeat_interleave(across)
        expert = torch.searchsorted(padded_bins, rows * BLOCK, right=True)
        columns = expert * across + torch.arange(rows.numel()) % across
        return Matrix((x.size(0), self.experts * self.wide), None, rows, columns, None, None, None, None)


class dMoE(nn.Module):
    def __init__(self, arguments):
        super().__init__()
        self.experts = MegaBlocksExperts(arguments)


# stanford-stk

BLOCK = 128


@dataclass
class Matrix:
    """Blocks [count, BLOCK, BLOCK] at block rows and columns; `transposed` read the other way."""

    shape: tuple[int, int]
    data: torch.Tensor | None
    row_indices: torch.Tensor
    column_indices: torch.Tensor
    offsets: torch.Tensor | None
    column_indices_t: torch.Tensor | None
    offsets_t: torch.Tensor | None
    block_offsets_t: torch.Tensor | None
    transposed: bool = False

    def size(self):
        return self.shape

    def t(self):
        return dataclasses.replace(self, transposed=True)

    def places(self):
        for i, (row, column) in enumerate(zip(self.row_indices.tolist(), self.column_indices.tolist())):
            yield i, slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)

    def dense(self):
        whole = torch.zeros(self.shape, dtype=self.data.dtype)
        for i, rows, columns in self.places():
            whole[rows, columns] = self.data[i]
        return whole.t() if self.transposed else whole


def sdd(left, right, topology):
    whole = left @ right
    data = torch.stack([whole[rows, columns] for _, rows, columns in topology.places()])
    return dataclasses.replace(topology, data=data)


def dsd(left, right):
    return left.dense() @ right


def dds(left, right):
    return left @ right.dense()


# ScatterMoE


class ParallelExperts(nn.Module):
    def __init__(self, num_experts, input_size, output_size):
        super().__init__()
        self.weight = garbage(num_experts, output_size, input_size)


class ScatterMLP(nn.Module):
    def __init__(self, input_size, hidden_size, num_experts, top_k, bias=False, activation=None):
        super().__init__()
        self.experts = ParallelExperts(num_experts, input_size, hidden_size)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size)
        self.activation = activation

    def forward(self, x, expert_p, expert_idxs):
        return feed_forward(x, expert_p, expert_idxs, self.experts.weight, self.output_experts.weight, self.activation)


# transformers


def use_experts_implementation(has_gate):
    assert not has_gate

    def instead(experts_class):
        def forward(self, x, top_k_index, top_k_weights):
            assert self.config._experts_implementation == "grouped_mm" and self.num_experts == self.up_proj.size(0)
            return feed_forward(x, top_k_weights, top_k_index, self.up_proj, self.down_proj, self.act_fn)

        def made(config, *arguments):
            experts = experts_class(config, *arguments)
            experts.config = config
            return experts

        experts_class.forward = forward
        return made

    return instead


# Tutel


class TutelExperts(nn.Module):
    def __init__(self, experts, hidden, inner, activation):
        super().__init__()
        self.batched_fc1_w, self.batched_fc2_w = garbage(experts, inner, hidden), garbage(experts, inner, hidden)
        self.activation = activation


class MOELayer(nn.Module):
    def __init__(self, gate_type, model_dim, experts):
        super().__init__()
        assert gate_type.pop("type") == "custom" and experts.pop("type") == "ffn"
        assert not experts.pop("has_fc1_bias") and not experts.pop("has_fc2_bias")
        count, inner = experts.pop("num_experts_per_device"), experts.pop("hidden_size_per_expert")
        self.experts = TutelExperts(count, model_dim, inner, experts.pop("activation_fn"))
        gate = gate_type.pop("module")
        self.capacity_factor = gate_type.get("capacity_factor", 1.0)
        self.gate = gate(model_dim=model_dim, num_global_experts=count, **gate_type)

    def forward(self, x):
        assert self.capacity_factor == 0, "tokens beyond a capacity would be dropped"
        scores = torch.softmax(self.gate(x), dim=1)
        weights, ids = scores.topk(self.gate.top_k, dim=1)
        weights = weights / weights.sum(1, keepdim=True)
        own = self.experts
        return feed_forward(x, weights, ids, own.batched_fc1_w, own.batched_fc2_w.transpose(1, 2), own.activation)


# FastMoE


class FMoELinear(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = garbage(1, outputs, inputs), nn.Parameter(torch.zeros(1, outputs))


class FMoEExpert(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.htoh4, self.h4toh = FMoELinear(hidden, inner), FMoELinear(inner, hidden)


class FMoETransformerMLP(nn.Module):
    def __init__(self, num_expert, d_model, d_hidden, activation, top_k, gate):
        super().__init__()
        self.experts = nn.ModuleList([FMoEExpert(d_model, d_hidden) for _ in range(num_expert)])
        self.activation, self.top_k = activation, top_k
        self.gate = gate(d_model, num_expert, 1, top_k)

    def forward(self, x):
        ids, weights = self.gate(x)
        assert weights.dtype == x.dtype
        up = torch.cat([expert.htoh4.weight for expert in self.experts])
        down = torch.cat([expert.h4toh.weight for expert in self.experts])
        return feed_forward(x, weights.view(-1, self.top_k), ids, up, down, self.activation)


PACKAGES = {
    "stk": {"Matrix": Matrix, "ops": types.SimpleNamespace(sdd=sdd, dsd=dsd, dds=dds)},
    "grouped_gemm": {},
    "megablocks": {},
    "megablocks.layers": {},
    "megablocks.layers.arguments": {"Arguments": Arguments},
    "megablocks.layers.dmoe": {"dMoE": dMoE, "ParallelDroplessMLP": ParallelDroplessMLP},
    "transformers": {},
    "transformers.integrations": {},
    "transformers.integrations.moe": {"use_experts_implementation": use_experts_implementation},
    "scattermoe": {},
    "scattermoe.mlp": {"MLP": ScatterMLP},
    "sonicmoe": {},
    "liger_kernel": {},
    "tutel": {},
    "tutel.moe": {"moe_layer": MOELayer},
    "fmoe": {"FMoETransformerMLP": FMoETransformerMLP},
}


def install(monkeypatch):
    for name, contents in PACKAGES.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
