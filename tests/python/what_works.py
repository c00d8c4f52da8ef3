#!/usr/bin/env python3
"""Writes the table "What works with what" of docs/habits.md from what a run of the tests has found.

    PYTHONPATH=build/release/python .venv/bin/python -m pytest tests/python --junitxml=build/python.xml
    tests/python/what_works.py build/python.xml

or by several files, of a run each. What is of none of them has no row.
"""

import datetime
import importlib.metadata
import os
import pathlib
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter

TESTS = pathlib.Path(__file__).parent
PAGE = TESTS.parents[1] / "docs/habits.md"
ROWS = {
    "one process; 2 and 4 ranks of gloo": "test_groups::any_number_of_ranks",
    "MPI (mpirun), mpi4py": "test_groups::mpirun|mpi4py",
    "DistributedDataParallel": "test_gradients_wrapped::ddp",
    "FSDP2 beside experts": "test_groups::trains_as_one_process_does.fsdp2",
    "FSDP2 over experts within replicas, hybrid sharding": "test_dtensor::fsdp2_within_replicas",
    "FSDP2 with MixedPrecisionPolicy(param_dtype=bf16)": "test_dtensor::mixed_precision",
    "torch's clip_grad_norm_ under FSDP2": "test_dtensor::clipping",
    "FSDP1": "test_gradients_wrapped::fsdp1",
    "ZeRO-1: ZeroRedundancyOptimizer beside experts": "test_gradients::zero_redundancy",
    "torch.distributed.checkpoint at another number of ranks, of converted models too": "test_dtensor::distributed_checkpoint",
    "checkpoints of one's own at another number of ranks": "test_checkpoint::",
    "GradScaler": "test_gradients_scaled::",
    "torch.compile, export": "test_operators::compile|export",
    "torch.compile of DistributedDataParallel, and within it with fullgraph": "test_gradients_wrapped::inner_model_of_ddp.around|inner_model_of_ddp.within",
    "torch.compile, fullgraph, of checkpointed layers": "test_recompute::compiled_checkpoint",
    "activation checkpointing": "test_module::checkpoint|test_recompute::",
    "activation offload, hooks on saved tensors": "test_saved_tensors::",
    "evaluation and no_grad: no sums of losses over the ranks": "test_evaluation::",
    "replay of a router's choices": "test_replay::",
    "Muon over stacked experts": "test_muon::",
    "CUDA graphs": "test_cuda_graphs::",
    "transformers: families converted, or refused with the reason": "test_families::",
    "transformers: from_pretrained of a rank's share": "test_from_pretrained::",
    "transformers' Trainer: train, save, resume at another number of ranks, LoRA too": "test_trainer::ddp_with_spread_experts",
    "TRL's SFTTrainer": "test_habits::program.*trl",
    "Accelerate": "test_habits::program.*accelerate",
    "Lightning": "test_habits::program.*lightning",
    "DeepSpeed": "test_trainer::deepspeed_is_refused",
    "PEFT: LoRA on router and experts by target_parameters, checkpoints at another number of ranks": "test_adapters::",
    "PEFT: LoRA on experts as grouped GEMMs, peft's files at another number of ranks": "test_lora::",
    "torchtitan": "test_torchtitan::|test_habits::program.*torchtitan",
    "Megatron-Core": "test_megatron::|test_habits::program.*megatron",
    "configurations of Megatron-Core, MegaBlocks, torchtitan, transformers": "test_dialects::",
    "programs of this page": "test_habits::program",
}
"""What it is, and the tests of it: file, ::, a part of the name."""
REFUSED = {"DeepSpeed"}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "lightning", "torchtitan", "megatron-core")


def results(paths: list[str]) -> list[tuple[str, str]]:
    """file::test[parameters], and passed, skipped or failed."""
    found = []
    for case in (case for path in paths for case in ElementTree.parse(path).getroot().iter("testcase")):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found.append((f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}", outcome))
    return found


def provenance(paths: list[str]) -> str:
    day = datetime.date.fromtimestamp(max(os.path.getmtime(path) for path in paths))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"{day}, {os.cpu_count()} CPU cores, tests of GPUs skipped where there is none; {versions}."


def path_of(test: str) -> str:
    (path,) = TESTS.glob(f"*/{test}.py")
    return str(path.relative_to(TESTS.parents[1]))


def row(what: str, pattern: str, found: list[tuple[str, str]]) -> str:
    asked = [part if "::" in part else f"{pattern.split('::')[0]}::{part}" for part in pattern.split("|")]
    matches = [re.compile("{}::test_.*{}".format(*each.split("::"))) for each in asked]
    of_row = Counter(outcome for name, outcome in found if any(match.match(name) for match in matches))
    if not of_row:
        raise SystemExit(f"no test matches {pattern}: {what}")
    answer = "no" if of_row["failed"] else "not run" if not of_row["passed"] else "refused" if what in REFUSED else "yes"
    counts = ", ".join(f"{of_row[kind]} {kind}" for kind in ("passed", "skipped", "failed") if of_row[kind])
    files = ", ".join(dict.fromkeys(f"`{path_of(each.split('::')[0])}`" for each in asked))
    return f"| {what} | {answer} | {counts} | {files} |"


def main() -> None:
    found = results(sys.argv[1:])
    files = {name.split("::")[0] for name, _ in found}
    rows = [row(*each, found) for each in ROWS.items() if each[1].split("::")[0] in files]
    table = [provenance(sys.argv[1:]), "", "| | works | tests | where |", "|---|---|---|---|", *rows]
    begin, end = "<!-- what works: begin -->\n", "<!-- what works: end -->"
    text = PAGE.read_text()
    before, after = text.split(begin)[0], text.split(end)[1]
    PAGE.write_text(before + begin + "\n".join(table) + "\n" + end + after)


if __name__ == "__main__":
    main()
