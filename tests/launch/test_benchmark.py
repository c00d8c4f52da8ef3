"""launch/benchmark.sh: what it measures where, what it keeps, and what it refuses. The programs are
stand-ins that hand out the published results; a few cases of the real ones run as well.

ANABRANCH_STEP names the built benchmark_step, which has the others beside it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, executable

RANKS_NAMES = ["gpu_exchange", "gpu_expert_parallel"]  # once for each number of GPUs
GPU_NAMES = ["gpu_layer", "gpu_layer_python", "gpu_grouped_gemm", "gpu_kernels"]
CPU_NAMES = ["cpu_layer", "cpu_grouped_gemm"]
PROGRAMS = Path(os.environ.get("ANABRANCH_STEP", ROOT / "build/release/benchmarks/benchmark_step")).parent
TRAIN_LM = PROGRAMS.parent / "examples/train_lm"
needs_programs = pytest.mark.skipif(not (PROGRAMS / "benchmark_cpu_layer").exists(), reason="no benchmarks are built")


def in_python():
    """Results of benchmarks/gpu/layer.py: a layer of many tokens and of few, and a peer that is not there."""
    about = {"shape": "OLMoE", "zipf": 1.0, "imbalance": 7.25}
    numbers = {"issue_ms": 0.3, "busy_ms": 0.4, "launches": 29, "graph_ms": 0.45, "TFLOP_per_s": 77.0, "peak_GiB": 0.125}
    provenance = {"gpu": "H200", "cuda_runtime": "13.0", "cublas": "13.1", "torch": "2.11", "commit": "0123abcd"}
    return {
        "provenance": {**provenance, "date": "2026-11-29"},
        "results": [
            {**about, "tokens": 4096, "way": "anabranch", "ms": 0.5, **numbers},
            {**about, "tokens": 4096, "way": "grouped_mm", "ms": 1.25, **numbers, "graph_ms": None},
            {**about, "tokens": 4096, "way": "sonic", "reason": "package sonicmoe is not installed"},
        ],
    }


def over_ranks():
    """Results of benchmarks/ranks/expert_parallel.py."""
    about = {"shape": "OLMoE", "tokens": 8192, "zipf": 0.0, "ranks": 2, "forward_ms": 1.0, "backward_ms": 3.0}
    rates = {"forward_TFLOP_per_s": 700.0, "backward_TFLOP_per_s": 466.6}
    return {
        "provenance": in_python()["provenance"],
        "results": [
            {**about, "way": "anabranch", **rates, "TFLOP_per_s": 500.0, "exposed_of_exchange": 0.25},
            {**about, "way": "torch", **rates, "TFLOP_per_s": 200.0},
            {**about, "way": "exchange"},
        ],
    }


def training_over_ranks():
    """Results of benchmarks/ranks/training.py."""
    about = {"model": "OLMoE-1B-7B", "steps": 2, "options": {"batch-size": 32}, "peak_GiB": 110.4, "step_seconds": 2.0}
    row = {**about, "scaling": "strong", "ranks": 1, "tokens_per_second": 50000.0, "model_TFLOP_per_s": 400.0}
    spread = {"ranks": 2, "tokens_per_second": 90000.0, "losses": [4.0, 3.003], "exposed_communication_seconds": 0.03}
    results = [{**row, "losses": [4.0, 3.0]}, {**row, **spread}]
    return {"provenance": in_python()["provenance"], "results": results}


@pytest.fixture
def machine(project, tmp_path):
    """The project with stand-ins, on a machine with as many GPUs as its environment says."""
    for name in [*GPU_NAMES, "gpu_exchange", *CPU_NAMES]:
        for preset in ("release", "cuda"):
            executable(
                project.root / f"build/{preset}/benchmarks/benchmark_{name}",
                f'#!/bin/bash\necho "{preset}/{name} $*" >> "{project.log}"\n'
                f'[[ $FAILS == {name} ]] && exit 3\n'
                'while [[ $1 != --json ]]; do shift; done\n'
                f'cp "{ROOT}/benchmarks/results/{name + "_2" * (name == "gpu_exchange")}.json" "$2"\n',
            )
    tools = tmp_path / "tools"
    executable(tools / "nvidia-smi", '#!/bin/bash\nfor ((i = 0; i < GPUS; ++i)); do echo "GPU $i: H200"; done\n')
    executable(
        tools / "mpirun",
        f'#!/bin/bash\n[[ $1 == --version ]] && exit\necho "mpirun $*" >> "{project.log}"\n'
        'while [[ $1 != -n ]]; do shift; done; shift 2\nexec "$@"\n',
    )
    shutil.copytree(ROOT / "benchmarks", project.root / "benchmarks", ignore=shutil.ignore_patterns("article", "plan", "scaling"))
    for name, path, results in (
        ("gpu_layer_python", "gpu/layer.py", in_python()),
        ("gpu_expert_parallel", "ranks/expert_parallel.py", over_ranks()),
        ("gpu_training_ranks", "ranks/training.py", training_over_ranks()),
        ("gpu_balance", "ranks/balance.py", {"settings": [], "calibration": [], "provenance": {}}),
    ):
        executable(
            project.root / "benchmarks" / path,
            "import json, os, sys\n"
            'def described(*_):\n    return {}, "what balance.py says"\n'  # to report.py
            'if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":\n'
            '    ranks = os.environ.get("WORLD_SIZE")\n'
            f'    with open("{project.log}", "a") as log:\n'
            f'        print("cuda/{name}", *(["-n", ranks] if ranks else []), *sys.argv[1:], file=log)\n'
            f'    json.dump({results!r}, open(sys.argv[sys.argv.index("--json") + 1], "w"))\n',
        )
    (project.root / "docs").mkdir()

    def run(*arguments, gpus=0, fails="", expect=0):
        environment = {"GPUS": str(gpus), "FAILS": fails, "PATH": f"{tools}:{os.environ['PATH']}"}
        return project.run("benchmark.sh", *arguments, environment=environment, expect=expect)

    run.project = project
    run.results = project.root / "runs/benchmark"
    return run


def measured(machine):
    return [call.split()[0] for call in machine.project.calls() if call.startswith(("release/", "cuda/"))]


def test_on_a_machine_without_a_gpu(machine):
    machine("--commit", "0123abcd")
    assert measured(machine) == [f"release/{name}" for name in CPU_NAMES]
    build = next(call for call in machine.project.calls() if call.startswith("cmake --build"))
    assert build.endswith("--target benchmark_cpu_layer benchmark_cpu_grouped_gemm")
    assert all("--commit 0123abcd" in call for call in machine.project.calls() if call.startswith("release/"))
    report = (machine.results / "performance.md").read_text()
    assert "One layer on the CPU" in report and "between GPUs" not in report
    assert sorted(path.name for path in machine.results.glob("*json*")) == ["cpu_grouped_gemm.json", "cpu_layer.json"]


@pytest.mark.parametrize("gpus, ranks", [(1, []), (2, [2]), (4, [2, 4]), (6, [2, 4, 6])])
def test_on_a_machine_with_gpus(machine, gpus, ranks):
    machine("--commit", "0123abcd", "--no-build", "--quick", gpus=gpus)
    names = GPU_NAMES + [name for name in RANKS_NAMES for _ in ranks]
    assert measured(machine) == [f"cuda/{name}" for name in names]
    assert all(call.endswith("--quick") for call in machine.project.calls())
    assert [" --engine all " in call for call in machine.project.calls() if call.startswith("cuda/")] == [
        name == "gpu_grouped_gemm" for name in names
    ]
    assert [int(call.split(" -n ")[1].split()[0]) for call in machine.project.calls() if " -n " in call] == ranks * 2
    for name in RANKS_NAMES:
        assert [(machine.results / f"{name}_{n}.json").exists() for n in ranks] == [True] * len(ranks)
    assert not any(call.startswith(("setup", "cmake")) for call in machine.project.calls())


def test_what_is_measured_over_gpus_if_it_is_named(machine):
    machine("--commit", "0123abcd", "--no-build", "gpu_training_ranks", "gpu_balance", gpus=4)
    calls = [call.split(" --commit ")[0] for call in machine.project.calls() if call.startswith("cuda/")]
    programs = machine.project.root / "build/cuda"
    step = f"cuda/gpu_balance --device cuda --program {programs}/benchmarks/benchmark_step --ranks"
    assert calls == [
        f"cuda/gpu_training_ranks --program {programs}/examples/train_lm --ranks 1 2 4",
        f"{step} 2",
        f"{step} 4",
    ]
    report = (machine.results / "performance.md").read_text()
    assert "Training over the GPUs of a host" in report and report.count("what balance.py says") == 2


def report_of(folder, **results):
    for name, measured in results.items():
        (folder / f"{name}.json").write_text(json.dumps(measured))
    report = [sys.executable, str(ROOT / "benchmarks/report.py"), "--results", str(folder)]
    subprocess.run([*report, "--output", str(folder / "out.md")], check=True)
    return (folder / "out.md").read_text()


def cells(text, header, start):
    """The cells by column of the row that begins with `start`, of the table whose header has `header`."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| shape |") and header in line)
    row = next(line for line in lines[first:] if line.startswith(start))
    return dict(zip(lines[first].strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))


