"""Every code block of the pages does what it says: Python runs, C++ compiles, commands and their options are there.

Programs of docs/habits.md are run by tests/python, README's installing lines by tests/wheel.
"""

import copy
import functools
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import textwrap
import types

import anabranch
import pytest
import torch
import torch.distributed as dist
from torch import nn

PROJECT = pathlib.Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "launch/README.md", *sorted(str(p.relative_to(PROJECT)) for p in PROJECT.glob("docs/*.md"))]
BUILD = pathlib.Path(anabranch.__file__).parents[2]
SIZES = dict(hidden_size=16, expert_hidden_size=24, num_experts=8, top_k=2)


def fenced(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (PROJECT / page).read_text(), re.DOTALL | re.MULTILINE)


def python_blocks():
    """(page, block), of one with several headings each part of its own."""
    for page in PAGES:
        for block in fenced(page, "python") if page != "docs/habits.md" else ():
            parts = re.split(r"\n\n(?=# [A-Z])", block)
            yield from ((page, part) for part in parts)


def test_no_page_has_code_that_nothing_runs():
    for page in PAGES:
        languages = set(re.findall(r"^```(\w+)", (PROJECT / page).read_text(), re.MULTILINE))
        assert languages <= {"python", "cpp", "cmake"}, page
    assert len(list(python_blocks())) >= 20


