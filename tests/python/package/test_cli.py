"""The command line: each command in this process, and as a shell starts it."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import anabranch
import pytest
import torch
from anabranch_cli import doctor, watch
from anabranch_cli.main import make_parser, main

OPTIONS = dict(hidden_size=6, expert_hidden_size=8, num_experts=5, top_k=2)


@pytest.fixture
def shown(capsys):
    """What a command prints: `shown(arguments..., expect=exit code)`, parsed where it is JSON."""

    def run(*arguments, expect=0):
        assert main([str(argument) for argument in arguments]) == expect
        captured = capsys.readouterr()
        text = captured.out if expect != 2 else captured.err
        return json.loads(text) if "--json" in arguments else text

    return run


class Model(torch.nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.first = anabranch.MoE(**OPTIONS, seed=seed)
        self.norm = torch.nn.LayerNorm(6)

    def step(self, optimizer):
        self.norm(self.first(torch.randn(7, 6)).output).square().sum().backward()
        anabranch.finish_gradients(self)
        optimizer.step()


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of a model and an optimizer that has run a step."""
    model = Model(seed=1)
    optimizer = torch.optim.AdamW(model.parameters())
    model.step(optimizer)
    anabranch.save_checkpoint(tmp_path / "saved", model, optimizer, metadata={"step": "1", "über": "ü"})
    return tmp_path / "saved", model, optimizer


def test_every_command_has_help_and_json(shown):
    text = make_parser().format_help()
    for name in ("info", "doctor", "bench", "plan", "train", "tokenize", "checkpoint", "watch"):
        assert f"\n    {name}" in text, name
    for command in (["info"], ["doctor"], ["bench"], ["watch"], ["checkpoint", "inspect"], ["checkpoint", "reshard"]):
        with pytest.raises(SystemExit) as left:
            main([*command, "--help"])
        assert left.value.code == 0


def test_info(shown):
    found = shown("info", "--json")
    assert found["version"] == anabranch.__version__ and found["torch"] == torch.__version__
    assert found["engines"]["cpu"][:2] == ["auto", "cpu"]
    assert bool(found["why_no_kernels_for_gpus"]) == ("cuda" not in found["engines"])
    assert f"anabranch {anabranch.__version__}" in shown("info")


def test_doctor(shown):
    checks = doctor.examine()
    assert {"package", "transports", "GPUs", "UDP", "shared memory", "open files", "cores"} <= {check.name for check in checks}
    assert all(check.status in ("ok", "warn", "bad") and check.found for check in checks)
    assert all(check.advice for check in checks if check.status == "warn")
    worst = int(any(check.status == "bad" for check in checks))
    assert [check["name"] for check in shown("doctor", "--json", expect=worst)] == [check.name for check in checks]


def test_doctor_sees_what_is_wrong(monkeypatch, tmp_path):
    (check,) = doctor._shared_memory(tmp_path, enough=1 << 62)
    assert check.status == "warn" and "--shm-size" in check.advice
    (check,) = doctor._shared_memory(tmp_path / "nothing")
    assert check.status == "bad"
    assert not doctor._datagram_arrives("192.0.2.1")  # an address that nobody has
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert next(doctor._processors()).status == "warn"
    monkeypatch.setattr(doctor, "_udp", lambda: 1 / 0)
    monkeypatch.setattr(doctor._udp, "__name__", "_udp", raising=False)
    assert any(check.status == "bad" and "ZeroDivisionError" in check.found for check in doctor.examine())


