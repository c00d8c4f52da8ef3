"""The model of train_lm.py: that of examples/train_lm, drawn from the same generators, and published ones in its terms."""

import math

import anabranch
import torch
import torch.nn.functional as F
from lm_data import generator_of, seed_of
from torch import nn

DEFAULTS = dict(
    dtype="float32", vocabulary=256, hidden=128, layers=4, norm="layer", norm_epsilon=1e-5, tied_head=False, heads=4,
    kv_heads=0, head_size=0, qk_norm="none", rope_theta=1e4, yarn_factor=1.0, yarn_positions=0,
    yarn_beta_fast=32.0, yarn_beta_slow=1.0, yarn_bounds="whole", yarn_scale=0.0, yarn_mscale=0.0, yarn_mscale_all=0.0,
    attention_bias=False, kv_rank=0, query_rank=0, rope_size=0, value_size=0, experts=8, top_k=2, expert_hidden=256, glu=False, expert_biases=False, shared_expert_hidden=0, dense_layers=0,
    dense_hidden=0, gate="top_k", router_score="softmax", renormalize="auto", routing_scale=1.0, expert_groups=1, top_groups=1,
    group_score="top_two_sum", router_fp64=False, bias_rate=0.0, bias_update="sign",
)  # fmt: skip
LLAMA = dict(norm="rms", glu=True, dtype="bfloat16")
# By config.json of the models' repositories on Hugging Face.
PRESETS = {
    # allenai/OLMoE-1B-7B-0924
    "olmoe-1b-7b": LLAMA | dict(
        vocabulary=50304, hidden=2048, layers=16, heads=16, qk_norm="all", experts=64, top_k=8, expert_hidden=1024,
        renormalize="no"),
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": LLAMA | dict(
        vocabulary=151936, hidden=2048, layers=48, norm_epsilon=1e-6, heads=32, kv_heads=4, head_size=128, qk_norm="head",
        rope_theta=1e6, experts=128, top_k=8, expert_hidden=768),
    # moonshotai/Moonlight-16B-A3B
    "moonlight-16b-a3b": LLAMA | dict(
        vocabulary=163840, hidden=2048, layers=27, heads=16, head_size=128, kv_rank=512, rope_size=64, rope_theta=5e4,
        experts=64, top_k=6, expert_hidden=1408, shared_expert_hidden=2816, dense_layers=1, dense_hidden=11264,
        router_score="sigmoid", routing_scale=2.446, bias_rate=0.001),
    # openai/gpt-oss-20b, with full and plain attention, a router without bias and SiLU
    "gpt-oss-20b": LLAMA | dict(
        vocabulary=201088, hidden=2880, layers=24, heads=64, kv_heads=8, head_size=64, rope_theta=1.5e5, yarn_factor=32.0,
        yarn_positions=4096, yarn_bounds="exact", attention_bias=True, experts=32, top_k=4, expert_hidden=2880, expert_biases=True),
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": LLAMA | dict(
        vocabulary=32000, hidden=4096, layers=32, heads=32, kv_heads=8, rope_theta=1e6, experts=8, top_k=2,
        expert_hidden=14336),
    "tiny": LLAMA | dict(
        layers=3, kv_heads=2, head_size=32, qk_norm="head", expert_hidden=128, shared_expert_hidden=128, dense_layers=1,
        dense_hidden=256, dtype="float32"),
}  # fmt: skip


class Parameters:
    """Makes parameters one after another; those that are drawn have a generator each."""

    def __init__(self, options):
        self.options, self.drawn = options, 0
        self.kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}

    def normal(self, *sizes, deviation):
        generator = generator_of(self.options.seed, "parameter", self.drawn)
        self.drawn += 1
        return nn.Parameter((torch.randn(sizes, generator=generator) * deviation).to(**self.kind))

    def output(self, *sizes):
        """So that the residual stream's size does not grow with the number of layers."""
        return self.normal(*sizes, deviation=(2 * self.options.layers * sizes[1]) ** -0.5)

    def zeros(self, size, wanted=True):
        return nn.Parameter(torch.zeros(size, **self.kind)) if wanted else None

    def norm(self, size, rms):
        eps = self.options.norm_epsilon
        return nn.RMSNorm(size, eps, **self.kind) if rms else nn.LayerNorm(size, eps, bias=False, **self.kind)


def head_width(options):
    return options.head_size or options.hidden // options.heads


def attention_width(options):
    """Over all heads, the mean of what is multiplied to weigh a value and what is summed of it."""
    values = options.value_size or head_width(options)
    return options.heads * (head_width(options) + options.rope_size + values) // 2


