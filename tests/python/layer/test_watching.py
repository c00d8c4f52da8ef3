"""What a layer tells about itself: counters, times, ranges in profiles, plots."""

import collections
import copy
import os
import subprocess
import sys

import anabranch
import pytest
import torch
from ranks import run_ranks

FORWARD = ["route", "plan", "dispatch", "permute", "up", "down", "unpermute", "combine", "losses", "shared_expert"]
BACKWARD = ["combine", "down", "up", "permute", "dispatch", "route"]
STAGES = {*FORWARD, *(f"{stage}.backward" for stage in BACKWARD)}


def make(device="cpu"):
    return anabranch.MoE(8, 12, 4, 2, shared_expert_hidden_size=4, seed=3, device=device)


def step(layer, device="cpu", tokens=50):
    out = layer(torch.randn(tokens, 8, device=device, requires_grad=True))
    (out.output.sum() + out.balance_loss).backward()
    return out


def test_stats(device):
    layer = make(device)
    before = layer.stats()
    assert before.forwards == 0 and before.expert_load is None and before.imbalance is None
    out = step(layer, device)
    stats = layer.stats()
    assert stats.forwards == 1 and stats.seconds == {} and stats.bytes_sent == 0
    assert stats.expert_load.tolist() == out.expert_load.tolist() and stats.expert_load.sum() == 100
    assert stats.imbalance == pytest.approx(out.expert_load.max().item() / 25)

    layer.reset_stats(timed=True)
    step(layer, device)
    stats = layer.stats()
    assert stats.forwards == 1 and STAGES == set(stats.seconds)
    assert all(0 <= seconds < 60 for seconds in stats.seconds.values()) and sum(stats.seconds.values()) > 0

    twin = copy.deepcopy(layer)
    step(twin, device)
    assert layer.stats().forwards == 1 and twin.stats().forwards == 1


def count_bytes(rank, size):
    layer = anabranch.MoE(8, 12, 2, 1, renormalize=False, seed=3)
    x = torch.randn(10, 8, requires_grad=True)
    ids = torch.full((10, 1), 1 - rank)  # every token leaves
    out = layer(x, routing=(ids, torch.ones(10, 1)))
    sent = layer.stats().bytes_sent
    layer.reset_stats()
    out.output.sum().backward()
    return sent, layer.stats().bytes_sent


def test_bytes_between_ranks():
    row = 8 * 4
    for forward, backward in run_ranks(2, count_bytes):
        # Rows to the experts and results back, and an index and a weight for each.
        assert 2 * 10 * row + 10 * 4 <= forward <= 2 * 10 * row + 10 * 8 + 400
        # Rows of dy, and of dx with the weights' gradients.
        assert 2 * 10 * row <= backward <= 2 * 10 * row + 10 * 4 + 100


def exchange_seconds(rank, size):
    found = {}
    for overlap in ("off", "2"):
        layer = anabranch.MoE(8, 12, 4, 2, seed=3, overlap=overlap)
        layer.reset_stats(timed=True)
        step(layer)
        found[overlap] = layer.stats()
    return [(stats.seconds, stats.exposed_exchange_seconds, stats.hidden_exchange_seconds) for stats in found.values()]


def test_exposed_and_hidden_exchange():
    for (in_turn, exposed_in_turn, hidden_in_turn), (beside, exposed, hidden) in run_ranks(2, exchange_seconds):
        assert exposed_in_turn == in_turn["exchange.exposed"] > 0 and exposed == beside["exchange.exposed"] > 0
        assert hidden_in_turn < in_turn["exchange"] and hidden > 0  # in turn: what the two clocks take
        assert exposed_in_turn < sum(in_turn[stage] for stage in in_turn if not stage.startswith("exchange"))


