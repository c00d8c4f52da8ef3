#!/usr/bin/env python3
"""Trains a Mixture-of-Experts language model: the Python twin of examples/train_lm.

Alone, or data parallel with the experts spread over the ranks:

    anabranch train -n 2 --data FILE      # of the installed package; without -n on one rank
    python examples/train_lm.py --data FILE
    torchrun --nproc-per-node 2 examples/train_lm.py --data FILE --fsdp
    mpirun -n 2 python examples/train_lm.py --data FILE
    torchrun --nproc-per-node 8 examples/train_lm.py --preset olmoe-1b-7b --data TOKENS --device cuda --compile inductor

The same options give the model, batches and metrics.jsonl of the C++ program, up to rounding; launch/plot.py DIR draws
them. DIR also holds TensorBoard's files. (Checkpoints and a sample of text: the C++ program.)
"""

import argparse
import json
import math
import os
import sys
import time

import anabranch
import torch
import torch.nn.functional as F
from lm_data import open_data, seed_of
from lm_metrics import MetricsLog, OwnWork, flops_per_token, gradient_norms, peak_flops, peak_memory
from lm_model import DEFAULTS as MODEL
from lm_model import PRESETS, LanguageModel, attention_width
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

DEFAULTS = MODEL | dict(  # those of `train_lm --help`, which says what they are
    output="output", device="cpu", steps=1600, batch_size=16, micro_batch=0, sequence_length=128, seed=1,
    learning_rate=3e-3, warmup=60, weight_decay=0.1, clip=1.0, balance_loss=0.01, z_loss=0.001, sequence_balance_loss=0.0,
    global_balance_loss=0.0, importance_loss=0.0, load_loss=0.0, jitter=0.0, forced_routing="none", cross_node_limit=0.0,
    balance="off", receive_rows_limit=0, log_interval=10, validation_interval=100,
    validation_sequences=128,
)  # fmt: skip
ALWAYS = ("balance_loss", "z_loss")
LOSSES = (*ALWAYS, "importance_loss", "load_loss", "sequence_balance_loss", "global_balance_loss")


def summed_loss(logits, targets):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(), reduction="sum")


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


