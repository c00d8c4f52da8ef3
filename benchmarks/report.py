#!/usr/bin/env python3
"""Tables of what launch/benchmark.sh has measured: docs/performance.md from benchmarks/results/."""

import argparse
import itertools
import json
import pathlib
import re
import sys

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


# Stages of a step on the GPU by their kernels' names; the first that fits. cuBLAS's kernels say how
# the operands lie, which tells the product.
GPU_STAGES = {
    "up, activation": r"Epilogue\)1",
    "down": r"Operation\)0|nvjet_sm90_tst.*_TN.$",
    "down dX, activation": r"Epilogue\)2",
    "up dX": r"Operation\)1|nvjet_sm90_tst.*_NN.$",
    "dW": r"Operation\)2|nvjet_sm90_tst.*_NT.$|splitKreduce",
    "activation": r"activate_kernel|activate_backward",
    "permute": r"gather_rows|scatter_rows",
    "unpermute": r"sum_rows",
    "router, plan, sums": r"",
}


def gpu_stages(case):
    times = dict.fromkeys(GPU_STAGES, 0.0)
    for name, us in case.items():
        if name.startswith("us of "):
            stage = next(s for s, pattern in GPU_STAGES.items() if re.search(pattern, name))
            times[stage] += us / 1e3
    return times


def gpu_provenance(measured, command):
    about = measured["provenance"]
    text = (
        f"{about['gpu']}, CUDA {about['cuda_runtime']}, cuBLAS {about['cublas']}, "
        f"PyTorch {about['torch']}, commit {about['commit'][:10]}, {about['date']}: `{command}`"
    )
    return text + (f"\n\n{about['note']}" if "note" in about else "")


def layer_case(case):
    """What a row is of: a shape, and what is unlike its first row."""
    skewed = f", zipf {case['zipf']:g} ({case['imbalance']:.1f})" if case.get("zipf") else ""
    return f"{case['shape']}{skewed}"


def given(number, digits):
    """A cell: not all results have all numbers."""
    return "–" if number is None else f"{number:.{digits}f}"


def few_tokens(measured):
    """Rows of the shapes with fewer tokens than their first rows have."""
    most = {}
    for case in measured["results"]:
        most[case["shape"]] = max(most.get(case["shape"], 0), case.get("tokens", 0))
    return [case for case in measured["results"] if case.get("tokens", 0) < most[case["shape"]]]


def gpu_layer(measured):
    few = few_tokens(measured)
    many = [case for case in measured["results"] if case not in few]
    rows = [
        (
            layer_case(case),
            f"{case['ms']:.2f}",
            given(case.get("graph_ms"), 2),
            f"{case['TFLOP_per_s']:.0f}",
            f"{case['peak_GiB']:.2f}",
            f"{case['grouped_mm_ms']:.2f}",
            f"{case['grouped_mm_peak_GiB']:.2f}",
            f"{case['speedup']:.2f}",
        )
        for case in many
    ]
    header = ("shape", "layer, ms", "as a graph, ms", "TFLOP/s", "peak GiB", "grouped_mm, ms", "its peak GiB", "speed-up")
    stages = [(layer_case(case), *(f"{ms:.2f}" for ms in gpu_stages(case).values())) for case in many]
    host = [
        (
            layer_case(case), str(case["tokens"]), f"{case['ms']:.3f}", f"{case['issue_ms']:.3f}",
            f"{case['busy_us'] / 1e3:.3f}", str(case["launches"]), given(case["graph_ms"], 3),
            f"{case['grouped_mm_ms']:.3f}",
        )
        for case in measured["results"]
        if "issue_ms" in case and (case in few or case["tokens"] <= 16384)
    ]
    host_header = ("shape", "tokens", "wall, ms", "issued in", "GPU busy", "launches", "as a graph", "grouped_mm, wall")
    host_table = (
        f"""
Small steps are their host's. Wall time of steps that follow one another, time until one is issued, the GPU's busy
time, and the step as a CUDA graph:

{table(host_header, host)}
"""
        if host
        else ""
    )
    return f"""## One layer on a GPU, forward and backward with its router

bf16; medians of rounds in which the layer and the same MoE in `torch._grouped_mm` and index
operations take turns. Peak: most bytes of tensors alive at once, parameters and gradients included.
Zipf 1: a router that prefers experts by Zipf's law; in brackets the fullest expert's rows over the mean.

{table(header, rows)}

Milliseconds of GPU time by stage, from a trace of one step after the rounds:

{table(("shape", *GPU_STAGES), stages)}
{host_table}
{gpu_provenance(measured, 'benchmark_gpu_layer')}
"""


