"""anabranch.from_pretrained: each rank reads its own experts; save_pretrained has one expert at a time on rank 0."""

import pathlib
import threading
import time

import anabranch
import pytest
import torch
import torch.distributed.device_mesh
import transformers
from models import FAMILIES, MORE, make_batch, make_model, make_more, make_settled_batch
from ranks import run_ranks
from test_convert import assert_same_weights, layers_of

transformers.logging.set_verbosity_error()
EXPERTS = 8  # as many on each of 4 ranks


class Counted:
    """A slice of safetensors that says how many bytes are read of it."""

    read = 0

    def __init__(self, values):
        self._values = values

    def __getitem__(self, place):
        found = self._values[place]
        Counted.read += found.nbytes
        return found

    def __getattr__(self, name):
        return getattr(self._values, name)


def count_reads(monkeypatch):
    from transformers import modeling_utils

    plain = modeling_utils.safe_open

    class Opened:
        def __init__(self, *arguments, **options):
            self._file = plain(*arguments, **options)

        def get_slice(self, name):
            return Counted(self._file.get_slice(name))

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __exit__(self, *error):
            self._file.__exit__(*error)

    Counted.read = 0
    monkeypatch.setattr(modeling_utils, "safe_open", Opened)


def reads(rank, size, folder, seed, families):
    transformers.logging.set_verbosity_error()
    with pytest.MonkeyPatch.context() as patch:
        for family in families:
            plain = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{family}").eval()
            batch = make_batch(plain, seed) if family in FAMILIES else make_settled_batch(plain, seed)
            count_reads(patch)
            model = anabranch.from_pretrained(f"{folder}/{family}").eval()
            read = Counted.read
            patch.undo()
            assert type(model) is type(plain) and layers_of(model)
            # The same as reading all and keeping a part, bit for bit.
            other = anabranch.convert(plain)
            for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
                assert torch.equal(ours, theirs), f"{family}: {name}"
            with torch.no_grad():
                assert torch.equal(model(batch).logits, other(batch).logits), family
            own = sum(p.nbytes for p in model.parameters())
            own += sum(b.nbytes for b in model.state_dict().values() if b.numel() == EXPERTS)
            assert read <= own, f"{family}: {read} bytes read for {own}"
            model.save_pretrained(f"{folder}/{family} again", max_shard_size=4000)
            assert_same_weights(transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/{family}"), f"{folder}/{family} again")
    if size == 4:
        replicas_write(f"{folder}/{families[0]}")


def replicas_write(folder):
    """Two copies of all experts, on two ranks each: both write the same files, or one does."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    model = anabranch.from_pretrained(folder, mesh["experts"])
    for _ in range(3):
        model.save_pretrained(f"{folder} by both", max_shard_size=4000)
        torch.distributed.barrier()
        assert_same_weights(plain, f"{folder} by both")
        assert not list(pathlib.Path(f"{folder} by both").glob(".*"))
        torch.distributed.barrier()
    copy = "first" if torch.distributed.get_rank() < 2 else "second"
    model.save_pretrained(f"{folder} by the {copy}", is_main_process=torch.distributed.get_rank() == 0)
    torch.distributed.barrier()
    assert_same_weights(plain, f"{folder} by the first")
    assert not pathlib.Path(f"{folder} by the second").exists()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_rank_reads_its_own_share(size, tmp_path, seed):
    families = ["mixtral", "deepseek_v3", "AriaText", "GraniteMoe"]  # files with a tensor for each expert, and for all of them
    for family in families:
        model = make_more(family, seed, EXPERTS) if family in MORE else make_model(family, seed, EXPERTS)
        model.save_pretrained(tmp_path / family, max_shard_size=3000)
    run_ranks(size, reads, str(tmp_path), seed, families)


def own_memory():
    """Bytes of this process that belong to no file."""
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def peak_of(function):
    """How many bytes more than before this process has had while `function` ran, as looked at every millisecond."""
    before, most, done = own_memory(), [0], threading.Event()

    def watch():
        while not done.is_set():
            most[0] = max(most[0], own_memory() - before)
            time.sleep(0.001)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        result = function()
    finally:
        done.set()
        watching.join()
    return result, most[0]


def measured(rank, size, folder):
    transformers.logging.set_verbosity_error()
    anabranch.from_pretrained(f"{folder}/small")  # what is imported
    model, to_read = peak_of(lambda: anabranch.from_pretrained(folder))
    share = sum(p.nbytes for p in model.parameters())
    _, to_write = peak_of(lambda: model.save_pretrained(f"{folder}/again"))
    return share, to_read, to_write


def test_memory_of_one_share(tmp_path, seed):
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    layer = 8 * 3 * 512 * 1024 * 4
    whole = sum(p.nbytes for p in model.parameters())
    assert 4 * layer <= whole <= 1.1 * 4 * layer  # 211 MB
    model.save_pretrained(tmp_path, max_shard_size="60MB")
    del model
    make_model("mixtral", seed, 8).save_pretrained(tmp_path / "small")
    for share, to_read, to_write in run_ranks(4, measured, str(tmp_path)):
        assert share < 0.35 * whole
        # transformers' threads read ahead of what is joined and put in place: at most the share once more.
        assert to_read <= 2 * share < 0.7 * whole, f"{to_read} bytes for a share of {share}"
        assert to_write <= layer / 2, f"{to_write} bytes to write {whole}"


def refused(rank, size, folder):
    with pytest.raises(ValueError, match="has no .*experts"):
        anabranch.from_pretrained(f"{folder}/incomplete")
    with pytest.raises(ValueError, match="no stacked experts"):
        anabranch.from_pretrained(f"{folder}/dense")
    with pytest.raises(ValueError, match="5 experts over 4 ranks"):
        anabranch.from_pretrained(f"{folder}/five")
    with pytest.raises(ValueError, match="from_pretrained with group = .* expected a DeviceMesh"):
        anabranch.from_pretrained(f"{folder}/five", anabranch.make_parallel_groups(2).expert_parallel)


def test_what_cannot_be_read(tmp_path, seed):
    make_model("olmoe", seed, 5).save_pretrained(tmp_path / "five")
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)).save_pretrained(tmp_path / "dense")
    model = make_model("olmoe", seed, 8)
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.experts" not in name}
    model.save_pretrained(tmp_path / "incomplete", state_dict=state)
    run_ranks(4, refused, str(tmp_path))