def test_peers_stand_beside_the_layer(tmp_path):
    text = report_of(tmp_path, gpu_layer_python=in_python())
    row = cells(text, "issued in", "| OLMoE, zipf 1 (7.2) | 4096 | grouped_mm ")
    assert (row["wall, ms"], row["launches"], row["over the layer's wall"]) == ("1.250", "29", "2.50")
    assert cells(text, "issued in", "| OLMoE, zipf 1 (7.2) | 4096 | anabranch ")["as a graph"] == "0.450"
    assert "sonic: package sonicmoe is not installed" in text and "| sonic |" not in text


def test_ranks_beside_torch(tmp_path):
    text = report_of(tmp_path, gpu_expert_parallel_2=over_ranks())
    row = cells(text, "GPUs", "| OLMoE | 2 | anabranch ")
    assert (row["both"], row["over torch"], row["of the exchange exposed"]) == ("500", "2.50", "25 %")
    assert cells(text, "GPUs", "| OLMoE | 2 | exchange ")["both"] == "–"
    assert "torchrun --nproc-per-node 2 benchmarks/ranks/expert_parallel.py" in text


def test_training_beside_one_gpu(tmp_path):
    text = report_of(tmp_path, gpu_training_ranks=training_over_ranks())
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("| model, scaling |"))
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| OLMoE-1B-7B, strong |")]
    alone, both = (dict(zip(header.strip("| ").split(" | "), row, strict=True)) for row in rows)
    assert (alone["of one GPU's"], alone["of a step exposed, %"]) == ("1.00", "–")
    assert (both["tokens/s a GPU"], both["of one GPU's"], both["of a step exposed, %"]) == ("45,000", "0.90", "1.5")
    assert both["losses apart from one GPU's, %"] == "0.100"