def gpu_layer_python(measured):
    """A row a case and way; a peer that has no row took no part, and why is said once."""
    rows = []
    reasons = {}
    ours = {}
    for case in measured["results"]:
        place = (case["shape"], case["tokens"], case["zipf"])
        if "reason" in case:
            reasons.setdefault((case["way"], case["reason"]), None)
            continue
        if case["way"] == "anabranch":
            ours[place] = case["ms"]
        rows.append((
            layer_case(case), str(case["tokens"]), case["way"], f"{case['ms']:.3f}", f"{case['issue_ms']:.3f}",
            f"{case['busy_ms']:.3f}", str(case["launches"]), given(case.get("graph_ms"), 3),
            f"{case['TFLOP_per_s']:.0f}", f"{case['peak_GiB']:.2f}", f"{case['ms'] / ours[place]:.2f}",
        ))  # fmt: skip
    header = ("shape", "tokens", "way", "wall, ms", "issued in", "GPU busy", "launches", "as a graph", "TFLOP/s",
              "GiB", "over the layer's wall")
    absent = "".join(f"\n- {way}: {reason}" for way, reason in reasons)
    return f"""## One layer on a GPU as Python calls it, beside other libraries

bf16, forward and backward with the router, in turns within one process. Wall: of steps that follow one another;
issued in: until a step has returned; GiB: most bytes alive at once beyond those before the step.

{table(header, rows)}
{"Took no part:" + absent if absent else ""}

{gpu_provenance(measured, 'benchmarks/gpu/layer.py')}
"""


def baselines(products, topologies):
    """Engines that auto does not choose from, which come after it, beside the same dense GEMM."""
    engines = list(next(iter(products.values())))
    names = engines[engines.index("auto") + 1 :]
    if not names:
        return ""
    rows = [
        (
            shape, split, operation, f"{cases['dense']['TFLOP_per_s']:.0f}",
            *(f"{cases[name]['TFLOP_per_s']:.0f} ({cases[name]['of_dense']:.2f})" for name in names),
            f"{1e3 * topologies[shape, split]:.0f}",
        )
        for (shape, split, operation), cases in products.items()
    ]
    return f"""
Ways to run the experts that are there to be compared with, in the same rounds: TFLOP/s (over dense), padding not
counted as work; and what block_sparse takes before its products to build their topology, which is in their time:

{table(("shape", "split", "product", "dense", *names, "topology, µs"), rows)}
"""


