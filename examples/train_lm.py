#!/usr/bin/env python3
"""Trains a Mixture-of-Experts language model on any text: the Python twin of examples/train_lm.

Alone, or data parallel with the experts spread over the ranks:

    python examples/train_lm.py --data FILE
    torchrun --nproc-per-node 2 examples/train_lm.py --data FILE
    mpirun -n 2 python examples/train_lm.py --data FILE

The same options give the model, batches and metrics.jsonl of the C++ program, up to rounding. DIR also holds
TensorBoard's files. (Checkpoints and a sample of text: the C++ program.)
"""

import argparse
import math
import time

import anabranch
import torch
import torch.nn.functional as F
from lm_data import generator_of, open_data, seed_of
from lm_metrics import MetricsLog, flops_per_token, gradient_norms, peak_flops, peak_memory
from torch import nn
from tqdm import tqdm

VOCABULARY = 256  # bytes
DEFAULTS = dict(  # those of `train_lm --help`, which says what they are
    output="output", device="cpu", dtype="float32", hidden=128, expert_hidden=256, layers=4, heads=4, experts=8, top_k=2,
    steps=1600, batch_size=16, sequence_length=128, seed=1, learning_rate=3e-3, warmup=60, weight_decay=0.1, clip=1.0,
    balance_loss=0.01, z_loss=0.001, log_interval=10, validation_interval=100, validation_sequences=128,
)  # fmt: skip