def test_skewed_load_is_told_as_balance_py_does(tmp_path):
    measured = json.loads((ROOT / "benchmarks/results/balance.json").read_text())
    said = (ROOT / "benchmarks/results/balance.md").read_text().partition("\n\n")[2]
    assert said in report_of(tmp_path, gpu_balance_2=measured)


@pytest.mark.skipif(not TRAIN_LM.exists(), reason="train_lm is not built")
def test_training_over_ranks_for_real(tmp_path):
    file = tmp_path / "gpu_training_ranks.json"
    command = [sys.executable, ROOT / "benchmarks/ranks/training.py", "--program", TRAIN_LM, "--device", "cpu", "--quick"]
    launcher = f"{ROOT}/launch/mpirun.sh -n {{ranks}} --no-bind"
    words = ["--ranks", "1", "2", "--launcher", launcher, "--json", file]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAMS.parent / "python")}
    subprocess.run([*command, *words], check=True, timeout=300, env=environment)
    measured = json.loads(file.read_text())
    assert [(row["scaling"], row["ranks"]) for row in measured["results"]] == [
        ("weak", 1), ("strong", 1), ("weak", 2), ("strong", 2)
    ]  # fmt: skip
    strong = [row["losses"] for row in measured["results"] if row["scaling"] == "strong"]
    assert strong[1] == pytest.approx(strong[0], rel=1e-4) and len(set(strong[0])) > 4
    assert "losses apart" in report_of(tmp_path, gpu_training_ranks=measured)


def test_few_tokens_have_a_table_of_their_own(tmp_path):
    measured = json.loads((ROOT / "benchmarks/results/gpu_layer.json").read_text())
    olmoe = next(case for case in measured["results"] if case["shape"] == "OLMoE")
    more = {"zipf": 0, "imbalance": 1.1, "issue_ms": 1.25, "launches": 31, "busy_us": 700.0, "graph_ms": 0.75}
    measured["results"] = [{**olmoe, **more, "tokens": tokens, "ms": tokens / 1024} for tokens in (32768, 256)]
    text = report_of(tmp_path, gpu_layer=measured)
    row = cells(text, "launches", "| OLMoE | 256 |")
    assert row["wall, ms"] == "0.250" and row["GPU busy"] == "0.700" and row["launches"] == "31"
    assert "| OLMoE | 32768 |" not in text and cells(text, "peak GiB", "| OLMoE |")["layer, ms"] == "32.00"


