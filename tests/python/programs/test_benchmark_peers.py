"""What the benchmark of the layer on a GPU is compared with computes the same layer."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import anabranch
import pytest
import torch
from jobs import ALONE, TORCHRUN, run_job

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks/gpu"))
from peers import PEERS, Missing

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@dataclasses.dataclass
class Case:
    tokens: int = 96
    hidden: int = 32
    inner: int = 16
    experts: int = 8
    top_k: int = 3
    glu: bool = True


def by_hand(case, x, gate, up, down):
    """fp64, a token after the other; and how clear its choice of experts is."""
    y, clear = torch.zeros_like(x, dtype=torch.float64), []
    for t, row in enumerate(x.double()):
        score = torch.softmax(gate.double() @ row, dim=0)
        best = score.sort(descending=True)
        clear.append((best.values[case.top_k - 1] - best.values[case.top_k]) / best.values[case.top_k - 1])
        for e in best.indices[: case.top_k]:
            hidden = up[e].double() @ row
            if case.glu:
                hidden = torch.nn.functional.silu(hidden[: case.inner]) * hidden[case.inner :]
            else:
                hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
            y[t] += score[e] / best.values[: case.top_k].sum() * (down[e].double() @ hidden)
    return y, torch.stack(clear)


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("name", PEERS)
def test_equals_the_layer_by_hand(name, glu):
    case, device = Case(glu=glu), "cuda" if name in ("liger", "sonic") else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"{name} runs on GPUs alone")
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    x = draw(case.tokens, case.hidden) * case.hidden**0.5
    gate = draw(case.experts, case.hidden)
    up = draw(case.experts, case.inner * (2 if glu else 1), case.hidden)
    down = draw(case.experts, case.hidden, case.inner)
    try:
        forward, parameters = PEERS[name](case, *(tensor.to(device) for tensor in (gate, up, down)))
    except Missing as reason:
        if not glu and "gated" in str(reason):
            return
        pytest.skip(str(reason))
    given = x.to(device).requires_grad_()
    y = forward(given)
    expected, clear = by_hand(case, x, gate, up, down)
    # Logits in bf16 are 2^-8 of some units apart from exact ones: choices closer than that may differ.
    sure = clear > 0.1
    assert sure.sum() > case.tokens // 4
    error = (y.detach().cpu().double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error[sure].max() < 0.05  # a few roundings to bf16, of weights, hidden rows and sums
    y.sum().backward()
    assert given.grad.abs().sum() > 0 and all(p.grad is not None for p in parameters)


def test_expert_parallel_ways_agree_and_are_timed(tmp_path):
    """benchmarks/ranks/expert_parallel.py refuses to time a way whose output is another; all of them are here."""
    options = ["--device", "cpu", "--quick", "--json", str(tmp_path / "out.json"), "--layers", "anabranch", "anabranch,routing_scale=2"]
    command = [*TORCHRUN, BENCHMARKS / "ranks/expert_parallel.py", *options]
    assert "the output of anabranch,routing_scale=2 is" in run_job(*command, expect=1)
    run_job(*command[:-2], "anabranch", "anabranch,recompute=true,overlap=2")
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["way"] for row in results] == ["anabranch", "anabranch,recompute=true,overlap=2", "alone", "torch", "exchange"]
    assert all(row["ranks"] == 2 and row["forward_ms"] > 0 and row["backward_ms"] > 0 for row in results)
    for row in results[:-1]:
        step = row["forward_ms"] + row["backward_ms"]
        assert row["TFLOP_per_s"] == pytest.approx(3 * 2 * 64 * 3 * 32 * 16 * 2 / step / 1e9)


def test_training_beside_transformers_is_measured(tmp_path):
    """benchmarks/gpu/training.py refuses to compare models of another size, and writes what it says."""
    program = Path(anabranch.__file__).parents[2] / "examples/train_lm"
    if not program.exists():
        pytest.skip("a build without train_lm")
    file = tmp_path / "out.json"
    options = ["--program", program, "--device", "cpu", "--quick", "--rounds", "1", "--steps", "1", "--json", file]
    run_job(*ALONE, BENCHMARKS / "gpu/training.py", *options)
    measured = json.loads(file.read_text())
    ours, twin, theirs = measured["results"]
    assert [row["way"] for row in measured["results"]] == ["train_lm", "train_lm.py", "transformers"]
    assert measured["ratio"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"])
    for row in (ours, twin, theirs):
        # Random tokens of a vocabulary of 40, at the start: nobody knows more.
        assert row["loss"] == pytest.approx(math.log(40), rel=0.1)
    assert f"**{measured['ratio']:.2f} times**" in report_of(tmp_path, "gpu_training", measured)


def report_of(folder, name, measured):
    """What docs/performance.md would say of it."""
    if name.startswith("gpu"):
        measured["provenance"]["gpu"] = "a GPU"
    (folder / f"{name}.json").write_text(json.dumps(measured))
    command = [sys.executable, BENCHMARKS / "report.py", "--results", folder, "--output", folder / "report.md"]
    subprocess.run(command, check=True)
    return (folder / "report.md").read_text()


def runs_of_train_lm(script, file, *options):
    """What a benchmark of two steps of train_lm leaves in `file`."""
    program = Path(anabranch.__file__).parents[2] / "examples/train_lm"
    if not program.exists():
        pytest.skip("a build without train_lm")
    words = ["--program", program, "--data", BENCHMARKS.parent / "README.md", "--steps", "2", "--json", file, *options]
    subprocess.run([sys.executable, BENCHMARKS / script, *words], check=True, timeout=120)
    return json.loads(file.read_text())


def test_learning_curves_are_compared(tmp_path):
    ways = "fp32|bf16|bf16, resumed|bf16, Muon"
    measured = runs_of_train_lm("gpu/learning_curves.py", tmp_path / "out.json", "--device", "cpu", "--ways", ways)
    fp32, bf16, *_, muon = measured["results"]
    assert measured["resumed_is_the_same"] and fp32["validation_difference"] == 0
    assert 0 < abs(bf16["validation_difference"]) < 2**-8
    assert muon["validation_loss"] != bf16["validation_loss"]
    assert "has the very same curve" in report_of(tmp_path, "cpu_learning_curves", measured)


def test_gates_are_compared(tmp_path):
    options = ["--gates", "noisy_top_k|sigmoid, biases", "--picture", tmp_path / "out.png", "--batch-size", 2]
    measured = runs_of_train_lm("cpu/gates.py", tmp_path / "out.json", *map(str, options))
    noisy, biases = measured["results"]
    assert noisy["validation_loss"] != biases["validation_loss"]
    for result in (noisy, biases):
        assert len(result["load"]) == 2 and all(sum(loads) == pytest.approx(8) for loads in result["load"])
    assert (tmp_path / "out.png").stat().st_size
    assert "| noisy_top_k |" in report_of(tmp_path, "cpu_gates", measured)