class AdamW:
    """torch's, on fp32 masters of parameters of 16 bits; the others are their own."""

    def __init__(self, model, options):
        self.parameters = list(model.parameters())
        narrow = [p.dtype.itemsize < 4 for p in self.parameters]
        self.masters = [p.detach().float() if is_narrow else p for p, is_narrow in zip(self.parameters, narrow)]
        self.pairs = [(p, master) for p, master in zip(self.parameters, self.masters) if p is not master]
        matrices, vectors = ([p for p in self.masters if (p.dim() > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused="cuda" in options.device)

    @torch.no_grad()
    def step(self, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for parameter, master in self.pairs:
            master.grad = parameter.grad.float()
        self.optimizer.step()
        for parameter, master in self.pairs:
            parameter.copy_(master)
            master.grad = None
        for parameter in self.parameters:
            parameter.grad = None


def backward(model, data, step, options, world, own):
    """Leaves the gradients of the batch's mean loss; returns that of this rank's share, its parts of the auxiliary
    losses, the load [layers, experts], and the time until the batch was there."""
    begin = time.perf_counter()
    inputs, targets = data.training_batch(step)
    data_seconds = time.perf_counter() - begin
    most = -(-options.batch_size // world.size)  # sequences of the rank that has most
    size = options.micro_batch or most
    pieces = -(-most // size)  # on every rank, also where its share of one is empty
    totals = torch.zeros(3, dtype=torch.float64, device=options.device)
    loads = 0
    seed = seed_of(seed_of(options.seed, "routing", step), "routing", world.rank)
    for piece, first in enumerate(range(0, pieces * size, size)):
        model.routing_seed = seed_of(seed, "routing", piece)
        logits, outputs = model(inputs[first : first + size])
        with own.work(len(logits)):
            loss = summed_loss(logits, targets[first : first + size]) / (options.batch_size * options.sequence_length)
        wanted = {name: getattr(options, name) for name in LOSSES}
        losses = {name: sum(getattr(o, name) for o in outputs) / pieces for name in wanted if name in ALWAYS or wanted[name]}
        balance, z_loss = (losses[name] for name in ALWAYS)
        # finish_gradients takes the mean over ranks; this rank's loss is its part of the batch's.
        (loss * world.size + sum(wanted[name] * of_routers for name, of_routers in losses.items())).backward()
        totals += torch.stack([loss, balance / len(outputs), z_loss / len(outputs)]).detach()
        loads = loads + torch.stack([output.expert_load for output in outputs])
    return totals, loads, data_seconds


def train_step(model, optimizer, data, step, options, world, due, own):
    """One step; what there is to say of it, and more of it where a line is `due`."""
    begin = time.perf_counter()
    totals, loads, data_seconds = backward(model, data, step, options, world, own)
    anabranch.finish_gradients(model)
    norms = gradient_norms(model, world) if due else {}
    norm = anabranch.clip_gradient_norm(model, options.clip)
    optimizer.step(learning_rate(step, options))
    loss, balance_loss, z_loss = totals.cpu()
    world.all_reduce(loss)
    spent = {"tokens": options.batch_size * options.sequence_length, "data_seconds": data_seconds, "skipped": 0}
    spent["seconds"] = time.perf_counter() - begin
    loads = loads.cpu()
    imbalances = [anabranch.imbalance(load) for load in loads]
    return spent, {
        "step": step,
        "loss": loss.item(),
        "imbalance": sum(imbalances) / len(imbalances),
        "imbalance_per_layer": imbalances,
        "ranks": world.size,
        "learning_rate": learning_rate(step, options),
        "gradient_norm": norm,
        "gradient_norms": norms,
        "balance_loss": balance_loss.item(),
        "z_loss": z_loss.item(),
        "load": [(load.double() / load.sum()).tolist() for load in loads],
    }


def prepared(options, world):
    """The model, its dense part compiled and sharded as the options say."""
    model = LanguageModel(options)
    if options.bias_rate:
        anabranch.set_expert_bias_rate(model, options.bias_rate)
    if options.compile != "none":
        for block in model.blocks:
            block.attend = torch.compile(block.attend, backend=options.compile)
    if options.fsdp:
        whole = {parameter for _, parameter in anabranch.expert_parameters(model)}
        # FSDP takes parameters of one type together: routers are of fp32, and small.
        whole |= {parameter for parameter in model.parameters() if parameter.dtype != getattr(torch, options.dtype)}
        mesh = init_device_mesh(torch.device(options.device).type, (world.size,))
        precision = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(getattr(torch, options.dtype), torch.float32))
        for module in [*model.blocks, model]:
            fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=whole)
    return model


def train(options, world):
    data = open_data(options, world)
    if data.vocabulary > options.vocabulary:
        raise SystemExit(f"--data has a vocabulary of {data.vocabulary}, the model one of {options.vocabulary}")
    model = prepared(options, world)
    width = options.layers * attention_width(options)
    flops = flops_per_token(model, options.top_k, width, options.sequence_length)
    optimizer, own, log = AdamW(model, options), OwnWork(options.device), None
    if world.rank == 0:
        log = MetricsLog(options.output, flops, peak_flops(options.device, getattr(torch, options.dtype)))
    begin = time.perf_counter()
    bar = tqdm(range(1, options.steps + 1), disable=world.rank != 0, unit="step")
    for step in bar:
        due = [step == options.steps or step % every == 0 for every in (options.log_interval, options.validation_interval)]
        spent, line = train_step(model, optimizer, data, step, options, world, any(due), own)
        if log:
            log.add(step, line["loss"], **spent)
        if due[1]:
            line["validation_loss"] = validate(model.eval(), data, world)
            if data.bytes_per_token:
                line["validation_bpb"] = line["validation_loss"] / data.bytes_per_token / math.log(2)
            model.train()
        if not any(due):
            continue
        line |= {"memory": peak_memory(options.device, world), "rank_milliseconds": own.milliseconds(world)}
        if log:
            line = log.write(line | {"seconds": time.perf_counter() - begin})
            bar.set_postfix(loss=f"{line['loss']:.3f}", imbalance=f"{line['imbalance']:.2f}")
    if log:
        log.close()
        if options.json:
            print(json.dumps(line))


def options_of(arguments):
    name = os.environ.get("ANABRANCH_PROGRAM")  # of this program, where another starts it
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token files, any other file, or synthetic:V")
    parser.add_argument("--preset", choices=PRESETS, help="a published model; other options change it")
    parser.add_argument("--compile", default="none", metavar="BACKEND", help="torch.compile of the dense part: inductor")
    parser.add_argument("--json", action="store_true", help="print the last line of metrics.jsonl")
    parser.add_argument("--fsdp", action="store_true", help="FSDP2 of all but the experts, under torchrun")
    for name, value in DEFAULTS.items():
        kind = {"action": "store_true"} if value is False else {"type": type(value), "help": f"default: {value}"}
        parser.add_argument("--" + name.replace("_", "-"), default=value, **kind)
    preset = parser.parse_known_args(arguments)[0].preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    options = parser.parse_args(arguments)
    if options.gate != "noisy_top_k" and (options.importance_loss or options.load_loss):
        parser.error("--importance-loss and --load-loss are of --gate noisy_top_k")
    return options


def main():
    options = options_of(sys.argv[1:])
    if options.device == "cuda":
        options.device = f"cuda:{(anabranch.discover_rank().local_rank or 0) % torch.cuda.device_count()}"
        torch.cuda.set_device(options.device)
    if options.fsdp:
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in options.device else "gloo")
    train(options, anabranch.as_group())
    if options.fsdp:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
