"""The Python examples, as people start them: alone, under torchrun and mpirun, and beside the C++ program."""

import json
import math
import os
import pathlib
import random
import sys

import anabranch
import pytest
import torch
import transformers
from anabranch.features import transports
from jobs import ALONE, MPIRUN, TORCHRUN, run_job
from tokenizers import Tokenizer, models, pre_tokenizers

PROJECT = pathlib.Path(__file__).parents[3]
TRAIN_LM_CPP = pathlib.Path(anabranch.__file__).parents[2] / "examples" / "train_lm"
SMALL = (
    "--steps 5 --hidden 16 --expert-hidden 24 --layers 2 --experts 5 --batch-size 3 --sequence-length 24 --warmup 2 "
    "--log-interval 2 --validation-interval 3 --validation-sequences 7"
).split()
CHANGING = {"seconds", "tokens_per_second", "model_tflops", "step_seconds", "data_seconds", "memory"}
NOISY = "--gate noisy_top_k --importance-loss 0.1 --load-loss 0.1 --jitter 0.1 --sequence-balance-loss 0.01".split()
CHOSEN = "--gate expert_choice --renormalize no --global-balance-loss 0.1 --micro-batch 2 --dtype float64".split()
QUANTILE = "--router-score sigmoid --bias-rate 0.5 --bias-update quantile --dtype float64".split()
NOT_COMPARED = {"balance_loss": 0, "z_loss": 0}
COUNTED = {"ranks", "load", "imbalance", "imbalance_per_layer"}


def train(launcher, folder, *options, data=PROJECT / "README.md"):
    """The lines of metrics.jsonl."""
    program = [*launcher, PROJECT / "examples/train_lm.py", "--data", data, "--output", folder, "--json"]
    said = run_job(*program, *SMALL, *options)
    lines = metrics_of(folder)
    assert [json.loads(line) for line in said.splitlines() if line.startswith("{")] == lines[-1:]
    return lines


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(actual, expected, ranks):
    """Up to rounding: five steps of a small model, in fp32 about 1e-6 of each number; Adam divides by gradients'
    roots, which magnifies it."""
    assert [line["step"] for line in actual] == [2, 3, 4, 5]
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - CHANGING - COUNTED - {"rank_milliseconds"}:
            assert mine[name] == pytest.approx(theirs[name], rel=2e-4), name
        torch.testing.assert_close(torch.tensor(mine["load"]), torch.tensor(theirs["load"]), rtol=0, atol=0.02)
        assert mine["ranks"] == ranks and all(mine[name] > 0 for name in CHANGING)
        assert len(mine["rank_milliseconds"]) == ranks and min(mine["rank_milliseconds"]) > 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(ALONE, folder)


def test_metrics(alone):
    folder, lines = alone
    assert ["validation_bpb" in line for line in lines] == [False, True, False, True]
    assert lines[-1]["loss"] < lines[0]["loss"] < 1.2 * math.log(256)
    assert all(sum(layer) == pytest.approx(1) for line in lines for layer in line["load"])
    assert list(folder.glob("events.out.tfevents.*"))
    run_job(sys.executable, PROJECT / "launch/plot.py", folder)
    assert (folder / "loss.png").stat().st_size and (folder / "load.png").stat().st_size


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_two_ranks_train_as_one(launcher, alone, tmp_path):
    if launcher == "mpirun" and "mpi" not in transports():
        pytest.skip("anabranch was built without MPI")
    assert_same_training(train(TORCHRUN if launcher == "torchrun" else MPIRUN, tmp_path), alone[1], ranks=2)


@pytest.mark.skipif(not TRAIN_LM_CPP.exists(), reason="examples/train_lm is not built")
@pytest.mark.parametrize(
    "options",
    [[], [*NOISY, "--glu", "--dtype", "float64"], CHOSEN, QUANTILE],
    ids=["gelu", "noisy swiglu in fp64", "expert choice", "biases by quantile"],
)
def test_it_is_the_twin_of_the_cpp_program(options, tmp_path):
    # Random bytes: in a row of equal ones tokens are alike but for rounding, and experts that choose tell them apart by it.
    data = "synthetic:256" if options == CHOSEN else PROJECT / "README.md"
    run_job(TRAIN_LM_CPP, "--data", data, "--output", tmp_path / "cpp", "--sample-length", 0, *SMALL, *options)
    assert_same_training(train(ALONE, tmp_path / "python", *options, data=data), metrics_of(tmp_path / "cpp"), ranks=1)


