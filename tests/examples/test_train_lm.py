"""examples/train_lm and examples/quickstart, run as people run them: real processes, small models.

Where the programs are: ANABRANCH_EXAMPLES, a folder (default: build/release/examples).
"""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "benchmarks/ranks")]
from kills import children_of, run_with_kills  # noqa: E402
from metrics_fields import without_the_machine  # noqa: E402

PROGRAMS = Path(os.environ.get("ANABRANCH_EXAMPLES", ROOT / "build/release/examples"))
TRAIN_LM = PROGRAMS / "train_lm"
QUICKSTART = PROGRAMS / "quickstart"

STEPS = 6
SEQUENCE_LENGTH = 24
LAYERS = 2
EXPERTS = 5  # divided by neither 2 nor 4

# More ranks than cores: who waits makes way.
ENVIRONMENT = dict(
    # Several ranks on one GPU.
    {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "8"} | os.environ,
    OMP_NUM_THREADS="1",
    OMPI_ALLOW_RUN_AS_ROOT="1",
    OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
    OMPI_MCA_mpi_yield_when_idle="1",
    OMPI_MCA_btl_vader_single_copy_mechanism="none",
    OMPI_MCA_ess_singleton_isolated="1",  # without mpirun, no daemon for what is not launched
)


def command(ranks, *arguments, program=TRAIN_LM):
    launcher = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none"]
    return [*(launcher if ranks else []), str(program), *map(str, arguments)]


def run(ranks, *arguments, program=TRAIN_LM, expect=0, timeout=60):
    """Runs the program (0 ranks: without mpirun) and returns its output, both streams in one."""
    result = subprocess.run(
        command(ranks, *arguments, program=program),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )
    assert result.returncode == expect, result.stdout
    return result.stdout