def test_inspect(shown, saved):
    folder, model, _ = saved
    found = shown("checkpoint", "inspect", folder, "--json", "--verify")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["experts"] == 5 and found["optimizer"] == "AdamW" and found["metadata"] == {"step": "1", "über": "ü"}
    assert found["damaged"] == []
    text = shown("checkpoint", "inspect", folder, "--tensors", "--verify")
    assert "first.experts.4.up_weight  F32 [8, 6]" in text and "every byte is as it was written" in text


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_resharded_it_loads_the_same(shown, saved, tmp_path, ranks):
    folder, model, optimizer = saved
    done = shown("checkpoint", "reshard", folder, tmp_path / "other", "--ranks", ranks, "--json")
    assert done["files"] == len(list((tmp_path / "other").glob("*.safetensors"))) == ranks
    other = Model(seed=2)
    other_optimizer = torch.optim.AdamW(other.parameters())
    assert anabranch.load_checkpoint(tmp_path / "other", other, other_optimizer) == {"step": "1", "über": "ü"}
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(optimizer.state[mine]["exp_avg"], other_optimizer.state[theirs]["exp_avg"])


@pytest.mark.parametrize("name", ["plain.safetensors", "plain.pt"])
def test_convert(shown, saved, tmp_path, name):
    folder, model, _ = saved
    shown("checkpoint", "convert", folder, tmp_path / name)
    if name.endswith(".pt"):
        loaded = torch.load(tmp_path / name)
    else:
        from safetensors.torch import load_file

        loaded = load_file(tmp_path / name)
    assert not any(key.startswith("optimizer.") for key in loaded)
    assert torch.equal(loaded["norm.weight"], model.norm.weight)
    for expert in range(5):
        assert torch.equal(loaded[f"first.experts.{expert}.down_weight"], model.first.experts.down_weight[expert])


def test_damage_is_found(shown, saved, tmp_path):
    folder, *_ = saved
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert shown("checkpoint", "inspect", folder, "--verify", "--json", expect=1)["damaged"]
    assert "damaged" in shown("checkpoint", "reshard", folder, tmp_path / "other", "--ranks", 2, expect=2)
    file.write_bytes(data[:-1])
    assert "its index says" in shown("checkpoint", "inspect", folder, expect=2)
    index = folder / "checkpoint.index.json"
    index.write_text(index.read_text().replace('"step": "1"', '"step": "2"'))
    assert "its checksum does not match" in shown("checkpoint", "inspect", folder, expect=2)
    assert "no index" in shown("checkpoint", "inspect", tmp_path, expect=2) or not (tmp_path / index.name).exists()


def test_bad_input(shown, saved, tmp_path):
    folder, *_ = saved
    assert "expected at least 1" in shown("checkpoint", "reshard", folder, tmp_path / "o", "--ranks", 0, expect=2)
    assert "is not empty" in shown("checkpoint", "reshard", folder, folder, "--ranks", 1, expect=2)
    assert ".safetensors or .pt" in shown("checkpoint", "convert", folder, tmp_path / "x.bin", expect=2)
    assert "of 4 experts" in shown("bench", "gemm", "--experts", 4, "--top-k", 5, expect=2)
    assert "metrics.jsonl" in shown("watch", tmp_path, "--once", expect=2)


def test_watch(shown, tmp_path):
    assert watch.spark([]) == "" and watch.spark([1.0, float("nan"), 1.0]) == "▁▁"
    assert watch.spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    (tmp_path / "metrics.jsonl").touch()
    assert shown("watch", tmp_path, "--once").strip() == "no step yet"
    steps = [{"step": i, "loss": 9.0 - i, "tokens_per_second": 10.0 * i, "load": [[0.5, 0.25, 0.25]]} for i in range(1, 9)]
    text = "".join(json.dumps(step) + "\n" for step in steps) + '{"step": 9, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    text = shown("watch", tmp_path, "--once")
    assert "step 8  loss 1.000" in text and "█▇▆▅▄▃▂▁" in text and "1.50 0.75 0.75" in text
    assert shown("watch", tmp_path, "--json")["last"] == steps[-1]