def gpu_grouped_gemm(measured):
    products = {}
    host = {}
    duels = {}
    topologies = {}
    for case in measured["results"]:
        if "host_us_per_expert" in case:
            host[case["engine"]] = case["host_us_per_expert"]
        elif "auto_of_best" in case:
            duels[case["shape"], case["split"], case["operation"]] = case
        elif case["operation"] == "topology":
            topologies[case["shape"], case["split"]] = case["ms"]
        else:
            key = (case["shape"], case["split"], case["operation"])
            products.setdefault(key, {})[case["engine"]] = case
    loops = [name for name in host if name.startswith("cublas_loop")]
    rows = []
    for (shape, split, operation), cases in products.items():
        rate = {name: case["TFLOP_per_s"] for name, case in cases.items()}
        duel = duels[shape, split, operation]
        rows.append((
            shape, split, operation, f"{rate['dense']:.0f}", f"{rate['torch']:.0f}",
            f"{rate['hopper']:.0f}" if "hopper" in rate else "–",
            f"{max(rate[name] for name in loops):.0f}", f"{rate['cublas_grouped']:.0f}",
            f"{rate['auto']:.0f}", f"{rate['auto'] / rate['dense']:.2f}",
            f"{rate['auto'] / rate['torch']:.2f}", f"{duel['auto_of_best']:.3f}",
            duel["best_engine"],
        ))
    header = ("shape", "split", "product", "dense", "torch", "hopper", "best cublas_loop",
              "cublas_grouped", "auto", "auto / dense", "auto / torch", "auto / best", "best")
    costs = ", ".join(f"{name} {us:.1f}" for name, us in host.items())
    compared = baselines(products, topologies)
    return f"""## Grouped GEMM on a GPU

bf16, TFLOP/s, medians of rounds in which all ways take turns. `dense`: one GEMM of the same FLOPs;
`torch`: `torch._grouped_mm`; `best cublas_loop`: of 1, 2, 4 and 8 streams. `uni`: equal counts;
`zipf`: counts ∝ 1/rank^0.8; `seed`: the article's own uneven split. `auto / best`: speed of `auto` over
that of the fastest single engine, from rounds of those two alone.

{table(header, rows)}

Host time an expert (128 experts of 16 rows, 256 × 256), µs: {costs}.
{compared}
{gpu_provenance(measured, 'benchmark_gpu_grouped_gemm' + (' --engine all' if compared else ''))}
"""


def gpu_kernels(measured):
    rows = [
        (
            case["kernel"],
            f"{case['rows']} × {case['width']}",
            f"{case['us']:.1f}",
            f"{case['GB_per_s']:.0f}",
            f"{100 * case['of_copy']:.0f} %",
        )
        for case in measured["results"]
    ]
    return f"""## Memory-bound kernels on a GPU

bf16. Bytes are those that cannot be avoided: each input read once, each output written once; the last
column is beside a plain device copy in the same run. Routing and plan are small: there microseconds
count.

{table(("kernel", "rows", "µs", "GB/s", "of the copy"), rows)}

{gpu_provenance(measured, 'benchmark_gpu_kernels')}
"""


def gpu_routing(measured):
    """Of the same program's rows those of rules."""
    rules = ("route ", "route, ", "route_backward ", "choose_tokens ", "sinkhorn_bias", "bias_histogram", "both ways, ")
    size = {"rows": 32768, "width": 128}
    of_size = [case for case in measured["results"] if size.items() <= case.items()]
    routers = "router, both ways, "
    kernels = [case for case in of_size if case["kernel"].startswith(rules) and " k 8" not in case["kernel"]]
    whole = [case for case in of_size if case["kernel"].startswith(routers)]
    return f"""## Routing rules on a GPU

32,768 tokens to 128 experts, top 8, from CUDA graphs. What of a rule follows one another, without the gate's product:

{table(("kernel", "µs"), [(case["kernel"], f"{case['us']:.1f}") for case in kernels])}

Whole routers with it, h 2048, forward and backward by autograd: a rule costs what it takes more than top_k.

{table(("router", "µs"), [(case["kernel"].removeprefix(routers), f"{case['us']:.0f}") for case in whole])}

{gpu_provenance(measured, 'benchmark_gpu_kernels --quick')}
"""


def gpu_exchange(*measured):
    """Of one file for each number of ranks."""
    rows = [
        (
            f"{case['ranks']} / {case['gpus']}",
            f"T {case['tokens']}, h {case['hidden']}, E {case['experts']}, k {case['top_k']}",
            case.get("way", "nccl"),
            f"{case['bytes'] / 1e6:.1f}",
            f"{case['bare_ms']:.3f}",
            f"{case['bytes'] / case['bare_ms'] / 1e6:.0f}",
            f"{case['bare_ms'] / case['all_to_all_ms']:.2f}",
            f"{case['dispatch_ms']:.3f} ({case['bare_ms'] / case['dispatch_ms']:.2f})",
            f"{case['combine_ms']:.3f} ({case['bare_back_ms'] / case['combine_ms']:.2f})",
        )
        for case in itertools.chain.from_iterable(file["results"] for file in measured)
    ]
    commands = [f"mpirun -n {file['results'][0]['ranks']} benchmark_gpu_exchange" for file in measured]
    provenance = "  \n".join(map(gpu_provenance, measured, commands))
    header = ("ranks / GPUs", "case", "by", "MB from a rank", "bare, ms", "GB/s",
              "bare / all_to_all_v", "dispatch, ms (bare / it)", "combine, ms (bare / it)")
    return f"""## Exchange between GPUs

Beside bare grouped ncclSend and ncclRecv of the same bytes in the same run. Dispatch also gathers the
rows that it sends, combine also sums the rows that come back. By `nccl`: grouped sends and receives;
by `peer memory`: the library's own kernel, which is what ranks of one host use.

{table(header, rows)}

{provenance}
"""