def model_options(**changes):
    """A tiny model and a short run, as options; `changes` name others, with _ for -."""
    options = {
        "hidden": 16,
        "expert-hidden": 24,
        "layers": LAYERS,
        "heads": 2,
        "experts": EXPERTS,
        "dtype": "float64",
        "steps": STEPS,
        "batch-size": 6,
        "sequence-length": SEQUENCE_LENGTH,
        "warmup": 2,
        "validation-sequences": 7,
        "validation-interval": 3,
        "log-interval": 1,
        "sample-length": 12,
        "deadline": 30,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_timing(metrics):
    return list(map(without_the_machine, metrics))


def tolerance(dtype, batch_size):
    """Relative, of a curve: every step adds the rounding of sums over the batch's tokens, taken in
    another order. Such errors go a random walk as long as the sum."""
    epsilon = {"float64": 2.0**-52, "float32": 2.0**-23}[dtype]
    return STEPS * math.sqrt(batch_size * SEQUENCE_LENGTH) * epsilon


def assert_same_curve(metrics, expected, relative):
    assert [line["step"] for line in metrics] == [line["step"] for line in expected]
    for line, other in zip(metrics, expected, strict=True):
        for name in ("loss", "gradient_norm", "balance_loss", "z_loss", "validation_loss", "validation_bpb"):
            assert line.get(name) == pytest.approx(other.get(name), rel=relative), (name, line)
        assert line["gradient_norms"] == pytest.approx(other["gradient_norms"], rel=relative)
        assert line["load"] == other["load"]
        assert line["learning_rate"] == other["learning_rate"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Words of a made-up language: real enough to be learnt from."""
    generator = random.Random(20240521)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 7))) for _ in range(60)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(generator.choices(words, k=3000)))
    return file


@pytest.fixture(scope="session")
def train(text, tmp_path_factory):
    """Trains with `model_options(**changes)` and returns the run's directory, to be copied before it is changed:
    the same run is made once."""
    made = {}

    def run_once(ranks, *arguments, data=text, **changes):
        options = ["--data", str(data), *map(str, model_options(**changes)), *arguments]
        key = (ranks, *options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            run(ranks, "--output", made[key], *options)
        return made[key]

    return run_once


@pytest.fixture(scope="session")
def whole_run(train):
    """The default tiny run on two ranks, uninterrupted."""
    return train(2)


@pytest.fixture(scope="session")
def half_run(train):
    """The same, stopped in the middle; to be copied before it is resumed. A thread has written what is saved."""
    return train(2, "--async-save", stop_at=STEPS // 2, checkpoint_interval=1)


def test_a_run_leaves_what_it_promises(whole_run):
    metrics = read_metrics(whole_run)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    for line in metrics:
        assert line["ranks"] == 2
        assert line["tokens_per_second"] > 0
        assert len(line["load"]) == LAYERS
        assert all(sum(load) == pytest.approx(1) for load in line["load"])
        assert line["imbalance_per_layer"] == pytest.approx([max(load) * EXPERTS for load in line["load"]])
        assert line["imbalance"] == pytest.approx(sum(line["imbalance_per_layer"]) / LAYERS)
        assert ("validation_bpb" in line) == (line["step"] % 3 == 0)
        assert line["skipped"] == 0 and line["spikes"] == []
        assert set(line["gradient_norms"]) == {"embedding", "attention", "experts", "router", "norms", "head"}
        squares = sum(norm**2 for norm in line["gradient_norms"].values())
        assert squares == pytest.approx(line["gradient_norm"] ** 2, rel=1e-12)
        assert 0 < line["data_seconds"] < line["step_seconds"] < line["seconds"]
        assert 0 < line["exposed_communication_seconds"] < line["step_seconds"]
        assert len(line["rank_milliseconds"]) == 2 and min(line["rank_milliseconds"]) > 0
        assert line["memory"] > 1 << 20
        # 16 wide: per layer attention, router, two of five experts of two matrices; the head. 24 positions.
        weights = LAYERS * (4 * 16 * 16 + EXPERTS * 16 + 2 * 2 * 16 * 24) + 256 * 16
        flops = 6 * (weights + LAYERS * 16 * SEQUENCE_LENGTH)
        assert line["model_tflops"] == pytest.approx(line["tokens_per_second"] * flops / 2 / 1e12)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert (whole_run / "sample.txt").read_bytes().startswith(b"In the beginning ")
    assert len((whole_run / "sample.txt").read_bytes()) == len("In the beginning \n") + 12
    files = list((whole_run / "checkpoint").glob("*.safetensors"))
    names = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    assert any("head" in name for name in names)


@pytest.mark.parametrize(("dtype", "batch_size"), [("float64", 6), ("float64", 3), ("float32", 6)])
def test_the_curve_is_the_same_at_any_number_of_ranks(train, dtype, batch_size):
    # Of 3 sequences on 4 ranks, the last rank holds none.
    options = {"dtype": dtype, "batch_size": batch_size}
    alone = read_metrics(train(0, **options))
    for ranks in (2, 4):
        metrics = read_metrics(train(ranks, **options))
        assert all(line["ranks"] == ranks for line in metrics)
        assert_same_curve(metrics, alone, tolerance(dtype, batch_size))


@pytest.mark.parametrize("size", [1, 2])  # 4 is the group of all ranks
def test_expert_parallel_groups_inside_data_parallel_train_the_same(train, size):
    # Without auxiliary losses, which each group has of its own tokens.
    options = {"balance_loss": 0, "z_loss": 0, "sample_length": 0}
    alone = read_metrics(train(0, **options))
    grouped = read_metrics(train(4, expert_parallel=size, **options))
    for line in grouped + alone:
        del line["balance_loss"], line["z_loss"]
    assert_same_curve(grouped, alone, tolerance("float64", 6))


def test_a_run_whose_experts_move_trains_the_same_and_resumes(train, text, tmp_path):
    options = {"balance_loss": 0, "z_loss": 0, "sample_length": 0}
    alone = read_metrics(train(0, **options))
    arguments = ["--data", text, "--output", tmp_path / "run", *model_options(**options), "--move-experts", 1]
    run(4, *arguments, "--expert-parallel", 2, "--shard-optimizer", "--stop-at", 3)
    run(2, *arguments, "--resume")
    metrics = read_metrics(tmp_path / "run")
    last = metrics[-1]
    assert all(last[name] > 0 for name in ("moved_experts", "moved_bytes", "moving_seconds"))
    assert last["fullest_rank_before"] > last["fullest_rank_after"] >= 1
    for line in metrics + alone:
        del line["balance_loss"], line["z_loss"]
    assert_same_curve(metrics, alone, tolerance("float64", 6))


def test_recompute_and_glu_train_the_same_at_two_ranks(train):
    plain = read_metrics(train(0, "--glu", sample_length=0))
    assert_same_curve(
        read_metrics(train(2, "--glu", "--recompute", sample_length=0)),
        plain,
        tolerance("float64", 6),
    )


def test_random_tokens_are_the_same_at_any_number_of_ranks(train):
    options = {"data": "synthetic:100", "sample_length": 0}
    alone = read_metrics(train(0, **options))
    assert_same_curve(read_metrics(train(4, **options)), alone, tolerance("float64", 6))
    # Of a token nobody knows how many bytes it is.
    assert ["validation_loss" in line for line in alone] == [False, False, True] * 2
    assert not any("validation_bpb" in line for line in alone)


@pytest.fixture(scope="session")
def token_file(tmp_path_factory):
    """llm.c's, smaller than what a run reads: its header, then tokens of 16 bits."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    tokens = random.Random(20240520).choices(range(7), k=25 * 40)
    file.write_bytes(struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens))
    return file


def test_token_files_resume_at_another_number_of_ranks(token_file, train, tmp_path):
    options = {"data": token_file, "sample_length": 0}
    whole = read_metrics(train(0, **options))
    half = train(2, stop_at=STEPS // 2, **options)
    resumed = read_metrics(resume_copy(half, token_file, tmp_path / "run", 4))
    assert_same_curve(resumed, whole, tolerance("float64", 6))


def scalars_of(directory):
    """{name: {step: value}}, as TensorBoard itself reads them."""
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    names = accumulator.Tags()["scalars"]
    return {name: {event.step: event.value for event in accumulator.Scalars(name)} for name in names}


def test_tensorboard_reads_what_the_metrics_say(half_run, text, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(half_run, directory)
    # What a run wrote after its checkpoint and before it died is void.
    run(2, "--data", text, "--output", directory, *model_options(stop_at=STEPS - 1), "--resume")
    resume_from_before(half_run, directory)
    time.sleep(1.1)  # TensorBoard orders files by their names, which have seconds
    run(2, "--data", text, "--output", directory, *model_options(learning_rate=0.1), "--resume")
    metrics, scalars = read_metrics(directory), scalars_of(directory)
    for name in ("loss", "tokens_per_second", "memory", "imbalance", "validation_bpb", "learning_rate"):
        expected = {line["step"]: line[name] for line in metrics if name in line}
        assert scalars[name] == pytest.approx(expected, rel=1e-6), name
    for line in metrics:
        for part, norm in line["gradient_norms"].items():
            assert scalars[f"gradient_norms/{part}"][line["step"]] == pytest.approx(norm, rel=1e-6)
        for layer, imbalance in enumerate(line["imbalance_per_layer"]):
            assert scalars[f"imbalance_per_layer/{layer}"][line["step"]] == pytest.approx(imbalance, rel=1e-6)
    assert not {"step", "load", "load/0", "spikes", "spikes/0"} & scalars.keys()


def resume_from_before(half_run, directory):
    """The checkpoint of half of the run, again."""
    shutil.rmtree(directory / "checkpoint")
    shutil.copytree(half_run / "checkpoint", directory / "checkpoint")


def resume_copy(half_run, text, directory, ranks):
    shutil.copytree(half_run, directory)
    run(ranks, "--data", text, "--output", directory, *model_options(), "--resume")
    return directory


def gpus():
    """How many ranks can have a GPU here: any number, where NCCL lets several have the same."""
    info = PROGRAMS / "info"
    text = subprocess.run([info], capture_output=True, text=True, check=False).stdout
    found = re.search(r"^GPUs: (\d+)", text, re.M)
    if not found or "NCCL 2" not in text:
        return 0
    return math.inf if "several ranks on one GPU" in text else int(found[1])


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_first_steps_on_gpus_are_those_on_the_cpu(train, ranks):
    if gpus() < ranks:
        pytest.skip(f"no GPU, or too few for {ranks} ranks, or a build without NCCL")
    changes = {"dtype": "float32", "batch_size": 8}
    expected = read_metrics(train(1, **changes))
    metrics = read_metrics(train(ranks, device="cuda", **changes))
    assert_same_curve(metrics, expected, tolerance("float32", 8))


def test_resume_continues_the_very_same_curve(half_run, whole_run, text, tmp_path):
    resumed = resume_copy(half_run, text, tmp_path / "run", 2)
    expected = without_timing(read_metrics(whole_run))
    assert without_timing(read_metrics(half_run)) == expected[: STEPS // 2]
    assert without_timing(read_metrics(resumed)) == expected
    assert (resumed / "sample.txt").read_bytes() == (whole_run / "sample.txt").read_bytes()


@pytest.mark.parametrize("ranks", [1, 4])
def test_resume_at_another_number_of_ranks(half_run, whole_run, text, tmp_path, ranks):
    metrics = read_metrics(resume_copy(half_run, text, tmp_path / "run", ranks))
    assert [line["ranks"] for line in metrics] == [2, 2, 2, ranks, ranks, ranks]
    assert_same_curve(metrics, read_metrics(whole_run), tolerance("float64", 6))


def test_resume_drops_lines_after_the_checkpoint(half_run, whole_run, text, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(half_run, directory)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')
    run(2, "--data", text, "--output", directory, *model_options(), "--resume")
    assert without_timing(read_metrics(directory)) == without_timing(read_metrics(whole_run))


def test_resume_refuses_another_model(half_run, text, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(half_run, directory)
    before = (directory / "metrics.jsonl").read_bytes()
    output = run(2, "--data", text, "--output", directory, *model_options(hidden=32), "--resume", expect=2)
    assert "another model: --hidden 16 (now 32)" in output
    assert (directory / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "description",
    [
        '{"model": ' + "[" * 1_000_000 + "]" * 1_000_000 + "}",
        '{"model": {"hidden": ' + '{"a":' * 1_000_000 + "1" + "}" * 1_000_000 + "}}",
        "[1, 2]",
        '{"model": ',
        "\x00\xff",
        None,  # a pipe, that nobody writes to
    ],
    ids=["deep arrays", "deep objects", "no object", "cut short", "no text", "pipe"],
)
def test_resume_refuses_a_description_made_to_break_it(half_run, text, tmp_path, description):
    directory = tmp_path / "run"
    shutil.copytree(half_run, directory)
    (directory / "options.json").unlink()
    if description is None:
        os.mkfifo(directory / "options.json")
    else:
        (directory / "options.json").write_text(description, encoding="latin-1")
    output = run(0, "--data", text, "--output", directory, *model_options(), "--resume", expect=2)
    assert "is damaged" in output or "holds no checkpoint" in output


def test_resume_says_what_else_has_changed(half_run, text, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(half_run, directory)
    output = run(0, "--data", text, "--output", directory, *model_options(clip=0.5), "--resume")
    assert "begun with --clip 1.0 (now 0.5)" in output


def test_a_new_run_keeps_the_last_checkpoint_aside(half_run, text, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(half_run, directory)
    run(0, "--data", text, "--output", directory, *model_options(stop_at=1))
    assert len(read_metrics(directory)) == 1
    assert (directory / "checkpoint").is_dir()
    assert (directory / "checkpoint.previous").is_dir()


def generated(ranks, directory, *words):
    words = ["--output", directory, "--generate", "--prompt", "abc", "--sample-length", 30, "--seed", 7, *words]
    return run(ranks, *words, "--device", "cpu")


def test_text_is_the_same_with_keys_and_values_kept_and_computed_anew(whole_run):
    # The nucleus of the likeliest token alone is that token.
    greedy = generated(2, whole_run, "--temperature", 0)
    assert greedy == generated(0, whole_run, "--temperature", 1, "--top-p", 1e-9, "--context", 1000)
    drawn = generated(0, whole_run, "--temperature", 1, "--top-p", 0.9)
    assert drawn == generated(2, whole_run, "--temperature", 1, "--top-p", 0.9, "--context", 1000)
    assert drawn.startswith("abc") and drawn != greedy


def test_the_last_validation_is_evaluated_again(whole_run, text):
    last = read_metrics(whole_run)[-1]
    words = ["--validation-sequences", 7, "--sequence-length", SEQUENCE_LENGTH, "--batch-size", 4]
    output = run(0, "--data", text, "--output", whole_run, "--evaluate", *words)
    loss, perplexity, bits = map(float, re.search(r"loss (\S+)  perplexity (\S+)  (\S+) bits/byte", output).groups())
    assert loss == pytest.approx(last["validation_loss"], rel=1e-4)
    assert perplexity == pytest.approx(math.exp(last["validation_loss"]), rel=1e-4)
    assert bits == pytest.approx(last["validation_bpb"], rel=1e-4)


def check_runs(process, deadline):
    """Fails with what the process has said when it has ended, or is over its deadline."""
    if process.poll() is not None or time.monotonic() >= deadline:
        process.kill()
        pytest.fail(process.communicate()[0])


def start_long_run(text, directory, ranks):
    """A run that would take hours; returns when it has taken some steps."""
    arguments = ["--data", text, "--output", directory, *model_options(steps=10**6)]
    process = subprocess.Popen(
        command(ranks, *arguments),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = directory / "metrics.jsonl"
    deadline = time.monotonic() + 30
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        check_runs(process, deadline)
        time.sleep(0.05)
    return process


def open_once_read(fifo, process):
    """A FIFO's writing end, as soon as the process has opened the other one."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return os.fdopen(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb")
        except OSError as error:  # as long as nobody reads
            assert error.errno == errno.ENXIO, error
        check_runs(process, deadline)
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_saves_and_resume_continues(text, tmp_path, number):
    directory = tmp_path / "run"
    process = start_long_run(text, directory, 2)
    try:
        os.kill(children_of(process)[1], number)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + number, output
    step = int(re.search(r"stopped after step (\d+), saved in .*--resume", output)[1])
    assert read_metrics(directory)[-1]["step"] == step
    arguments = model_options(steps=10**6, stop_at=step + 1)
    output = run(2, "--data", text, "--output", directory, *arguments, "--resume")
    assert f"resuming after step {step} " in output
    steps = [line["step"] for line in read_metrics(directory)]
    assert steps == list(range(1, step + 2))


def test_a_signal_while_the_run_still_starts_saves_after_the_first_step(half_run, text, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(half_run, directory)
    # The program waits where it reads what the run has measured, until somebody writes it.
    metrics = directory / "metrics.jsonl"
    measured = metrics.read_bytes()
    metrics.unlink()
    os.mkfifo(metrics)
    arguments = ["--data", text, "--output", directory, *model_options(), "--resume"]
    process = subprocess.Popen(
        command(0, *arguments), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        with open_once_read(metrics, process) as pipe:
            process.send_signal(signal.SIGTERM)
            pipe.write(measured)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert f"stopped after step {STEPS // 2 + 1}, saved in" in output


@pytest.mark.parametrize("name", ["options.json", "metrics.jsonl"])
def test_a_crash_while_a_run_is_resumed_loses_nothing(half_run, whole_run, text, tmp_path, name):
    """The process dies at the first byte that would make a file larger than half of `name`."""
    directory = tmp_path / "run"
    shutil.copytree(half_run, directory)
    before = {file: (directory / file).read_bytes() for file in ("options.json", "metrics.jsonl")}
    limit = f"--fsize={len(before[name]) // 2}"  # of the rank alone: mpirun has files of its own to write
    arguments = ["--core=0", limit, TRAIN_LM, "--data", text, "--output", directory, *model_options(), "--resume"]
    output = run(1, *arguments, program="prlimit", expect=128 + signal.SIGXFSZ)
    assert "File size limit exceeded" in output
    assert {file: (directory / file).read_bytes() for file in before} == before
    run(2, "--data", text, "--output", directory, *model_options(), "--resume")
    assert without_timing(read_metrics(directory)) == without_timing(read_metrics(whole_run))


def test_a_run_killed_at_random_moments_always_resumes(train, text, tmp_path):
    """ANABRANCH_TEST_KILLS: how many times."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    generator = random.Random(seed)
    changes = {"steps": 20, "validation_interval": 10, "sample_length": 0}
    expected = without_timing(read_metrics(train(2, **changes)))
    kills_left, number = int(os.environ.get("ANABRANCH_TEST_KILLS", "3")), 0
    while kills_left > 0:
        number += 1
        directory = tmp_path / str(number)

        def start(more, directory=directory):
            options = model_options(checkpoint_interval=1, **changes) + ["--async-save"] * generator.randint(0, 1)
            words = command(2, "--data", text, "--output", directory, *options, *more)
            return subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        moments, _ = run_with_kills(start, directory, 20, kills_left, generator)
        kills_left -= len(moments)
        assert without_timing(read_metrics(directory)) == expected, moments


def test_a_killed_rank_ends_the_job(text, tmp_path):
    process = start_long_run(text, tmp_path / "run", 3)
    try:
        os.kill(children_of(process)[1], signal.SIGKILL)
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode != 0, output


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"hidden": 15}, "--hidden 15 is not divisible by --heads 2"),
        ({"hidden": 6}, "--hidden / --heads must be even, got 3"),
        ({"top_k": 6}, "--top-k 6 is more than --experts 5"),
        ({"learning_rate": "nan"}, "--learning-rate must be finite and positive"),
        ({"expert_parallel": 2}, "--expert-parallel 2 does not divide the number of ranks, 1"),
        ({"sequence_length": 100000}, "at least 2000020 are needed"),
        ({"steps": "many"}, "--steps"),
        ({"data": "synthetic:300"}, "--data has a vocabulary of 300, the model one of 256"),
        ({"data": "synthetic:-1"}, "--data synthetic:-1: expected the size of a vocabulary"),
        ({"data": "synthetic:9x"}, "--data synthetic:9x: expected the size of a vocabulary"),
        ({"device": "abacus"}, "--device"),
        ({"top_p": 0}, "--top-p must be above 0"),
        ({"stpes": 5}, "--stpes"),
    ],
)
def test_wrong_options_are_refused(text, tmp_path, wrong, message):
    directory = tmp_path / "run"
    arguments = model_options(**{"data": text} | wrong)
    output = run(0, "--output", directory, *arguments, expect=2)
    assert message in output
    assert not directory.exists()


def test_wrong_options_are_named_once(text, tmp_path):
    output = run(3, "--data", text, "--output", tmp_path, *model_options(batch_size=0), expect=2)
    assert output.count("--batch-size must be at least 1, got 0") == 1
    assert output.count("error:") == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [("missing.txt", "missing.txt: No such file"), (".", " is a directory without token files")],
)
def test_data_that_is_no_text_is_refused(tmp_path, data, message):
    output = run(2, "--data", tmp_path / data, "--output", tmp_path / "run", expect=2)
    assert message in output


def test_resume_without_a_checkpoint_is_refused(text, tmp_path):
    output = run(2, "--data", text, "--output", tmp_path / "no", *model_options(), "--resume", expect=2)
    assert "no holds no checkpoint" in output


def test_help_names_every_option_once():
    output = run(2, "--help")
    for name in ("--steps", "--data", "--output", "--batch-size", "--top-k", "--resume"):
        assert len(re.findall(rf"^ *{name} ", output, re.MULTILINE)) == 1


@pytest.mark.parametrize("ranks", [0, 3])
def test_quickstart_says_who_sent_what_to_whom(ranks):
    output = run(ranks, program=QUICKSTART)
    lines = re.findall(
        r"rank (\d+): (\d+) tokens; rows sent to each rank: ([\d ]+); "
        r"received from each: ([\d ]+)\n",
        output,
    )
    assert [int(line[0]) for line in lines] == list(range(max(ranks, 1)))
    sent = [[int(rows) for rows in line[2].split()] for line in lines]
    received = [[int(rows) for rows in line[3].split()] for line in lines]
    assert received == [list(column) for column in zip(*sent, strict=True)]
    load = [int(count) for count in re.search(r"each expert: ([\d ]+);", output)[1].split()]
    assert sum(load) == 2 * sum(int(line[1]) for line in lines)
