"""What the Python examples say of a run: the lines of examples/train_lm/metrics/metrics.cpp, and TensorBoard's files."""

import contextlib
import json
import math
import resource
import time
from collections import deque
from pathlib import Path

import anabranch
import torch
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter

PARTS = ("embedding", "attention", "experts", "router", "norms", "head", "other")
# Dense TFLOP/s in bf16, from NVIDIA's data sheets, by a part of CUDA's name; tf32 has half of it.
DATA_SHEETS = {"B200": 2250, "H200 NVL": 835, "H200": 989.4, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989.4, "A100": 312}


def part_of(name, is_expert):
    words = [("expert", "experts"), ("router", "router"), ("norm", "norms"), ("attention", "attention")]
    words += [("embedding", "embedding"), ("head", "head")]
    return "experts" if is_expert else next((part for word, part in words if word in name), "other")


def experts_of(model):
    """The ids of parameters that hold a rank's own experts."""
    return {id(parameter) for _, parameter in anabranch.expert_parameters(model)}


def flops_per_token(model, top_k, attention_width, sequence_length):
    """As metrics_cost.h says; `attention_width`: heads times head size, summed over layers."""
    experts, weights = experts_of(model), 0
    for name, parameter in model.named_parameters():
        if id(parameter) in experts:
            weights += parameter[0].numel() * top_k if parameter.dim() == 3 else 0
        elif parameter.dim() == 2 and name != "embedding":
            weights += parameter.numel()
    return 6 * (weights + attention_width * sequence_length)


def peak_flops(device, dtype):
    if torch.device(device).type != "cuda" or dtype == torch.float64:
        return None
    name = torch.cuda.get_device_name(device)
    tera = next((tera for part, tera in DATA_SHEETS.items() if part in name), None)
    return tera and tera * 1e12 / (2 if dtype == torch.float32 else 1)


def peak_memory(device, world):
    """Bytes that tensors on the GPU have taken, on the CPU the process: of the rank that took most. Collective."""
    peaks = torch.zeros(world.size, dtype=torch.int64)
    if torch.device(device).type == "cuda":
        peaks[world.rank] = torch.cuda.max_memory_allocated(device)
    else:
        peaks[world.rank] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    world.all_reduce(peaks)
    return peaks.max().item()


class OwnWork:
    """How long this rank takes for what waits for no other, its loss: a slow one takes longer than the others."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.clear()

    def clear(self):
        self.spans, self.sequences = [], 0

    def now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def work(self, sequences):
        begin = self.now()
        yield
        self.spans.append((begin, self.now()))
        self.sequences += sequences

    def milliseconds(self, world):
        """Of each rank, of a sequence since the last call; None where it had none. Collective."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            spent = sum(begin.elapsed_time(end) for begin, end in self.spans)
        else:
            spent = sum(end - begin for begin, end in self.spans) * 1e3
        of_ranks = torch.zeros(world.size, dtype=torch.float64)
        of_ranks[world.rank] = spent / self.sequences if self.sequences else math.nan
        world.all_reduce(of_ranks)
        self.clear()
        return [value if math.isfinite(value) else None for value in of_ranks.tolist()]


@torch.no_grad()
def gradient_norms(model, world):
    """L2 norm of each part's finished gradient. Collective."""
    experts = experts_of(model)
    squares = torch.zeros(2, len(PARTS), dtype=torch.float64)
    there = set()
    for name, parameter in model.named_parameters():
        is_expert = id(parameter) in experts
        part = PARTS.index(part_of(name, is_expert))
        there.add(part)
        if parameter.grad is not None:
            gradient = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            squares[int(is_expert), part] += gradient.double().square().sum().cpu()
    world.all_reduce(squares[1])
    norms = squares.sum(0).sqrt().tolist()
    return {PARTS[part]: norms[part] for part in sorted(there)}


class SpikeDetector:
    """A loss above the mean of the last 64 by more than 6 of their standard deviations, or not finite."""

    def __init__(self, window=64, deviations=6):
        self.losses, self.deviations = deque(maxlen=window), deviations

    def add(self, loss):
        if not math.isfinite(loss):
            return True
        bound = math.inf
        if len(self.losses) == self.losses.maxlen:
            deviation, mean = torch.std_mean(torch.tensor(list(self.losses), dtype=torch.float64))
            bound = mean.item() + self.deviations * deviation.item()
        self.losses.append(min(loss, bound))
        return loss > bound


class MetricsLog:
    """Every step is added, some are written: to metrics.jsonl and TensorBoard. Of rank 0 alone."""

    def __init__(self, folder, flops, peak):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file, self.board = open(Path(folder) / "metrics.jsonl", "w"), SummaryWriter(folder)
        self.flops, self.peak, self.spikes = flops, peak, SpikeDetector()
        self.clear()

    def clear(self):
        self.interval = {"steps": 0, "tokens": 0, "skipped": 0, "seconds": 0.0, "data_seconds": 0.0, "spikes": []}

    def add(self, step, loss, **more):
        self.interval["steps"] += 1
        for name, value in more.items():
            self.interval[name] += value
        if self.spikes.add(loss):
            self.interval["spikes"].append(step)

    def write(self, line):
        """`line`: what metrics.jsonl holds, but for what concerns all steps since the line before."""
        since = self.interval
        speed = since["tokens"] / since["seconds"]
        line |= {
            "tokens_per_second": speed,
            "model_tflops": speed * self.flops / line["ranks"] / 1e12,
            "step_seconds": since["seconds"] / since["steps"],
            "data_seconds": since["data_seconds"] / since["steps"],
            "skipped": since["skipped"],
            "spikes": since["spikes"],
        }
        if self.peak:
            line["mfu"] = line["model_tflops"] * 1e12 / self.peak
        self.file.write(json.dumps(line, sort_keys=True, separators=(",", ":")) + "\n")
        self.file.flush()
        for name, value in line.items():
            if isinstance(value, (int, float)) and name not in ("step", "ranks"):
                self.board.add_scalar(name, value, line["step"])
        for part, norm in line["gradient_norms"].items():
            self.board.add_scalar(f"gradient_norms/{part}", norm, line["step"])
        for layer, imbalance in enumerate(line["imbalance_per_layer"]):
            self.board.add_scalar(f"imbalance_per_layer/{layer}", imbalance, line["step"])
        self.clear()
        return line

    def close(self):
        self.file.close()
        self.board.close()