def frequencies_of(options, **kind):
    """Radians from one position to the next, [rotated width / 2]; with YaRN (arXiv:2309.00071) those that turn slowly are divided."""
    width = options.rope_size or head_width(options)
    plain = options.rope_theta ** (torch.arange(width // 2, **kind) * (-2 / width))
    if options.yarn_factor == 1:
        return plain

    def number_that_turns(turns):
        return width * math.log(options.yarn_positions / (2 * math.pi * turns)) / (2 * math.log(options.rope_theta))

    first, last = number_that_turns(options.yarn_beta_fast), number_that_turns(options.yarn_beta_slow)
    if options.yarn_bounds == "whole":
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    stretched = ((torch.arange(width // 2, **kind) - first) / (last - first or 0.001)).clamp(0, 1)
    return torch.lerp(plain, plain / options.yarn_factor, stretched)


def scale_of(options, strength):
    """YaRN's of attention over so many more positions."""
    return 1 + 0.1 * strength * math.log(options.yarn_factor)


def rotation_scale(options):
    if options.yarn_scale and options.yarn_factor != 1:
        return options.yarn_scale
    if options.yarn_mscale and options.yarn_mscale_all:
        return scale_of(options, options.yarn_mscale) / scale_of(options, options.yarn_mscale_all)
    return scale_of(options, 1)


def turned(heads, rotation):
    """[B, S, heads, D], each pair of neighbours as a complex number times the rotation's, in fp32 at least."""
    real, imaginary = heads.to(rotation.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.unbind(-1)
    pairs = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), -1)
    return pairs.flatten(-2).to(heads.dtype)


def attend(query, key, value, scale=None):
    """Causal, of [B, S, heads, D], whose keys and values may have fewer heads."""
    grouped = query.shape[2] != key.shape[2]
    heads = (heads.transpose(1, 2) for heads in (query, key, value))
    mixed = F.scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Causal, with rotary positions, in heads that may share keys and values."""

    def __init__(self, options, parameters):
        super().__init__()
        self.heads, self.key_heads, self.width = options.heads, options.kv_heads or options.heads, head_width(options)
        queries, keys = self.heads * self.width, self.key_heads * self.width
        self.qkv = parameters.normal(queries + 2 * keys, options.hidden, deviation=options.hidden**-0.5)
        self.output = parameters.output(options.hidden, queries)
        self.qkv_bias = parameters.zeros(queries + 2 * keys, options.attention_bias)
        self.output_bias = parameters.zeros(options.hidden, options.attention_bias)
        self.of_each = options.qk_norm == "head"
        sizes = (self.width, self.width) if self.of_each else (queries, keys)
        norms = [parameters.norm(size, True) for size in sizes] if options.qk_norm != "none" else [None, None]
        self.query_norm, self.key_norm = norms

    def normed(self, heads, norm):
        if norm is None:
            return heads
        return norm(heads) if self.of_each else norm(heads.flatten(2)).view(heads.shape)

    def forward(self, x, rotation):
        heads = F.linear(x, self.qkv, self.qkv_bias).unflatten(-1, (-1, self.width))
        query, key, value = heads.split([self.heads, self.key_heads, self.key_heads], 2)
        query, key = turned(self.normed(query, self.query_norm), rotation), turned(self.normed(key, self.key_norm), rotation)
        return F.linear(attend(query, key, value), self.output, self.output_bias)


class LatentAttention(nn.Module):
    """Keys and values of all heads are made of one narrow vector a token (MLA, arXiv:2405.04434); queries may be, too."""

    def __init__(self, options, parameters):
        super().__init__()
        self.heads, self.width, self.rotated, self.rank = options.heads, head_width(options), options.rope_size, options.kv_rank
        values = options.value_size or self.width
        self.scale = scale_of(options, options.yarn_mscale_all) ** 2 / (self.width + self.rotated) ** 0.5

        def matrix(rows, columns):
            return parameters.normal(rows, columns, deviation=columns**-0.5)

        def norm(size):
            return nn.RMSNorm(size, 1e-6, **parameters.kind) if size else None

        self.query_down = matrix(options.query_rank, options.hidden) if options.query_rank else None
        self.query = matrix(self.heads * (self.width + self.rotated), options.query_rank or options.hidden)
        self.kv_down = matrix(self.rank + self.rotated, options.hidden)
        self.kv_up = matrix(self.heads * (self.width + values), self.rank)
        self.output = parameters.output(options.hidden, self.heads * values)
        self.query_norm, self.kv_norm = norm(options.query_rank), norm(self.rank)

    def forward(self, x, rotation):
        narrow = x if self.query_down is None else self.query_norm(F.linear(x, self.query_down))
        query = F.linear(narrow, self.query).unflatten(-1, (self.heads, -1))
        latent, shared = F.linear(x, self.kv_down).split([self.rank, self.rotated], -1)
        up = F.linear(self.kv_norm(latent), self.kv_up).unflatten(-1, (self.heads, -1))
        shared = turned(shared[:, :, None], rotation).expand(-1, -1, self.heads, -1)
        query = torch.cat((query[..., : self.width], turned(query[..., self.width :], rotation)), -1)
        key = torch.cat((up[..., : self.width], shared), -1)
        return F.linear(attend(query, key, up[..., self.width :], self.scale), self.output)


class FeedForward(nn.Module):
    """Of the layers without experts."""

    def __init__(self, options, parameters):
        super().__init__()
        self.glu = options.glu
        self.up = parameters.normal(
            (1 + self.glu) * options.dense_hidden, options.hidden, deviation=options.hidden**-0.5
        )
        self.down = parameters.output(options.hidden, options.dense_hidden)

    def forward(self, x):
        up = F.linear(x, self.up)
        if not self.glu:
            return F.linear(F.gelu(up, approximate="tanh"), self.down)
        gate, up = up.chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


class Block(nn.Module):
    def __init__(self, options, layer, parameters):
        super().__init__()
        self.attention = (LatentAttention if options.kv_rank else Attention)(options, parameters)
        self.feed_forward = FeedForward(options, parameters) if layer < options.dense_layers else None
        self.moe = None if self.feed_forward else moe_of(options, layer)
        rms = options.norm == "rms"
        self.attention_norm, self.moe_norm = (parameters.norm(options.hidden, rms) for _ in range(2))

    def attend(self, x, rotation):
        """The dense part: what torch.compile makes faster."""
        x = x + self.attention(self.attention_norm(x), rotation)
        normal = self.moe_norm(x)
        return (x, normal) if self.moe is not None else (x + self.feed_forward(normal), normal)

    def forward(self, x, rotation):
        x, normal = self.attend(x, rotation)
        if self.moe is None:
            return x, None
        output = self.moe(normal)
        return x + output.output, output


def moe_of(options, layer):
    """Of a single expert the weight itself is taken, which trains the router."""
    renormalize = options.top_k > 1 if options.renormalize == "auto" else options.renormalize == "yes"
    return anabranch.MoE(
        options.hidden, options.expert_hidden, options.experts, options.top_k, glu=options.glu,
        activation="silu" if options.glu else "gelu_tanh", bias=options.expert_biases,
        shared_expert_hidden_size=options.shared_expert_hidden, gate=options.gate, router_score=options.router_score,
        renormalize=renormalize, routing_scale=options.routing_scale, expert_bias=options.bias_rate > 0,
        expert_bias_update=options.bias_update, expert_groups=options.expert_groups, top_groups=options.top_groups, group_score=options.group_score,
        router_fp64=options.router_fp64, jitter=options.jitter, forced_routing=options.forced_routing,
        cross_node_limit=options.cross_node_limit, balance=options.balance, receive_rows_limit=options.receive_rows_limit,
        sequence_balance_coefficient=options.sequence_balance_loss, global_balance_coefficient=options.global_balance_loss,
        seed=seed_of(options.seed, "experts", layer), device=options.device, dtype=getattr(torch, options.dtype),
    )  # fmt: skip


class LanguageModel(nn.Module):
    def __init__(self, options):
        super().__init__()
        parameters = Parameters(options)
        self.options = options
        self.routers_draw = options.gate in ("noisy_top_k", "gshard") or options.jitter or options.forced_routing == "random"
        self.routing_seed = 0  # what routers draw depends on this and their layer alone
        sizes = (options.vocabulary, options.hidden)
        self.embedding = parameters.normal(*sizes, deviation=0.02 if options.tied_head else 0.5)
        self.blocks = nn.ModuleList(Block(options, layer, parameters) for layer in range(options.layers))
        self.norm = parameters.norm(options.hidden, options.norm == "rms")
        self.head = self.embedding if options.tied_head else parameters.normal(*sizes, deviation=0.02)

    def rotation(self, tokens):
        """[S, 1, rotated width / 2, 2]: cosine and sine of position · frequency, times YaRN's scale."""
        kind = {"dtype": torch.promote_types(self.embedding.dtype, torch.float32), "device": tokens.device}
        angles = torch.outer(torch.arange(tokens.shape[1], **kind), frequencies_of(self.options, **kind))
        return torch.stack((angles.cos(), angles.sin()), -1)[:, None] * rotation_scale(self.options)

    def forward(self, tokens):
        """Tokens [B, S] → logits [B, S, V] and what each MoE layer returns."""
        x, rotation, outputs = F.embedding(tokens, self.embedding), self.rotation(tokens), []
        for layer, block in enumerate(self.blocks):
            if self.routers_draw:
                torch.manual_seed(seed_of(self.routing_seed, "routing", layer))
            x, output = block(x, rotation)
            outputs += [output] if output is not None else []
        return F.linear(self.norm(x), self.head), outputs
