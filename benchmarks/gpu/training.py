#!/usr/bin/env python3
"""A language model trained by examples/train_lm, by its twin in Python and by transformers, one after the other on this
GPU: tokens/s of whole steps, optimizer included.

    PYTHONPATH=build/release/python benchmarks/gpu/training.py --program build/release/examples/train_lm

Four layers of Qwen3-30B-A3B, random tokens, the same number a step. transformers has its experts by torch._grouped_mm,
attention by SDPA, torch's fused AdamW and parameters of bf16 alone: less work than train_lm's fp32 masters and main
gradients are. Of the micro-batches that divide a step it takes the largest that fit into memory. The twin, whose logits are
there all at once, takes a quarter of a step at a time; its dense part is compiled.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from layer import provenance

GIB = 1 << 30
TWIN = [sys.executable, str(Path(__file__).resolve().parents[2] / "examples/train_lm.py")]


@dataclasses.dataclass
class Shape:
    layers: int = 4
    vocabulary: int = 32000
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 4
    head_size: int = 128
    experts: int = 128
    top_k: int = 8
    expert_hidden: int = 768
    batch_size: int = 32
    sequence_length: int = 4096

    @property
    def tokens(self):
        return self.batch_size * self.sequence_length

    @property
    def flops_per_token(self):
        """As docs/training.md counts them."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        experts = self.hidden * (self.experts + self.top_k * 3 * self.expert_hidden)
        weights = self.layers * (attention + experts) + self.hidden * self.vocabulary
        return 6 * (weights + self.layers * self.heads * self.head_size * self.sequence_length)


SMALL = Shape(2, 40, 32, 4, 2, 16, 8, 2, 16, 4, 16)


def by_train_lm(shape, program, further, device, rounds, steps):
    """The rates of `rounds` times `steps` steps, behind as many that are not counted. `program`: words of a command."""
    with tempfile.TemporaryDirectory() as output:
        options = {name.replace("_", "-"): value for name, value in dataclasses.asdict(shape).items()}
        options |= {"data": f"synthetic:{shape.vocabulary}", "device": device, "output": output, "log-interval": steps}
        options |= {"steps": steps * (rounds + 1), "validation-interval": 10**9, "validation-sequences": 1} | further
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        subprocess.run([*program, "--preset", "qwen3-30b-a3b", *words], check=True)
        lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()][1:]
    counted = lines[0]["model_tflops"] * 1e12 / lines[0]["tokens_per_second"]
    if abs(counted / shape.flops_per_token - 1) > 1e-6:
        raise RuntimeError(f"train_lm counts {counted:.6g} FLOPs a token, this benchmark {shape.flops_per_token:.6g}")
    peak = max(line["memory"] for line in lines)
    found = {"rates": [line["tokens_per_second"] for line in lines], "peak_GiB": peak / GIB, "loss": lines[-1]["loss"]}
    return found | ({"micro_batch": further["micro-batch"]} if "micro-batch" in further else {})


def make_model(shape, device):
    config = transformers.Qwen3MoeConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_size,
        num_experts=shape.experts, num_experts_per_tok=shape.top_k, moe_intermediate_size=shape.expert_hidden,
        norm_topk_prob=True, rope_theta=1e6, tie_word_embeddings=False, use_cache=False,
        max_position_embeddings=shape.sequence_length,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if model.config._experts_implementation != "grouped_mm":
        raise RuntimeError(f"transformers runs the experts by {model.config._experts_implementation}")
    return model.train()


class ByTransformers:
    def __init__(self, shape, device, micro_batch):
        self.shape, self.device, self.micro_batch = shape, device, micro_batch
        self.model = make_model(shape, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(self):
        tokens = torch.randint(self.shape.vocabulary, (self.shape.batch_size, self.shape.sequence_length), device=self.device)
        loss = torch.zeros((), device=self.device)
        pieces = tokens.split(self.micro_batch)
        for piece in pieces:
            part = self.model(input_ids=piece, labels=piece).loss / len(pieces)
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def rates(self, rounds, steps):
        found = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for _ in range(steps):
                loss = self.step()
            loss = loss.item()
            found.append(self.shape.tokens * steps / (time.perf_counter() - start))
        return found[1:], loss


def by_transformers(shape, device, rounds, steps):
    micro_batch = shape.batch_size
    while True:
        way = None
        try:
            way = ByTransformers(shape, device, micro_batch)
            way.step()
        except torch.OutOfMemoryError:
            if micro_batch == 1:
                raise
            micro_batch //= 2
            del way
            torch.cuda.empty_cache()
            continue
        rates, loss = way.rates(rounds, steps)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        return {"rates": rates, "peak_GiB": peak / GIB, "loss": loss, "micro_batch": micro_batch}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", required=True, help="train_lm")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--rounds", type=int, default=6, help="that are counted, of each: in the first ones engines may still be measured")
    parser.add_argument("--steps", type=int, default=4, help="of a round")
    parser.add_argument("--quick", action="store_true", help="a small model, to see whether it runs")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--commit", default="unknown", help="of the measured sources")
    arguments = parser.parse_args()
    shape = SMALL if arguments.quick else Shape()
    measured = arguments.device, arguments.rounds, arguments.steps
    compiled = {"compile": "inductor"} if arguments.device == "cuda" else {}
    ways = {
        # Each in a process of its own or gone before the next, so that it has the GPU to itself.
        "train_lm": by_train_lm(shape, [arguments.program, "--no-save"], {"sample-length": 0}, *measured),
        "train_lm.py": by_train_lm(shape, TWIN, {"micro-batch": shape.batch_size // 4} | compiled, *measured),
        "transformers": by_transformers(shape, *measured),
    }
    results = []
    for name, way in ways.items():
        rate = statistics.median(way["rates"])
        results.append({**dataclasses.asdict(shape), "way": name, "tokens_per_second": rate, **way})
        results[-1]["model_TFLOP_per_s"] = rate * shape.flops_per_token / 1e12
        print(f"{name}: {rate:,.0f} tokens/s, {results[-1]['model_TFLOP_per_s']:.0f} model TFLOP/s, {way['peak_GiB']:.1f} GiB")
    ratio = results[0]["tokens_per_second"] / results[-1]["tokens_per_second"]
    print(f"train_lm is {ratio:.2f} times as fast as transformers {transformers.__version__}")
    if arguments.json:
        about = provenance(arguments.commit) | {"transformers": transformers.__version__}
        Path(arguments.json).write_text(json.dumps({"provenance": about, "ratio": ratio, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
