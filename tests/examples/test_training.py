"""Training with train_lm beyond its default: presets, bf16, recomputation, micro-batches, steps that are skipped.

The program and what it needs: see test_train_lm.py.
"""

import json
import random
import re
import shutil

import pytest
from safetensors import safe_open
from test_train_lm import (
    STEPS,
    assert_same_curve,
    gpus,
    model_options,
    read_metrics,
    run,
    text,  # noqa: F401 a fixture
    tolerance,
    train,  # noqa: F401 a fixture
    without_timing,
)

# All that a model may have, in few numbers.
TINY = {
    "preset": "tiny",
    "hidden": 16,
    "head_size": 8,
    "expert_hidden": 12,
    "shared_expert_hidden": 6,
    "dense_hidden": 20,
    "layers": 3,
    "sample_length": 0,
}


@pytest.fixture(scope="session")
def tiny_run(train):  # noqa: F811
    """On one rank, without mpirun."""
    directory = train(0, "--no-save", **TINY)
    assert not (directory / "checkpoint").exists()
    return read_metrics(directory)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_preset_trains_the_same_at_any_number_of_ranks(train, tiny_run, ranks):  # noqa: F811
    assert_same_curve(read_metrics(train(ranks, **TINY)), tiny_run, tolerance("float64", 6))


LENT = {"balance": "replicas", "receive_rows_limit": 50}


@pytest.mark.parametrize(("ranks", "changes"), [(3, LENT), (2, LENT | {"balance": "gather", "recompute": "block"})])
def test_gates_that_collapse_train_the_same_whatever_travels(train, ranks, changes):  # noqa: F811
    options = TINY | {"top_k": 1, "balance_loss": -30, "learning_rate": 0.1}
    alone = read_metrics(train(0, "--no-save", **options))
    assert max(map(max, alone[-1]["load"])) > 0.95 and max(map(max, alone[0]["load"])) < 0.5
    assert_same_curve(read_metrics(train(ranks, "--no-save", **options | changes)), alone, tolerance("float64", 6))


@pytest.mark.parametrize("ranks", [0, 2])
def test_stage_times_tell_what_each_layer_waits_for(text, tmp_path, ranks):  # noqa: F811
    options = [*model_options(**TINY, steps=8, validation_interval=8), "--no-save", "--stage-times"]
    output = run(ranks, "--output", tmp_path / "run", "--data", text, *options)
    assert "ms of a step (mean of" in output
    waits = re.search(r"rows are waited for, layer by layer:((?: \d+\.\d\d)*)$", output, re.MULTILINE)
    assert (waits is not None) == (ranks > 1)
    assert ranks == 0 or (len(waits[1].split()) == 2 and sum(map(float, waits[1].split())) > 0)  # one layer is dense


@pytest.mark.parametrize(("recompute", "ranks"), [("experts", 0), ("block", 2)])
def test_recomputation_changes_nothing(train, tiny_run, recompute, ranks):  # noqa: F811
    metrics = read_metrics(train(ranks, recompute=recompute, **TINY))
    assert_same_curve(metrics, tiny_run, tolerance("float64", 6))


@pytest.mark.parametrize(("ranks", "size"), [(0, 1), (0, 4), (2, 2)])
def test_micro_batches_have_the_gradient_of_the_batch(train, ranks, size):  # noqa: F811
    # Without auxiliary losses, which each micro-batch has of its own tokens.
    options = TINY | {"balance_loss": 0, "z_loss": 0}
    metrics = read_metrics(train(ranks, micro_batch=size, **options))
    expected = read_metrics(train(0, **options))
    for line in metrics + expected:
        del line["balance_loss"], line["z_loss"]
    assert_same_curve(metrics, expected, tolerance("float64", 6))


MOONLIGHT = {"preset": "moonlight-16b-a3b", "vocabulary": 256, "kv_rank": 10, "rope_size": 6, "value_size": 5, "experts": 6, "top_k": 2}
EXPERT_CHOICE = {"gate": "expert_choice", "renormalize": "no", "global_balance_loss": 0.1}
OTHERS = [
    {"tied_head": "true", "qk_norm": "all"},
    {"router_score": "sigmoid", "bias_rate": 0.01},
    {"router_score": "sigmoid", "bias_rate": 0.5, "bias_update": "quantile"},
    EXPERT_CHOICE,
    MOONLIGHT | {"query_rank": 9, "router_score": "sqrt_softplus", "expert_groups": 3, "top_groups": 2},
]


