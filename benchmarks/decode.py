#!/usr/bin/env python3
"""One MoE block of a converted model beside the same block in transformers, at as few tokens as a model decodes: in eval
mode without gradients. Prints microseconds a call, medians of rounds in turn, and transformers' over ours.

    PYTHONPATH=build/release/python benchmarks/decode.py [--hidden 2048] [--inner 1024] [--experts 64] [--top-k 8]
        [--device cuda] [--dtype bfloat16] [--json FILE --commit NAME]

With small sizes (--hidden 64 --inner 32) little is arithmetic: what remains is the host's time for a call.
"""

import argparse
import copy
import json
import os
import pathlib
import statistics
import sys
import time

import torch
import transformers

import anabranch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import train_runs  # noqa: E402

TOKENS = (1, 2, 4, 8, 16, 32, 64)
TRANSFORMERS = ("eager", "batched_mm", "grouped_mm")
"""Its ways to run experts."""
MOST_COPIED = 4 << 30
"""Bytes: batched_mm, which copies the weights of every assignment, is left out where that takes more."""


def blocks_of(arguments):
    """By name: ours, and the same in transformers."""
    config = transformers.OlmoeConfig(
        vocab_size=8, hidden_size=arguments.hidden, intermediate_size=arguments.inner, num_hidden_layers=1,
        num_attention_heads=1, num_experts=arguments.experts, num_experts_per_tok=arguments.top_k, norm_topk_prob=True,
    )  # fmt: skip
    model = transformers.OlmoeForCausalLM(config).to(arguments.device, getattr(torch, arguments.dtype)).eval()
    blocks = {}
    for way in TRANSFORMERS:
        other = copy.deepcopy(model)
        other.set_experts_implementation(way)
        blocks[way] = other.model.layers[0].mlp
    return {"anabranch": anabranch.convert(model).model.layers[0].mlp, **blocks}


def ways_at(tokens, blocks, arguments):
    """Those of `blocks` that are measured with so many tokens."""
    weights = 3 * arguments.hidden * arguments.inner * getattr(torch, arguments.dtype).itemsize
    copied = tokens * arguments.top_k * weights
    return {name: block for name, block in blocks.items() if name != "batched_mm" or copied <= MOST_COPIED}


def check(blocks, x):
    """All compute the same, within the rounding of sums in the type."""
    expected = blocks["anabranch"](x).float()
    error = torch.finfo(x.dtype).eps * x.shape[-1] ** 0.5 * 8 * expected.abs().max()
    for name, block in blocks.items():
        assert (block(x).float() - expected).abs().max() <= error, name


def wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(blocks, x, rounds, calls):
    """Microseconds a call, by block; on a GPU of calls one behind another, until the last has ended."""
    times = {name: [] for name in blocks}
    for _ in range(rounds):
        for name, block in blocks.items():
            wait_for(x.device)
            begin = time.perf_counter()
            for _ in range(calls):
                block(x)
            wait_for(x.device)
            times[name].append((time.perf_counter() - begin) / calls * 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


def provenance(commit, device):
    own = {
        "threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 1),
    }
    if device == "cuda":
        own["device"] = torch.cuda.get_device_name()
    return {**train_runs.provenance(commit), **own}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 2048),
        ("inner", 1024),
        ("experts", 64),
        ("top-k", 8),
        ("rounds", 15),
        ("calls", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=pathlib.Path, help="file for the results")
    parser.add_argument("--commit", default="unknown", help="of the measured sources")
    arguments = parser.parse_args()
    blocks = blocks_of(arguments)
    about, results = provenance(arguments.commit, arguments.device), []
    where = about.get("device", f"{about['threads']} threads")
    print(f"{where}, {arguments.dtype}; us a call, and transformers' over ours")
    print(f"{'tokens':>6}" + "".join(f"{name:>20}" for name in blocks))
    with torch.no_grad():
        for tokens in arguments.tokens:
            x = torch.randn(1, tokens, arguments.hidden).to(arguments.device, getattr(torch, arguments.dtype))
            ways = ways_at(tokens, blocks, arguments)
            check(ways, x)
            found = medians(ways, x, arguments.rounds, arguments.calls)
            results.append({"tokens": tokens, **{name: round(each, 1) for name, each in found.items()}})
            ours = found["anabranch"]
            ratios = "".join(
                f"{found[name]:12.0f} ({found[name] / ours:5.2f})" if name in found else f"{'-':>20}"
                for name in TRANSFORMERS
            )
            print(f"{tokens:6}{ours:20.0f}{ratios}", flush=True)
    if arguments.json:
        sizes = {name: getattr(arguments, name) for name in ("hidden", "inner", "experts", "top_k", "dtype")}
        arguments.json.write_text(json.dumps({"provenance": about, **sizes, "microseconds": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