def test_ranges_in_profiles(device):
    layer = make(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(layer, device)
    names = {event.name for event in profile.events()}
    assert {f"anabranch.{stage}" for stage in STAGES} <= names


def operators_of(experts, tokens):
    """How often a forward without gradients calls each operator of LibTorch's."""
    layer, x = anabranch.MoE(8, 12, experts, 2, glu=True, seed=3).eval(), torch.randn(tokens, 8)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    return collections.Counter(event.name for event in profile.events() if event.name.startswith("aten::"))


@pytest.fixture
def one_thread():
    """Which alone a profiler watches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_experts_without_rows_cost_no_calls(one_thread):
    """As a model decodes: what the host is asked for grows with the experts that are reached, not with all."""
    few, many = operators_of(4, 1), operators_of(64, 1)
    assert few["aten::mm"] == many["aten::mm"] == 4 + 1  # two projections of two experts, and the router's
    assert (many - few).total() < 10  # 60 experts more; what differs is the process's, not the experts'
    assert operators_of(64, 0)["aten::mm"] <= 1


NVTX_STEP = """
import contextlib, sys, torch, anabranch
device, emit = sys.argv[1:]
layer = anabranch.MoE(8, 12, 4, 2, shared_expert_hidden_size=4, seed=3, device=device)
with torch.autograd.profiler.emit_nvtx() if emit == "emit" else contextlib.nullcontext():
    out = layer(torch.randn(50, 8, device=device, requires_grad=True))
    (out.output.sum() + out.balance_loss).backward()
"""


@pytest.mark.parametrize("emit", ["as it is", "emit"])
def test_ranges_of_nvidias_profilers(device, emit, tmp_path):
    recorder = os.environ.get("ANABRANCH_NVTX_RECORDER")
    if not recorder:
        pytest.skip("the library is built without CUDA")
    if emit == "emit" and device.type == "cpu":
        pytest.skip("emit_nvtx takes a GPU")
    record = tmp_path / "ranges"
    subprocess.run(
        [sys.executable, "-c", NVTX_STEP, str(device), emit],
        env={**os.environ, "NVTX_INJECTION64_PATH": recorder, "ANABRANCH_NVTX_RECORD": str(record)},
        check=True,
    )
    lines = record.read_text().splitlines()
    names = [line.removeprefix("push ").split(",")[0] for line in lines if line.startswith("push")]
    assert len(names) == lines.count("pop ")
    ours = collections.Counter(name.removeprefix("anabranch.") for name in names if name.startswith("anabranch."))
    assert ours.keys() == STAGES
    assert ours["dispatch"] == ours["combine.backward"] == 2  # where rows set out, and where they are waited for



def test_imbalance():
    assert anabranch.imbalance(torch.tensor([1, 3, 2, 2])) == 1.5
    with pytest.raises(ValueError, match="load of each expert"):
        anabranch.imbalance(torch.tensor([]))


def test_plot_load(tmp_path):
    model = torch.nn.ModuleDict({"first": make(), "second": make()})
    with pytest.raises(ValueError, match="no forward yet of first, second"):
        anabranch.plot_load(model)
    for layer in model.values():
        step(layer)
    axes = anabranch.plot_load(model)
    (image,) = axes.get_images()
    for values, layer in zip(image.get_array(), model.values()):
        load = layer.stats().expert_load
        torch.testing.assert_close(torch.tensor(values).double(), load / load.double().mean())
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0].startswith("first (imbalance ")
    axes.figure.savefig(tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 2000
    assert anabranch.plot_load(torch.tensor([1, 2, 3])) is not None


@pytest.mark.parametrize("source, error", [(3, TypeError), ({}, TypeError), (torch.zeros(2, 2), ValueError), (torch.nn.Linear(1, 1), ValueError)])
def test_plot_load_of_what_has_none(source, error):
    with pytest.raises(error, match="plot_load"):
        anabranch.plot_load(source)


def test_info():
    result = subprocess.run([sys.executable, "-m", "anabranch.info"], capture_output=True, text=True, check=True)
    shown = result.stdout
    assert "Warning" not in result.stderr, result.stderr
    assert f"anabranch {anabranch.__version__}" in shown and f"torch {torch.__version__}" in shown
    assert "engines on cpu: auto, cpu" in shown
    assert "transports: self, process_group (gloo, nccl), store" in shown
    (named,) = [line for line in shown.splitlines() if line.startswith("transports: ")]
    for name in ("MPI", "NCCL"):
        assert named.endswith((name.lower(), f"{name.lower()}, nccl")) == (f"{name}: not built" not in shown), named