@pytest.fixture(scope="session")
def text_of_many_bytes(tmp_path_factory):
    """Words of 200 different bytes. First tokens of sequences that are the same byte have the same scores but for
    rounding, and an expert that must leave one of them could choose either."""
    generator = random.Random(20261201)
    words = [bytes(generator.choices(range(200), k=generator.randint(2, 7))) for _ in range(60)]
    file = tmp_path_factory.mktemp("text") / "bytes"
    file.write_bytes(b"".join(generator.choices(words, k=3000)))
    return file


@pytest.mark.parametrize("changes", OTHERS)
def test_other_models_train_the_same_at_two_ranks(train, text_of_many_bytes, changes):  # noqa: F811
    options = TINY | changes
    if changes is EXPERT_CHOICE:
        options["data"] = text_of_many_bytes
    flags = [f"--{name.replace('_', '-')}" for name, value in options.items() if value == "true"]
    options = {name: value for name, value in options.items() if value != "true"}
    alone = read_metrics(train(0, *flags, **options))
    assert_same_curve(read_metrics(train(2, *flags, **options)), alone, tolerance("float64", 6))
    assert alone[-1]["loss"] < alone[0]["loss"]


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_a_bf16_curve_is_near_that_of_fp32(train, state):  # noqa: F811
    options = TINY | {"steps": 20, "layers": 2, "validation_interval": 20}
    exact = read_metrics(train(0, **options | {"dtype": "float32"}))
    rounded = read_metrics(train(2, **options | {"dtype": "bfloat16", "optimizer_state": state}))
    # A loss is a mean over tokens of what has passed through roundings of 2⁻⁸ each.
    for line, other in zip(rounded, exact, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2**-8)
    assert exact[-1]["loss"] < exact[0]["loss"] - 0.1


@pytest.mark.parametrize("changes", [{"qk_norm": norm} for norm in ("none", "head", "all")] + [{"head_size": 128}])
def test_the_kernels_of_a_gpu_train_as_the_cpu_does(train, changes):  # noqa: F811
    if gpus() < 1:
        pytest.skip("no GPU, or a build without NCCL")
    options = TINY | {"head_size": 64, "vocabulary": 260, "dtype": "bfloat16", "steps": 20, "validation_interval": 20}
    expected = read_metrics(train(0, **options | changes))
    metrics = read_metrics(train(0, device="cuda", **options | changes))
    for line, other in zip(metrics, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2**-8)
        assert line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=2**-4)