class Block(nn.Module):
    def __init__(self, options, layer, normal):
        super().__init__()
        hidden, self.heads = options.hidden, options.heads
        self.attention_qkv = nn.Parameter(normal(3 * hidden, hidden, deviation=hidden**-0.5))
        self.attention_output = nn.Parameter(normal(hidden, hidden, deviation=(2 * options.layers * hidden) ** -0.5))
        glu = {"glu": True, "activation": "silu"} if options.glu else {}
        seed = seed_of(options.seed, "experts", layer)
        kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
        weights = {"renormalize": options.top_k > 1}  # of a single expert the weight itself, which trains the router
        sizes = (hidden, options.expert_hidden, options.experts, options.top_k)
        self.moe = anabranch.MoE(*sizes, seed=seed, **weights, **glu, **kind)
        self.attention_norm = nn.LayerNorm(hidden, bias=False, **kind)
        self.moe_norm = nn.LayerNorm(hidden, bias=False, **kind)

    def attention(self, x, rotation):
        batch, length, hidden = x.shape
        qkv = F.linear(x, self.attention_qkv).view(batch, length, 3, self.heads, hidden // self.heads)
        turned = torch.view_as_complex(qkv[:, :, :2].unflatten(-1, (-1, 2))) * rotation
        query, key = torch.view_as_real(turned).flatten(-2).transpose(1, 3).unbind(2)  # [B, heads, S, head size]
        mixed = F.scaled_dot_product_attention(query, key, qkv[:, :, 2].transpose(1, 2), is_causal=True)
        return F.linear(mixed.transpose(1, 2).reshape(x.shape), self.attention_output)

    def forward(self, x, rotation):
        x = x + self.attention(self.attention_norm(x), rotation)
        return x, self.moe(self.moe_norm(x))


class LanguageModel(nn.Module):
    def __init__(self, options):
        super().__init__()
        drawn = iter(range(10**9))

        def normal(*sizes, deviation):
            generator = generator_of(options.seed, "parameter", next(drawn))
            value = torch.randn(sizes, generator=generator, dtype=torch.float32) * deviation
            return value.to(options.device, getattr(torch, options.dtype))

        self.head_size = options.hidden // options.heads
        self.embedding = nn.Parameter(normal(VOCABULARY, options.hidden, deviation=0.5))
        self.blocks = nn.ModuleList(Block(options, layer, normal) for layer in range(options.layers))
        self.norm = nn.LayerNorm(options.hidden, bias=False).to(self.embedding)
        self.head = nn.Parameter(normal(VOCABULARY, options.hidden, deviation=0.02))

    def forward(self, tokens):
        """Bytes [B, S] → logits [B, S, 256] and what each MoE layer returns."""
        x = F.embedding(tokens, self.embedding)
        steps = torch.arange(self.head_size // 2, dtype=x.dtype, device=x.device)
        positions = torch.arange(tokens.shape[1], dtype=x.dtype, device=x.device)
        angles = torch.outer(positions, 1e4 ** (steps * (-2 / self.head_size)))
        rotation = torch.polar(torch.ones_like(angles), angles)[:, None, None]  # [S, 1, 1, head size / 2]
        outputs = []
        for block in self.blocks:
            x, output = block(x, rotation)
            x = x + output.output
            outputs.append(output)
        return F.linear(self.norm(x), self.head), outputs


def summed_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@torch.no_grad()
def validate(model, data, world):
    """Nats per token of the held-out data."""
    total = torch.zeros((), dtype=torch.float64)
    for inputs, targets in data.validation_batches():
        total += summed_loss(model(inputs)[0], targets).cpu()
    world.all_reduce(total)
    return total.item() / (data.options.validation_sequences * data.options.sequence_length)


def learning_rate(step, options):
    if step <= options.warmup:
        return options.learning_rate * step / options.warmup
    done = min((step - options.warmup) / max(options.steps - options.warmup, 1), 1)
    return options.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def train_step(model, optimizer, data, step, options, world, due):
    """One step; what there is to say of it, and more of it where a line is `due`."""
    begin = time.perf_counter()
    inputs, targets = data.training_batch(step)
    data_seconds = time.perf_counter() - begin
    logits, outputs = model(inputs)
    loss = summed_loss(logits, targets) / (options.batch_size * options.sequence_length)
    balance_loss, z_loss = (sum(getattr(o, name) for o in outputs) for name in ("balance_loss", "z_loss"))
    # finish_gradients takes the mean over ranks; this rank's loss is its part of the batch's.
    (loss * world.size + balance_loss * options.balance_loss + z_loss * options.z_loss).backward()
    anabranch.finish_gradients(model)
    norms = gradient_norms(model, world) if due else {}
    norm = anabranch.clip_gradient_norm(model, options.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, options)
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach().double().cpu()
    world.all_reduce(loss)
    spent = {"tokens": options.batch_size * options.sequence_length, "data_seconds": data_seconds, "skipped": 0}
    spent["seconds"] = time.perf_counter() - begin
    loads = [output.expert_load.cpu().double() for output in outputs]
    imbalances = [anabranch.imbalance(load.long()) for load in loads]
    return spent, {
        "step": step,
        "loss": loss.item(),
        "imbalance": sum(imbalances) / len(imbalances),
        "imbalance_per_layer": imbalances,
        "ranks": world.size,
        "learning_rate": learning_rate(step, options),
        "gradient_norm": norm,
        "gradient_norms": norms,
        "balance_loss": balance_loss.item() / options.layers,
        "z_loss": z_loss.item() / options.layers,
        "load": [(load / load.sum()).tolist() for load in loads],
    }


def train(options, world):
    data = open_data(options, world)
    if data.vocabulary > VOCABULARY:
        raise SystemExit(f"--data has a vocabulary of {data.vocabulary}, the model one of {VOCABULARY}")
    model = LanguageModel(options)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    log = None
    if world.rank == 0:
        flops = flops_per_token(model, options.top_k, options.layers * options.hidden, options.sequence_length)
        log = MetricsLog(options.output, flops, peak_flops(options.device, getattr(torch, options.dtype)))
    begin = time.perf_counter()
    bar = tqdm(range(1, options.steps + 1), disable=world.rank != 0, unit="step")
    for step in bar:
        due = [step == options.steps or step % every == 0 for every in (options.log_interval, options.validation_interval)]
        spent, line = train_step(model, optimizer, data, step, options, world, any(due))
        if log:
            log.add(step, line["loss"], **spent)
        if due[1]:
            line["validation_loss"] = validate(model.eval(), data, world)
            if data.bytes_per_token:
                line["validation_bpb"] = line["validation_loss"] / data.bytes_per_token / math.log(2)
            model.train()
        if not any(due):
            continue
        memory = peak_memory(options.device, world)
        if log:
            line = log.write(line | {"seconds": time.perf_counter() - begin, "memory": memory})
            bar.set_postfix(loss=f"{line['loss']:.3f}", imbalance=f"{line['imbalance']:.2f}")
    if log:
        log.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token files, any other file, or synthetic:V")
    parser.add_argument("--glu", action="store_true", help="gated experts (SwiGLU) instead of GELU")
    for name, value in DEFAULTS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value, help=f"default: {value}")
    options = parser.parse_args()
    if options.device == "cuda":
        options.device = f"cuda:{(anabranch.discover_rank().local_rank or 0) % torch.cuda.device_count()}"
        torch.cuda.set_device(options.device)
    train(options, anabranch.as_group())


if __name__ == "__main__":
    main()