def gpu_expert_parallel(*measured):
    """Of one file for each number of ranks."""
    rows = []
    for file in measured:
        by_torch = {place_of(case): case["TFLOP_per_s"] for case in file["results"] if case["way"] == "torch"}
        for case in file["results"]:
            rate = case.get("TFLOP_per_s")
            exposed = case.get("exposed_of_exchange")
            rows.append((
                layer_of_ranks(case), str(case["ranks"]), case["way"], f"{case['forward_ms']:.3f}",
                f"{case['backward_ms']:.3f}", given(case.get("forward_TFLOP_per_s"), 0),
                given(case.get("backward_TFLOP_per_s"), 0), given(rate, 0),
                given(rate and rate / by_torch[place_of(case)], 2), "–" if exposed is None else f"{100 * exposed:.0f} %",
            ))  # fmt: skip
    commands = [
        f"torchrun --nproc-per-node {file['results'][0]['ranks']} benchmarks/ranks/expert_parallel.py" for file in measured
    ]
    provenance = "  \n".join(map(gpu_provenance, measured, commands))
    header = ("shape", "GPUs", "way", "forward, ms", "backward, ms", "TFLOP/s a GPU, forward", "backward", "both",
              "over torch", "of the exchange exposed")
    tokens = measured[0]["results"][0]["tokens"]
    return f"""## One layer over the GPUs of a host

bf16, {tokens} tokens a rank, as Python calls it, router included; the slowest rank's time, medians of rounds in which the
ways take turns. `torch`: the same layer by `all_to_all_single` and `torch._grouped_mm`; `alone`: a rank that has all
experts and exchanges nothing; `exchange`: dispatch and combine by themselves. Exposed: what a step takes longer than
`alone`, over the exchange; with skewed routing it holds the wait for the fullest rank too.

{table(header, rows)}

{provenance}
"""


def gpu_training(measured):
    rows = [
        (
            case["way"],
            f"{case['tokens_per_second']:,.0f}",
            f"{case['model_TFLOP_per_s']:.0f}",
            f"{case['peak_GiB']:.1f}",
            str(case.get("micro_batch", case["batch_size"])),
        )
        for case in measured["results"]
    ]
    case, about = measured["results"][0], measured["provenance"]
    return f"""## Whole steps of training on a GPU

Qwen3-30B-A3B of {case['layers']} layers and a vocabulary of {case['vocabulary']:,}, bf16, {case['batch_size']} random sequences of
{case['sequence_length']:,} tokens a step, optimizer included. `train_lm` keeps fp32 masters and main gradients; transformers
{about['transformers']} (`grouped_mm`, SDPA, torch's fused AdamW) has parameters and states of bf16 alone. **{measured['ratio']:.2f} times**
as many tokens a second.

{table(("", "tokens/s", "model TFLOP/s", "peak GiB", "sequences at a time"), rows)}

{gpu_provenance(measured, 'benchmarks/gpu/training.py')}
"""