def test_a_bf16_run_resumes_exactly_with_its_optimizer_sharded_or_not(train, text, tmp_path):  # noqa: F811
    options = TINY | {"dtype": "bfloat16", "optimizer_state": "bfloat16"}
    whole = train(2, **options)
    half = train(2, "--shard-optimizer", stop_at=STEPS // 2 - 1, **options)
    directory = tmp_path / "run"
    shutil.copytree(half, directory)
    begin = ["--data", text, "--output", directory, *model_options(**options), "--resume"]
    run(2, *begin, "--stop-at", STEPS // 2 + 1)
    run(2, *begin, "--shard-optimizer")
    assert without_timing(read_metrics(directory)) == without_timing(read_metrics(whole))


def test_muon_learns_and_trains_the_same_at_any_number_of_ranks(train):  # noqa: F811
    options = TINY | {"optimizer": "muon"}
    alone = read_metrics(train(0, **options))
    assert alone[-1]["loss"] < alone[0]["loss"] - 0.1
    # An orthogonalized matrix is up to 3.4445⁵ < 500 times as sensitive as the matrix.
    assert_same_curve(read_metrics(train(4, **options)), alone, 500 * tolerance("float64", 6))


NOISY = {"gate": "noisy_top_k", "importance_loss": 0.1, "load_loss": 0.1, "jitter": 0.1, "micro_batch": 2}


@pytest.mark.parametrize(("ranks", "gate"), [(2, NOISY), (0, {"gate": "gshard"})], ids=["noisy_top_k", "gshard"])
def test_routers_that_draw_are_the_same_in_a_resumed_run(train, text, tmp_path, ranks, gate):  # noqa: F811
    options = TINY | gate
    whole = without_timing(read_metrics(train(ranks, **options)))
    directory = tmp_path / "run"
    shutil.copytree(train(ranks, stop_at=STEPS // 2 - 1, **options), directory)
    resume = ["--data", text, "--output", directory, "--resume"]
    run(ranks, *resume, *model_options(**options))
    assert without_timing(read_metrics(directory)) == whole
    output = run(0, *resume, *model_options(**TINY), expect=2)
    assert f'another model: --gate "{gate["gate"]}" (now null)' in output


def test_a_block_that_is_computed_again_draws_the_same(train, tiny_run):  # noqa: F811
    plain = read_metrics(train(2, **TINY | NOISY))
    metrics = read_metrics(train(2, recompute="block", **TINY | NOISY))
    assert_same_curve(metrics, plain, tolerance("float64", 6))
    # Without noise the first step would be top_k's: the weights of the noise are zeros at first.
    assert plain[0]["loss"] != pytest.approx(tiny_run[0]["loss"], rel=1e-6)


def test_a_steps_balance_counts_blocks_that_are_computed_again_once(train):  # noqa: F811
    options = TINY | {"micro_batch": 2, "global_balance_loss": 1.0, "router_score": "sigmoid", "bias_rate": 1, "bias_update": "quantile"}
    plain = read_metrics(train(2, expert_parallel=1, **options))
    metrics = read_metrics(train(2, expert_parallel=1, recompute="block", **options))
    assert_same_curve(metrics, plain, tolerance("float64", 6))
    assert plain[-1]["loss"] != pytest.approx(read_metrics(train(2, **options))[-1]["loss"], rel=1e-6)


def stored_step(checkpoint):
    index = json.loads((checkpoint / "checkpoint.index.json").read_text())
    return int(index["metadata"]["step"])


@pytest.mark.parametrize("ranks", [0, 2])
def test_three_steps_without_a_finite_gradient_end_the_run(train, text, tmp_path, ranks):  # noqa: F811
    # A step this large leaves parameters whose products are not finite.
    options = TINY | {"dtype": "float32", "steps": 50, "learning_rate": 1e37, "warmup": 0, "validation_interval": 50}
    directory = tmp_path / "run"
    output = run(ranks, "--data", text, "--output", directory, *model_options(**options), expect=1)
    assert "gradients are not finite" in output
    metrics = read_metrics(directory)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert [line["skipped"] for line in metrics] == [0, 1, 1, 1]
    assert stored_step(directory / "checkpoint") == 1
    for file in (directory / "checkpoint").glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            assert all(int(tensors.get_tensor(name)) == 1 for name in tensors.keys() if ".step." in name)  # noqa: SIM118


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--preset", "gpt-2"], "--preset"),
        (["--kv-heads", "3"], "--heads 2 is not divisible by --kv-heads 3"),
        (["--dense-layers", "2"], "--dense-layers 2 leaves none of --layers 2 to the experts"),
        (["--vocabulary", "7"], "--data has a vocabulary of 256, the model one of 7 (--vocabulary)"),
        (["--recompute", "all"], "--recompute"),
        (["--gate", "hash"], "--gate"),
        (["--gate", "gshard", "--top-k", "3"], "gate gshard with top_k = 3"),
        (["--load-loss", "0.1"], "--importance-loss and --load-loss are of --gate noisy_top_k"),
        (["--expert-groups", "3"], "groups"),
        (["--yarn-factor", "8"], "--yarn-positions must be at least 1, got 0"),
        (["--kv-rank", "8"], "--rope-size must be at least 2, got 0"),
        (["--value-size", "8"], "are of attention with --kv-rank"),
    ],
)
def test_wrong_models_are_refused(text, tmp_path, wrong, message):  # noqa: F811
    output = run(0, "--data", text, "--output", tmp_path / "run", *model_options(), *wrong, expect=2)
    assert message in output