@pytest.mark.skipif(not TRAIN_LM_CPP.exists(), reason="examples/train_lm is not built")
@pytest.mark.parametrize("kind", ["megatron", "llm.c", "synthetic"])
def test_it_reads_what_the_cpp_program_reads(kind, tmp_path):
    """The files for several epochs."""
    data = "synthetic:100"
    if kind != "synthetic":
        words = "the river carries what rain has given to it".split()
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "</s>"])}, unk_token="it"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        chance = random.Random(os.environ.get("ANABRANCH_TEST_SEED", "1"))
        texts = [" ".join(chance.choices(words, k=30)) for _ in range(40)]
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        data = tmp_path / "tokens"
        tokenize = [PROJECT / "tools/anabranch-tokenize", tmp_path / "text.jsonl", "--output", data, "--format", kind]
        run_job(*tokenize, "--tokenizer", tmp_path / "tokenizer.json", "--shard-tokens", 700)
    longer = " ".join(SMALL).replace("--steps 5", "--steps 40").replace("--log-interval 2", "--log-interval 1")
    options = ["--data", data, *longer.split(), "--dtype", "float64"]
    run_job(TRAIN_LM_CPP, "--output", tmp_path / "cpp", "--sample-length", 0, *options)
    run_job(*ALONE, PROJECT / "examples/train_lm.py", "--output", tmp_path / "python", *options)
    mine, theirs = metrics_of(tmp_path / "python"), metrics_of(tmp_path / "cpp")
    for name in ("loss", "validation_loss", "validation_bpb"):
        expected = [line.get(name) for line in theirs]
        assert [line.get(name) for line in mine] == pytest.approx(expected, rel=1e-6), name
    assert len(mine) == 40 and ("validation_bpb" in mine[-1]) == (kind != "synthetic")


def test_its_dense_part_compiled(alone, tmp_path):
    assert_same_training(train(ALONE, tmp_path, "--compile", "aot_eager"), alone[1], ranks=1)


def test_micro_batches_are_a_batch(tmp_path):
    # Without auxiliary losses, which each has of its own tokens.
    plain = ["--balance-loss", "0", "--z-loss", "0"]
    whole, pieces = (train(ALONE, tmp_path / n, *plain, "--micro-batch", n) for n in ("3", "1"))
    assert_same_training([line | NOT_COMPARED for line in pieces], [line | NOT_COMPARED for line in whole], ranks=1)


TINY = "--preset tiny --layers 2 --hidden 32 --expert-hidden 16 --heads 2 --head-size 16 --kv-heads 1".split()


def test_a_preset_in_bf16_follows_fp32(tmp_path):
    lines = {dtype: train(ALONE, tmp_path / dtype, *TINY, "--dtype", dtype) for dtype in ("float32", "bfloat16")}
    lines["sharded"] = train(TORCHRUN, tmp_path / "sharded", *TINY, "--dtype", "bfloat16", "--micro-batch", "1", "--fsdp")
    for narrow, sharded, wide in zip(lines["bfloat16"], lines["sharded"], lines["float32"], strict=True):
        # A logit has 8 bits, a sum of thousands of tokens' losses more.
        assert narrow["loss"] == pytest.approx(wide["loss"], rel=2**-8)
        assert sharded["loss"] == pytest.approx(wide["loss"], rel=2**-8)
    assert lines["bfloat16"][-1]["loss"] < lines["bfloat16"][0]["loss"]


def knows_presets():
    return TRAIN_LM_CPP.exists() and "--preset" in run_job(TRAIN_LM_CPP, "--help")


@pytest.mark.skipif(not TRAIN_LM_CPP.exists(), reason="examples/train_lm is not built")
def test_it_has_the_presets_of_the_cpp_program(tmp_path):
    if not knows_presets():
        pytest.skip("train_lm has no presets")
    latent = "--kv-heads 0 --qk-norm none --kv-rank 10 --query-rank 9 --rope-size 6 --value-size 5 --dtype float64 --yarn-factor 4 --yarn-positions 40 --yarn-mscale-all 0.7".split()
    options = [*without(TINY, latent), *latent]
    run_job(TRAIN_LM_CPP, "--data", PROJECT / "README.md", "--output", tmp_path / "cpp", "--sample-length", 0, *without(SMALL, options), *options)
    assert_same_training(train(ALONE, tmp_path / "python", *options), metrics_of(tmp_path / "cpp"), 1)


def without(options, others):
    """Pairs of a name and a value, but for those whose names are among `others`."""
    return [part for name, value in zip(options[::2], options[1::2]) if name not in others for part in (name, value)]


def test_what_cannot_be_trained_on(tmp_path):
    (tmp_path / "short").write_text("In the beginning")
    said = run_job(*ALONE, PROJECT / "examples/train_lm.py", "--data", tmp_path / "short", "--output", tmp_path, expect=1)
    assert "has 16 bytes, too few" in said


def test_a_model_of_transformers_on_two_ranks(tmp_path):
    options = "--steps 4 --batch-size 3 --sequence-length 24 --validation-sequences 4".split()
    said = run_job(
        *TORCHRUN, PROJECT / "examples/finetune_hf.py", "--data", PROJECT / "README.md", "--output", tmp_path, *options
    )
    after = float(said.split("after 4 steps: ")[1].split()[0])
    assert after < math.log(256)
    # Plain transformers goes on from there.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    text = (PROJECT / "README.md").read_bytes()
    held_out = torch.tensor(list(text[-(len(text) // 20) :]))
    offsets = torch.arange(4) * (len(held_out) - 25) // 3
    windows = held_out[offsets[:, None] + torch.arange(25)]
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    assert loss == pytest.approx(after, abs=2e-3)  # printed with three digits