def gpu_training_ranks(measured):
    alone = {(case["model"], case["scaling"]): case for case in measured["results"] if case["ranks"] == 1}
    rows = []
    for case in measured["results"]:
        rate, first = case["tokens_per_second"] / case["ranks"], alone.get((case["model"], case["scaling"]))
        apart = None
        if first and case["scaling"] == "strong":  # of the same tokens
            apart = 100 * max(abs(a / b - 1) for a, b in zip(case["losses"], first["losses"], strict=True))
        exposed = case.get("exposed_communication_seconds")
        rows.append((
            f"{case['model']}, {case['scaling']}", str(case["ranks"]), str(case["options"]["batch-size"]),
            f"{case['step_seconds']:.3f}", f"{rate:,.0f}", f"{case['model_TFLOP_per_s']:.0f}",
            given(first and rate / (first["tokens_per_second"] / first["ranks"]), 2),
            given(exposed and 100 * exposed / case["step_seconds"], 1), f"{case['peak_GiB']:.1f}", given(apart, 3),
        ))  # fmt: skip
    header = ("model, scaling", "GPUs", "sequences a step", "s a step", "tokens/s a GPU", "model TFLOP/s a GPU",
              "of one GPU's", "of a step exposed, %", "peak GiB", "losses apart from one GPU's, %")
    return f"""## Training over the GPUs of a host

Whole steps of `train_lm`, bf16, random tokens, optimizer included. Weak: as many sequences a GPU; strong: as many in all, and
the same. Qwen3-30B-A3B as others have published it (8 H100, not H200: NeMo AutoModel 12,040 tokens/s and 277 TFLOP/s a GPU
with a balanced gate; LigerCute 36.3 s a step of 512 sequences with its own).

{table(header, rows)}

{gpu_provenance(measured, 'benchmarks/ranks/training.py')}
"""


def gpu_balance(*measured):
    """Of one file for each number of ranks."""
    folders = ("benchmarks/ranks", "tools/plan", "tests/support", "launch")
    sys.path[:0] = [str(ROOT / folder) for folder in folders]
    import balance  # needs the planner, and what that needs

    of_ranks = [balance.described(file["settings"], file["calibration"], file["provenance"])[1] for file in measured]
    return "## Skewed load over the GPUs of a host\n\n" + "\n".join(of_ranks)


def train_provenance(measured):
    """Of runs of train_lm on a CPU."""
    about = measured["provenance"]
    machine = f"{about['processor']}, {about['cores']} cores, PyTorch {about['torch']}, commit {about['commit'][:10]}"
    return f"{machine}, {about['date']}: `{about['command']}`"


