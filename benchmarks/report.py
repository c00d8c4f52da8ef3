#!/usr/bin/env python3
"""Writes docs/performance.md from the measurements under benchmarks/results/."""

import argparse
import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB = 1 << 20


def provenance(measured, command):
    about = measured["provenance"]
    return (
        f"{about['processor']}, {about['threads']} threads, PyTorch {about['torch']}, "
        f"g++ {about['compiler']}, commit {about['commit'][:10]}, {about['date']}: `{command}`"
    )


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def layer(measured):
    rows = [
        (
            f"E {case['experts']}, k {case['top_k']}",
            f"{case['layer_ms']:.0f}",
            f"{case['plain_ms']:.0f}",
            f"{case['unbound_ms']:.0f}",
            f"{case['speedup']:.2f}",
            f"{case['speedup_over_unbound']:.2f}",
            f"{case['layer_peak_bytes'] / MIB:.0f}",
            f"{case['plain_peak_bytes'] / MIB:.0f}",
            f"{case['unbound_peak_bytes'] / MIB:.0f}",
        )
        for case in measured["results"]
    ]
    case = measured["results"][0]
    header = (
        "experts", "layer, ms", "plain, ms", "unbound, ms", "speed-up", "over unbound",
        "layer, peak MiB", "plain, peak MiB", "unbound, peak MiB",
    )
    return f"""## One layer on the CPU, forward and backward with its router

fp32, {case['tokens']} tokens, hidden {case['hidden']}, expert hidden {case['expert_hidden']}, one
process. "Plain" is the same MoE in LibTorch operations: `index_select`, an `mm` per expert,
`index_add`, autograd; its weights indexed by expert, or unbound once. Peak: most bytes the tensors of one step held at once, over the parameters.

{table(header, rows)}

{provenance(measured, 'build/release/benchmarks/benchmark_cpu_layer')}
"""


def grouped_gemm(measured):
    rows = [
        (
            f"{case['rows']} × {case['k']} → {case['n']}, E {case['experts']}",
            case["split"],
            case["operation"],
            f"{case['engine_ms']:.2f}",
            f"{case['loop_ms']:.2f}",
            f"{case['speedup']:.2f}",
        )
        for case in measured["results"]
    ]
    header = ("shape", "split", "product", "engine, ms", "loop, ms", "speed-up")
    return f"""## Grouped GEMM on the CPU

fp32; the engine `cpu` beside a plain loop of `at::mm` over the experts, in the same rounds. `uni`:
equal counts; `zipf`: counts ∝ 1/rank^0.8.

{table(header, rows)}

{provenance(measured, 'build/release/benchmarks/benchmark_cpu_grouped_gemm')}
"""


# Stages of a step on the GPU by what their kernels' names hold; the first that fits.
GPU_STAGES = {
    "up, activation": ("Epilogue)1",),
    "down": ("Operation)0",),
    "down dX, activation": ("Epilogue)2",),
    "up dX": ("Operation)1",),
    "dW": ("Operation)2",),
    "permute": ("gather_rows",),
    "unpermute": ("sum_rows",),
    "router, plan, sums": ("",),
}


def gpu_stages(case):
    times = dict.fromkeys(GPU_STAGES, 0.0)
    for name, us in case.items():
        if name.startswith("us of "):
            stage = next(s for s, parts in GPU_STAGES.items() if any(p in name for p in parts))
            times[stage] += us / 1e3
    return times


def gpu_layer(measured):
    rows = [
        (
            case["shape"],
            f"{case['ms']:.2f}",
            f"{case['TFLOP_per_s']:.0f}",
            f"{case['peak_GiB']:.2f}",
            f"{case['grouped_mm_ms']:.2f}",
            f"{case['grouped_mm_peak_GiB']:.2f}",
            f"{case['speedup']:.2f}",
        )
        for case in measured["results"]
    ]
    stages = [
        (case["shape"], *(f"{ms:.2f}" for ms in gpu_stages(case).values()))
        for case in measured["results"]
    ]
    about = measured["provenance"]
    return f"""## One layer on a GPU, forward and backward with its router

bf16; medians of 9 rounds in which the layer and the same MoE in `torch._grouped_mm` and index
operations take turns. Peak: most bytes of tensors alive at once, parameters and gradients included.

{table(("shape", "layer, ms", "TFLOP/s", "peak GiB", "grouped_mm, ms", "its peak GiB", "speed-up"), rows)}

Milliseconds of GPU time by stage, from a trace of one step after the rounds:

{table(("shape", *GPU_STAGES), stages)}

{about['gpu']}, CUDA {about['cuda_runtime']}, cuBLAS {about['cublas']}, PyTorch {about['torch']}, commit {about['commit'][:10]}, {about['date']}: `benchmark_gpu_layer`

{about.get('note', '')}
"""


SECTIONS = {
    "cpu_layer.json": layer,
    "cpu_grouped_gemm.json": grouped_gemm,
    "gpu_layer.json": gpu_layer,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "performance.md")
    arguments = parser.parse_args()
    parts = ["# Performance\n\nMade by `benchmarks/report.py` from the files in `benchmarks/results/`.\n"]
    for name, section in SECTIONS.items():
        if (RESULTS / name).exists():  # not every machine has been measured on
            parts.append(section(json.loads((RESULTS / name).read_text())))
    arguments.output.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