class Model(nn.Module):
    """What a block has before its first line."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(1)
        self.before = nn.Linear(16, 16)
        self.layers = nn.ModuleList(anabranch.MoE(**SIZES, seed=seed, **options) for seed in (1, 2))

    def forward(self, x):
        x = self.before(x)
        for layer in self.layers:
            x = x + layer(x).output
        return x


def small_causal_lm(kind, folder):
    """A model of transformers with random weights, also in `folder`; tokens for it."""
    import transformers

    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    config = {
        "sparse": lambda: transformers.MixtralConfig(**sizes, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
        "dense": lambda: transformers.LlamaConfig(**sizes, intermediate_size=24),
    }[kind]()
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model, torch.randint(1, 64, (2, 12))


def prepared_trainer(model, folder):
    """Arguments of a run that has a checkpoint to resume from, and its data."""
    import transformers
    from anabranch.trainer import MoECallback

    def arguments(steps):
        return transformers.TrainingArguments(
            folder, max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
        )

    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 64, (8, 12))]
    begun = transformers.Trainer(anabranch.convert(copy.deepcopy(model)), arguments(1), train_dataset=data, callbacks=[MoECallback()])
    begun.train()
    return {"arguments": arguments(2), "data": data, "trainer": begun}


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    """Blocks are of programs over ranks; this is the one of a group."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def given(block, folder):
    """Names that a block takes from the program around it."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    names = dict(anabranch=anabranch, torch=torch, nn=nn, Model=Model, device="cpu", ranks=1, replicas=1, folder=str(folder), step=1)
    names |= dict(init_device_mesh=init_device_mesh, fully_shard=fully_shard, get_state_dict=get_state_dict)
    names |= dict(DistributedDataParallel=DistributedDataParallel)
    # Which wants to be told so on a machine without a GPU.
    names |= dict(FullyShardedDataParallel=functools.partial(FullyShardedDataParallel, device_id=torch.device("cpu")))
    names |= dict(ZeroRedundancyOptimizer=ZeroRedundancyOptimizer, group=dist.group.WORLD, mesh=init_device_mesh("cpu", (1,)))
    names |= dict(task_loss=lambda y: y.square().mean(), writer=types.SimpleNamespace(add_scalar=lambda *a, **k: None))
    if re.search("transformers|from_pretrained|peft|trainer", block):
        peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
        model, tokens = small_causal_lm("dense" if "upcycle" in block else "sparse", folder)
        names |= dict(peft=peft, transformers=transformers, tokens=tokens)
        names |= prepared_trainer(model, folder / "run") if "trainer" in block else {}
        if "peft" in block or "RouterMetrics" in block:
            model = anabranch.convert(model)
            model(input_ids=tokens)
    else:
        model = Model(dtensor="dtensor=True" in block)
        x = torch.randn(6, 512 if "hidden_size=512" in block else 16)
        names |= dict(x=x, dy=torch.randn(6, 16), batch=x, layer=model.layers[0], config=megatron_config())
        names |= dict(scaler=torch.amp.GradScaler("cpu"))
        model(torch.randn(6, 16)).square().mean().backward()  # so that the optimizer has states, and metrics something to say
        anabranch.finish_gradients(model)
    experts = [p for _, p in anabranch.expert_parameters(model)]
    optimizer = torch.optim.AdamW(model.parameters())
    names |= dict(model=model, optimizer=optimizer, experts=experts)
    names |= dict(others=[p for p in model.parameters() if all(p is not expert for expert in experts)])
    if "x" in names:
        optimizer.step()
        optimizer.zero_grad()
        names |= dict(loss=model(torch.randn(6, 16)).square().mean())
    return names


def megatron_config():
    return {"hidden_size": 16, "moe_ffn_hidden_size": 24, "num_moe_experts": 8, "moe_router_topk": 2, "add_bias_linear": False}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page, block", python_blocks(), ids=lambda text: text.splitlines()[0][:60])
def test_python(page, block, tmp_path):
    exec(compile(block, page, "exec"), given(block, tmp_path))


def test_cpp(tmp_path):
    """As a source of a program that has what the block does not make."""
    commands = json.loads((BUILD / "compile_commands.json").read_text())
    entry = next(entry for entry in commands if "/quickstart.dir/" in entry["command"])
    around = "#include <torch/torch.h>\n{0}\ntorch::Tensor task_loss(const torch::Tensor&);\nvoid program(const torch::Tensor& x,"
    around += " torch::nn::Module* model, torch::optim::Optimizer& optimizer) {{\n{1}}}\n"
    for page in PAGES:
        for block in fenced(page, "cpp"):
            includes = "\n".join(re.findall(r"^#include.*", block, re.MULTILINE))
            (tmp_path / "block.cpp").write_text(around.format(includes, re.sub(r"^#include.*\n", "", block, flags=re.MULTILINE)))
            words = shlex.split(entry["command"])
            words = [str(tmp_path / "block.cpp") if word == entry["file"] else word for word in words]
            del words[words.index("-o") : words.index("-o") + 2]
            result = subprocess.run([*words, "-fsyntax-only"], cwd=entry["directory"], capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr[-3000:]


def test_cmake():
    """The lines by which tests/consumer finds the installed library, and builds with it."""
    consumer = re.sub(r"\s+", " ", (PROJECT / "tests/consumer/CMakeLists.txt").read_text())
    for page in PAGES:
        for line in "".join(fenced(page, "cmake")).splitlines():
            line = re.sub(r"target_link_libraries\(\w+", "target_link_libraries(consumer", line)
            assert line in consumer, line


# Where a program's options stand; those of others are not looked at, only whether the project's paths are there.
TRAIN = ["examples/train_lm/options.cpp", "examples/train_lm/training_options.cpp", "examples/train_lm/model/model_options.cpp", "launch/train.sh", "launch/common.sh"]
SOURCES = {
    "launch/train.sh": TRAIN,
    "launch/test.sh": ["launch/test.sh"],
    "launch/slurm/train.sbatch": [*TRAIN, "launch/slurm/train.sbatch"],
    "train_lm": TRAIN,
    "anabranch": ["python_bindings/anabranch_cli/main.py"],
    "tools/anabranch-plan": ["tools/plan/plan.py"],
    "tools/anabranch-tokenize": ["tools/tokenize/main.py"],
}
OTHERS = "sbatch srun mpirun torchrun cmake ctest pip pipx python git docker export for do done if then echo mkdir eval source "
OTHERS += "compute-sanitizer nvidia-cuda-mps-control quickstart cd set salloc sinfo scontrol squeue module ssh apptainer ulimit exec"
FOLDERS = r"(launch|tools|tests|examples|benchmarks|\.ci)/[\w./-]+$"
TAKES_ANY = {"launch/test.sh"}  # CTest's


def shell_blocks(page):
    """Indented blocks, without diagrams and what programs print."""
    text = re.sub(r"^```.*?^```", "", (PROJECT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"(?:^    (?! *[-*] ).+\n)+", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks if not re.search(r"[─►▶│┊]", block)]


@pytest.mark.parametrize("page", [page for page in PAGES if shell_blocks(page)])
def test_commands(page):
    """Of each line: bash reads it, its program is there, files of the project that it names are, and so are its options."""
    wrong = []
    for block in shell_blocks(page):
        if subprocess.run(["bash", "-n"], input=block.encode(), capture_output=True, check=False).returncode:
            wrong.append(f"bash does not read: {block}")
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = [word for word in shlex.split(line, comments=True) if not re.match(r"^[A-Za-z_]+=", word)]
            given = [word for before, word in zip(["", *words], words) if before not in ("--output", "-o")]
            missing = [word for word in given if re.match(FOLDERS, word) and not (PROJECT / word).exists()]
            wrong += [f"there is no {word}: {line}" for word in missing] + unknown(given, line)
    assert not wrong, "\n".join(wrong)


def unknown(words, line):
    """A program that nobody knows, or options that its sources do not have."""
    names = [re.sub(r"^(build/\w+/examples|\.venv/bin)/", "", word) for word in words]
    at = [place for place, name in enumerate(names) if name in SOURCES or re.match(FOLDERS, name)]
    if not at:
        known = names and (names[0].split("/")[-1] in OTHERS.split() or shutil.which(names[0]) or "/" in names[0])
        return [] if known or not names else [f"who is {names[0]}? {line}"]
    name = names[at[-1]]
    if name in TAKES_ANY:
        return []
    if not (PROJECT / name).is_file() and name not in SOURCES:
        return []
    text = "".join((PROJECT / source).read_text() for source in SOURCES.get(name, [name]))
    options = [word.split("=")[0] for word in words[at[-1] :] if re.match(r"--[a-z]", word)]
    return [f"{name} has no {option}: {line}" for option in options if option not in text and f'"{option[2:]}"' not in text]