def curves_table(measured):
    steps = [list(case["curve"])[index] for case in measured["results"][:1] for index in (0, len(case["curve"]) // 2, -1)]
    rows = [
        (
            case["way"],
            *(f"{case['curve'][step]:.4f}" for step in steps),
            f"{case['validation_loss']:.4f}",
            "" if case["beside"] == case["way"] else f"{100 * case['validation_difference']:+.2f} %",
            "" if case["beside"] == case["way"] else f"{100 * case['largest_difference']:.2f} %",
            f"{case['imbalance']:.2f}",
            f"{case['largest_imbalance']:.2f}",
        )
        for case in measured["results"]
    ]
    found = ("held out", "its difference", "curve's largest", "imbalance", "largest")
    return table(("", *(f"loss to step {step}" for step in steps), *found), rows)


def curves_of_one_file(measured):
    about, first = measured["provenance"], measured["results"][0]
    where = gpu_provenance(measured, "benchmarks/gpu/learning_curves.py") if about.get("gpu") else train_provenance(measured)
    same = measured["resumed_is_the_same"]
    resumed = f" The run that was stopped and resumed in the middle has {'the very same' if same else 'another'} curve."
    return f"{first['steps']:,} steps.{resumed if same is not None else ''}\n\n{curves_table(measured)}\n\n{where}\n"


def learning_curves(*files):
    of_gpu = files[0]["provenance"].get("gpu")
    return f"""## Learning curves on {'a GPU' if of_gpu else 'the CPU'}

`train_lm --preset tiny`, of one seed and order of the data. Losses, in nats, are means over a hundred steps; imbalance is the
fullest expert over the mean in the last step, and the largest of its means over a hundred. Differences are those from fp32 or,
where experts are balanced by biases, from that on one rank.

""" + "\n".join(map(curves_of_one_file, files))


def gates_of_one_file(measured):
    rows = []
    for case in measured["results"]:
        losses, imbalances = list(case["curve"].values()), list(case["imbalance"].values())
        loads = [load for layer in case["load"] for load in layer]
        numbers = (losses[0], losses[-1], case["validation_loss"])
        rows.append(
            (
                case["gate"],
                f"`{case['options']}`" if case["options"] else "",
                *(f"{number:.3f}" for number in numbers),
                f"{imbalances[0]:.2f}",
                f"{imbalances[-1]:.2f}",
                f"{min(loads):.2f} to {max(loads):.2f}",
            )
        )
    header = ("gate", "options", "loss, first", "last", "held out", "imbalance, first", "last", "experts' loads")
    command = measured["provenance"]["command"].split()
    picture = command[command.index("--picture") + 1]
    return f"""{table(header, rows)}

![imbalance and load of these gates](../{picture})

{train_provenance(measured)}
"""


def gates(*files):
    return f"""## Every gate of `train_lm`

`--preset tiny`, {files[0]['results'][0]['steps']:,} steps of one seed and order of the data. First and last: means over fifty
steps, losses in nats, imbalance the fullest expert over the mean; loads over the mean, of every expert in the last quarter.

""" + "\n".join(map(gates_of_one_file, files))


def decode_of_one_file(measured):
    about, cases = measured["provenance"], measured["microseconds"]
    ways = [name for name in cases[0] if name != "tokens"]
    where = about.get("device", f"{about['processor']}, {about['threads']} threads")
    places = 3 if "device" in about else 1
    rows = []
    for case in cases:
        ours = case["anabranch"]
        others = (f"{case[way] / 1e3:.{places}f} ({case[way] / ours:.2f})" if way in case else "–" for way in ways[1:])
        rows.append((str(case["tokens"]), f"{ours / 1e3:.{places}f}", *others))
    return f"""{measured['dtype']}, hidden {measured['hidden']}, expert hidden {measured['inner']}, E {measured['experts']}, k {measured['top_k']}:

{table(("tokens", *ways), rows)}

{where}, PyTorch {about['torch']}, transformers {about['transformers']}, load of the
machine before {about['load']}, commit {about['commit'][:10]}, {about['date']}: `{about['command'].split(" --json")[0]}`
"""


def decode(*files):
    place = "a GPU" if "device" in files[0]["provenance"] else "the CPU"
    return f"""## A converted block at as few tokens as a model decodes, on {place}

No gradients: ms a call beside transformers' own ways to run the same block, and theirs over ours. batched_mm copies the weights of
every assignment, and is left out where that takes more than 4 GiB.

""" + "\n".join(map(decode_of_one_file, files))


def place_of(case):
    return case["shape"], case["zipf"]


def layer_of_ranks(case):
    return case["shape"] + (f", zipf {case['zipf']:g}" if case["zipf"] else "")


SECTIONS = {
    "cpu_layer.json": layer,
    "cpu_decode*.json": decode,
    "cpu_grouped_gemm.json": grouped_gemm,
    "gpu_layer.json": gpu_layer,
    "gpu_decode*.json": decode,
    "gpu_layer_python.json": gpu_layer_python,
    "gpu_grouped_gemm.json": gpu_grouped_gemm,
    "gpu_kernels.json": gpu_kernels,
    "gpu_routing.json": gpu_routing,
    "gpu_exchange_*.json": gpu_exchange,
    "gpu_expert_parallel_*.json": gpu_expert_parallel,
    "gpu_training.json": gpu_training,
    "gpu_training_ranks.json": gpu_training_ranks,
    "gpu_balance_*.json": gpu_balance,
    "gpu_learning_curves.json": learning_curves,
    "cpu_learning_curves*.json": learning_curves,
    "cpu_gates*.json": gates,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "performance.md")
    arguments = parser.parse_args()
    parts = [
        "# Performance\n\nMeasured by the command below each table, as `launch/benchmark.sh` runs them; made by"
        " `benchmarks/report.py`\nfrom their files in `benchmarks/results/`.\n"
    ]
    for name, section in SECTIONS.items():
        files = sorted(arguments.results.glob(name))
        if files:  # not every machine has a GPU
            parts.append(section(*(json.loads(file.read_text()) for file in files)))
    arguments.output.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
