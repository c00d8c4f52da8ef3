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


SECTIONS = {"cpu_layer.json": layer, "cpu_grouped_gemm.json": grouped_gemm}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "performance.md")
    arguments = parser.parse_args()
    parts = ["# Performance\n\nMade by `benchmarks/report.py` from the files in `benchmarks/results/`.\n"]
    for name, section in SECTIONS.items():
        parts.append(section(json.loads((RESULTS / name).read_text())))
    arguments.output.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