@pytest.mark.parametrize("slow", [None, 0, 3])
def test_watch_names_a_slow_rank(shown, tmp_path, slow):
    """One that takes twice as long, among lines of which some know nothing of some ranks."""
    times = [2.0 if rank == slow else 1.0 for rank in range(4)]
    lines = [{"step": 1, "rank_milliseconds": [9.0]}]  # of another number of ranks, before it went on
    lines += [{"step": step, "rank_milliseconds": [None if (rank, step) == (1, 4) else t for rank, t in enumerate(times)]} for step in (2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert shown("watch", tmp_path, "--json")["own_work"] == {"milliseconds": times, "median": 1.0, "slow_rank": slow}
    text = shown("watch", tmp_path, "--once")
    assert ("no slow rank" in text) if slow is None else (f"SLOW: rank {slow}, own work of a sequence 2 ms, 2.0 times" in text)


def test_watch_in_a_terminal(tmp_path, monkeypatch):
    line = {"step": 3, "loss": 2.5, "load": [[0.75, 0.25]], "rank_milliseconds": [1.0, 3.0]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    watch.follow(tmp_path, 0.1)  # and ends as by Ctrl-C
    from rich.console import Console

    console = Console(record=True, width=80, file=open("/dev/null", "w"), force_terminal=True, color_system="truecolor")
    console.print(watch._screen(watch.look(tmp_path), tmp_path))
    drawn = console.export_text(styles=True)
    assert "SLOW: rank 1" in drawn
    assert "step 3" in drawn and "38;2;255;128;128" in drawn and "38;2;128;128;255" in drawn  # 1.5 and 0.5 of even


@pytest.mark.parametrize("what", ["layer", "gemm", "exchange"])
def test_bench(shown, what):
    small = "--tokens 24 --hidden 8 --expert-hidden 12 --experts 4 --top-k 2 --ranks 2 --seconds 0.01 --device cpu".split()
    rows = shown("bench", what, *small, "--json")
    names = [row["what"] for row in rows]
    assert "torch" in names and len(names) >= 2
    (torch_row,) = [row for row in rows if row["what"] == "torch"]
    assert torch_row["of_torch"] == 1.0 and all(row["ms"] > 0 for row in rows)
    assert all(row["of_torch"] == pytest.approx(torch_row["ms"] / row["ms"]) for row in rows)
    at_once = what != "exchange" and hasattr(torch.nn.functional, "grouped_mm")
    assert ("torch, an expert at a time" in names) == at_once


def test_bench_of_rows_that_torch_does_not_multiply_at_once(shown):
    """An odd width is no whole number of 16 bytes."""
    odd = "--tokens 24 --hidden 7 --expert-hidden 12 --experts 4 --top-k 2 --seconds 0.01 --device cpu".split()
    for what in ("layer", "gemm"):
        assert [row["what"] for row in shown("bench", what, *odd, "--json") if "torch" in row["what"]] == ["torch"]


def test_programs_get_their_options_and_their_exit_code_comes_back():
    start = [sys.executable, "-m", "anabranch_cli"]
    for command, code, words in (
        (["plan", "layouts", "--gpus", "7,x"], 2, "anabranch plan layouts: error: argument --gpus: '7,x' is no list of numbers"),
        (["tokenize", "--help"], 0, "usage: anabranch tokenize "),
        (["train"], 2, "usage: anabranch train "),
        (["train", "-n", "none"], 2, "number of ranks"),
    ):
        result = subprocess.run([*start, *command], capture_output=True, text=True, check=False)
        assert result.returncode == code and words in result.stdout + result.stderr, result.stdout + result.stderr


def test_completion_and_help_do_not_wait_for_torch():
    program = "import sys; from anabranch_cli.main import make_parser; make_parser(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_completion(tmp_path):
    """As a shell asks for it."""
    argcomplete = pytest.importorskip("argcomplete")
    assert argcomplete
    line = "anabranch checkpoint in"
    environment = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "PYTHONPATH": str(pathlib.Path(anabranch.__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-m", "anabranch_cli"], env=environment, check=False)
    assert (tmp_path / "words").read_text().split() == ["inspect"]