def test_what_is_there_to_be_compared_with(tmp_path):
    """Engines that come after auto have a table of their own, beside the topology that block_sparse builds."""
    measured = json.loads((ROOT / "benchmarks/results/gpu_grouped_gemm.json").read_text())
    of_auto = [case for case in measured["results"] if case.get("engine") == "auto" and "of_dense" in case]
    measured["results"] = [
        case for case in measured["results"] if case.get("engine") not in ("padded_bmm", "block_sparse")
    ]
    for case in of_auto:
        case = {**case, "TFLOP_per_s": 123.4, "of_dense": 0.567}
        measured["results"] += [{**case, "engine": engine} for engine in ("padded_bmm", "block_sparse")]
    for place in dict.fromkeys((case["shape"], case["split"]) for case in of_auto):
        measured["results"].append({"shape": place[0], "split": place[1], "operation": "topology", "ms": 0.0423})
    (tmp_path / "gpu_grouped_gemm.json").write_text(json.dumps(measured))
    report = [sys.executable, str(ROOT / "benchmarks/report.py"), "--results", str(tmp_path)]
    subprocess.run([*report, "--output", str(tmp_path / "out.md")], check=True)
    lines = (tmp_path / "out.md").read_text().splitlines()
    header = next(line for line in lines if line.startswith("| shape |") and "topology" in line)
    columns = header.strip("| ").split(" | ")
    rows = [line for line in lines if line.endswith("| 42 |")]
    assert len(rows) == len(of_auto)
    for row in rows:
        cells = dict(zip(columns, row.strip("| ").split(" | "), strict=True))
        assert cells["padded_bmm"] == cells["block_sparse"] == "123 (0.57)"
    assert any(line.endswith("`benchmark_gpu_grouped_gemm --engine all`") for line in lines)


def test_what_fails_costs_nothing_else(machine):
    output = machine("--commit", "0123abcd", "--output", machine.results / "here", fails="cpu_layer", expect=1)
    assert "failed: cpu_layer" in output
    assert json.loads((machine.results / "here/cpu_grouped_gemm.json").read_text())["results"]
    assert not (machine.results / "here/cpu_layer.json").exists()


def test_publishes_what_was_measured(machine):
    published = machine.project.root / "benchmarks/results"
    for path in published.glob("*.json"):
        path.unlink()
    machine("--commit", "0123abcd", "--publish", "cpu_layer")
    assert [path.name for path in published.glob("*.json")] == ["cpu_layer.json"]
    assert "One layer on the CPU" in (machine.project.root / "docs/performance.md").read_text()


def test_changed_sources_are_marked_and_not_published(machine):
    root = machine.project.root
    git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "launch"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert f"changed since commit {commit}" in machine("--publish", expect=1)
    assert machine.project.calls() == []
    machine("cpu_layer")
    assert f"--commit {commit}-changed " in machine.project.calls()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu_layer"], "gpu_layer needs a GPU"),
        (["layer"], "unknown argument 'layer'"),
        (["--output"], "--output needs a value"),
        (["--quick", "--publish"], "not for publishing"),
    ],
)
def test_refuses(machine, arguments, message):
    assert message in machine(*arguments, expect=1)
    assert machine.project.calls() == []


def test_help(machine):
    assert "--publish" in machine("--help")


@needs_programs
@pytest.mark.parametrize("name, title", zip(CPU_NAMES, ["One layer on the CPU", "Grouped GEMM on the CPU"]))
def test_a_few_cases_of_the_real_programs(tmp_path, name, title):
    file = tmp_path / f"{name}.json"
    options = ["--quick", "--rounds", "1", "--threads", "1", "--commit", "0123abcd", "--json", file]
    subprocess.run([PROGRAMS / f"benchmark_{name}", *options], check=True, timeout=200)
    measured = json.loads(file.read_text())
    published = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert measured["provenance"].keys() == published["provenance"].keys()
    assert (measured["provenance"]["commit"], measured["provenance"]["threads"]) == ("0123abcd", 1)
    assert 0 < len(measured["results"]) < len(published["results"])
    for case, other in zip(measured["results"], published["results"]):  # of the same cases, in the same order
        assert case.keys() == other.keys()
        assert [case[key] for key in case if isinstance(other[key], (str, int)) and "bytes" not in key] == [
            other[key] for key in case if isinstance(other[key], (str, int)) and "bytes" not in key
        ]
    report = [sys.executable, ROOT / "benchmarks/report.py", "--results", tmp_path, "--output", tmp_path / "out.md"]
    subprocess.run(report, check=True)
    assert title in (tmp_path / "out.md").read_text()


@needs_programs
@pytest.mark.parametrize("program, option", [("cpu_layer", "--engine"), ("cpu_grouped_gemm", "--skew"), ("step", "--threads")])
def test_a_benchmark_refuses_the_options_of_others(program, option):
    run = subprocess.run([PROGRAMS / f"benchmark_{program}", option, "1"], capture_output=True, text=True, check=False)
    assert run.returncode not in (0, 1) and option in run.stderr
    help_text = subprocess.run([PROGRAMS / f"benchmark_{program}", "--help"], capture_output=True, text=True, check=True)
    assert "--rounds" in help_text.stdout and option not in help_text.stdout
