"""What examples/train_lm reads of token files, against numpy: every sequence, and what it refuses.

The program that writes sequences to standard output: ANABRANCH_TOKEN_WINDOWS (default: in build/release/tests).
"""

import json
import os
import random
import struct
import subprocess
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOKEN_WINDOWS = os.environ.get("ANABRANCH_TOKEN_WINDOWS", ROOT / "build/release/tests/token_windows")
SEED = int(os.environ.get("ANABRANCH_TEST_SEED", random.SystemRandom().randrange(2**32)))
MEGATRON_CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


@pytest.fixture
def chance():
    print(f"ANABRANCH_TEST_SEED={SEED}")
    return numpy.random.default_rng(SEED)


def write_megatron(path, documents, dtype="uint16", **changes):
    """Documents, each of one or several sequences; `changes` of what the index says, by name."""
    sequences = [sequence for document in documents for sequence in document]
    lengths = changes.get("lengths", [len(sequence) for sequence in sequences])
    places = numpy.cumsum([0, *map(len, sequences)])[:-1] * numpy.dtype(dtype).itemsize
    ends = numpy.cumsum([0] + [len(document) for document in documents])
    path.write_bytes(numpy.concatenate(sequences or [[]]).astype(dtype).tobytes())
    path.with_suffix(".idx").write_bytes(
        changes.get("magic", b"MMIDIDX\0\0")
        + struct.pack("<Q", changes.get("version", 1))
        + struct.pack("<B", changes.get("code", MEGATRON_CODES[dtype]))
        + struct.pack("<Q", changes.get("sequences", len(lengths)))
        + struct.pack("<Q", changes.get("ends", len(ends)))
        + numpy.array(lengths, "<i4").tobytes()
        + numpy.array(changes.get("places", places), "<i8").tobytes()
        + numpy.array(ends, "<i8").tobytes()
    )
    return path


def write_llm_c(path, tokens, wide=False, magic=None, version=None, count=None):
    header = numpy.zeros(256, "<i4")
    header[:3] = magic or (20240801 if wide else 20240520), version or (7 if wide else 1), count or len(tokens)
    path.write_bytes(header.tobytes() + numpy.asarray(tokens).astype("<u4" if wide else "<u2").tobytes())
    return path


def read(data, length, part, first, count, size, seed=7, expect=0):
    """[count, length + 1], and what the program says."""
    command = [TOKEN_WINDOWS, data, length, seed, part, first, count, size]
    result = subprocess.run(list(map(str, command)), capture_output=True, timeout=60, check=False)
    said = result.stderr.decode(errors="replace")
    assert result.returncode == expect, said
    return numpy.frombuffer(result.stdout, "<i8").reshape(-1, length + 1), said


def epoch_of(data, length, tokens, seed=7):
    """An epoch's sequences, as places in the tokens. Checks that they are sequences of these."""
    count = len(tokens) // length - 1
    windows, _ = read(data, length, "training", 0, count, count, seed)
    view = numpy.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    where = {window.tobytes(): place for place, window in enumerate(view.astype("<i8"))}
    assert len(where) == len(view), "the tokens do not tell places apart"
    return [where[window.tobytes()] for window in windows]


def held_out_of(tokens, starts):
    """Documents from the first on that begins in the last twentieth, if one does."""
    twentieth = len(tokens) - len(tokens) // 20
    last = min([start for start in starts if start >= twentieth] or [twentieth])
    return tokens[:last], tokens[last:]


def random_documents(chance, count, vocabulary=50000):
    return [
        [chance.integers(0, vocabulary, chance.integers(0, 40)) for _ in range(chance.integers(1, 4))]
        for _ in range(count)
    ]


def flat(documents):
    """Tokens, and where documents begin."""
    sizes = [sum(map(len, document)) for document in documents]
    tokens = numpy.concatenate([sequence for document in documents for sequence in document]).astype("<i8")
    return tokens, (numpy.cumsum(sizes) - sizes).tolist()


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", "int16"])
def test_an_epoch_has_every_sequence_of_a_megatron_file_once(chance, tmp_path, dtype):
    documents = random_documents(chance, 300, 32767 if dtype == "int16" else 50000)
    data = write_megatron(tmp_path / "text.bin", documents, dtype)
    tokens, starts = flat(documents)
    training, held_out = held_out_of(tokens, starts)
    length = int(chance.integers(5, 17))
    places = epoch_of(data, length, training)
    begin = min(places)
    assert sorted(places) == list(range(begin, begin + length * len(places), length))
    assert 0 <= begin < length and len(training) - max(places) < 3 * length
    assert places != sorted(places)
    windows, said = read(data, length, "validation", 0, 5, 5)
    offsets = [(len(held_out) - length - 1) * i // 4 for i in range(5)]
    numpy.testing.assert_array_equal(windows, [held_out[offset : offset + length + 1] for offset in offsets])
    assert f"{len(training)} tokens and {len(held_out)} held out" in said
    assert f"of a vocabulary of {tokens.max() + 1}, in 300 documents" in said


@pytest.mark.parametrize("wide", [False, True], ids=["uint16", "uint32"])
def test_an_epoch_has_every_sequence_of_llm_c_files_once(chance, tmp_path, wide):
    shards = [chance.integers(0, 2**32 if wide else 2**16, chance.integers(50, 400)) for _ in range(3)]
    for number, shard in enumerate(shards):
        write_llm_c(tmp_path / f"text_train_{number:06}.bin", shard, wide)
    held_out = chance.integers(0, 2**16, 60)
    write_llm_c(tmp_path / "text_val_000000.bin", held_out, wide)
    places = epoch_of(tmp_path, 8, numpy.concatenate(shards))
    begin = min(places)
    assert sorted(places) == list(range(begin, begin + 8 * len(places), 8))
    numpy.testing.assert_array_equal(read(tmp_path, 8, "validation", 0, 1, 1)[0][0], held_out[:9])


def test_without_files_that_are_held_out_each_file_s_last_twentieth_is(chance, tmp_path):
    shards = [chance.integers(0, 2**16, 400) for _ in range(2)]
    for number, shard in enumerate(shards):
        write_llm_c(tmp_path / f"{number}.bin", shard)
    windows, _ = read(tmp_path, 39, "validation", 0, 1, 1)
    numpy.testing.assert_array_equal(windows[0], numpy.concatenate([shard[380:] for shard in shards]))
    assert max(epoch_of(tmp_path, 8, numpy.concatenate([shard[:380] for shard in shards]))) > 700


def test_any_number_of_ranks_reads_the_same(chance, tmp_path):
    data = write_megatron(tmp_path / "text.bin", random_documents(chance, 100))
    whole, _ = read(data, 8, "training", 0, 12, 12)
    pieces = [read(data, 8, "training", first, count, 12)[0] for first, count in ((0, 5), (5, 0), (5, 7))]
    numpy.testing.assert_array_equal(numpy.concatenate(pieces), whole)
    # And of what steps a batch is made is all the same to the order.
    numpy.testing.assert_array_equal(numpy.concatenate([read(data, 8, "training", i, 4, 4)[0] for i in (0, 4, 8)]), whole)


def test_epochs_and_seeds_have_orders_of_their_own(chance, tmp_path):
    tokens = numpy.arange(1000) + 3
    data = write_llm_c(tmp_path / "text.bin", tokens)
    epoch = 950 // 10 - 1
    orders = [read(data, 10, "training", i * epoch, epoch, epoch, seed)[0][:, 0] for i, seed in ((0, 1), (1, 1), (0, 2))]
    for order in orders:
        assert sorted(order % 10) == [order[0] % 10] * epoch and len(set(order)) == epoch
    # A sequence stands where it did in another order about once.
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] // 10 == orders[other] // 10).sum() < 10
    # Nor do neighbours stay neighbours.
    assert (abs(numpy.diff(orders[0])) == 10).sum() < 15


@pytest.mark.parametrize("sequences", [1, 2, 3, 4, 5, 16, 17])
def test_an_epoch_of_few_sequences(tmp_path, sequences):
    tokens = numpy.arange(1000)
    write_llm_c(tmp_path / "a_train_.bin", tokens[: 4 * (sequences + 1)])
    write_llm_c(tmp_path / "a_val_.bin", tokens)
    assert len(set(epoch_of(tmp_path, 4, tokens[: 4 * (sequences + 1)]))) == sequences


def test_random_tokens_are_spread_evenly_and_each_place_has_its_own():
    windows, _ = read("synthetic:10", 999, "training", 0, 40, 40)
    counts = numpy.bincount(windows.ravel(), minlength=10)
    assert len(counts) == 10 and abs(counts - 4000).max() < 6 * 60  # six standard deviations of a binomial
    assert len({row.tobytes() for row in windows}) == 40
    numpy.testing.assert_array_equal(read("synthetic:10", 999, "training", 13, 2, 40)[0], windows[13:15])
    assert not (read("synthetic:10", 999, "validation", 0, 1, 1)[0] == windows[0]).all()


def test_what_the_tokenizer_says_is_believed_and_checked(tmp_path):
    data = write_llm_c(tmp_path / "text.bin", numpy.arange(400) % 50)
    (tmp_path / "text.json").write_text(json.dumps({"vocabulary": 64, "bytes_per_token": 3.5}))
    assert "of a vocabulary of 64" in read(data, 8, "training", 0, 1, 1)[1]
    (tmp_path / "text.json").write_text(json.dumps({"vocabulary": 49}))
    said = read(data, 8, "training", 0, 40, 40, expect=2)[1]
    assert "text.bin holds token 49; its vocabulary has 49" in said
    for wrong in ("[1]", "{", "{}", '{"vocabulary": "many"}', '{"vocabulary": 0}'):
        (tmp_path / "text.json").write_text(wrong)
        assert "text.json names no vocabulary" in read(data, 8, "training", 0, 1, 1, expect=2)[1]


TEXT = [[numpy.arange(50)], [numpy.arange(30), numpy.arange(20)]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"MMIDIDX\0\1"}, "is no index of Megatron's"),
        ({"version": 2}, "is of version 2; version 1"),
        ({"code": 7}, "says type 7, which is none for tokens"),
        ({"code": 99}, "says type 99"),
        ({"code": 4}, "expected at byte 200"),
        ({"sequences": 2}, "which are not 2 sequences and 2 documents"),
        ({"sequences": 2**63}, "has 94 bytes"),
        ({"sequences": 2**62, "ends": 2**62}, "has 94 bytes"),
        ({"ends": 0}, "has 94 bytes"),
        ({"lengths": [50, 30, 21]}, "says 101 tokens, which are 202 bytes; "),
        ({"lengths": [50, 30, -20]}, "has sequence 2 of -20 tokens"),
        ({"places": [0, 98, 160]}, "has sequence 1 of 30 tokens at byte 98; expected at byte 100"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path, changes, message):
    data = write_megatron(tmp_path / "text.bin", TEXT, **changes)
    assert message in read(data, 4, "training", 0, 1, 1, expect=2)[1]


def test_files_cut_short_anywhere_are_refused(chance, tmp_path):
    data = write_megatron(tmp_path / "text.bin", TEXT)
    for file in (data, data.with_suffix(".idx")):
        whole = file.read_bytes()
        for size in {0, 1, 8, 17, 33, len(whole) - 1, *chance.integers(0, len(whole), 4).tolist()}:
            file.write_bytes(whole[:size])
            assert "error: --data" in read(data, 4, "training", 0, 1, 1, expect=2)[1]
        file.write_bytes(whole + b"\0")
        assert "error: --data" in read(data, 4, "training", 0, 1, 1, expect=2)[1]
        file.write_bytes(whole)
    read(data, 4, "training", 0, 1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 20240521}, "begins with 20240521, no magic number of llm.c's"),
        ({"version": 2}, "is of version 2; version 1"),
        ({"count": 99}, "has 1224 bytes; its header says 99 tokens, which are 1222"),
        ({"count": -5}, "its header says -5 tokens"),
        ({"count": 2**31 - 1}, "its header says 2147483647 tokens"),
    ],
)
def test_a_header_that_is_wrong_is_refused(tmp_path, changes, message):
    data = write_llm_c(tmp_path / "text.bin", numpy.arange(100), **changes)
    assert message in read(data, 4, "training", 0, 1, 1, expect=2)[1]


def test_too_few_tokens_are_refused(tmp_path):
    data = write_llm_c(tmp_path / "text.bin", numpy.arange(100))
    said = read(data, 48, "training", 0, 1, 1, expect=2)[1]
    assert "95 tokens to train on; at --sequence-length 48 at least 96 are needed" in said
    said = read(data, 5, "training", 0, 1, 1, expect=2)[1]
    assert "5 tokens are held out; at --sequence-length 5 at least 6 are needed" in said
    (tmp_path / "short.bin").write_bytes(b"abc")
    assert "short.bin has 3 bytes: neither llm.c's header, nor" in read(
        tmp_path / "short.bin", 5, "training", 0, 1, 1, expect=2
    )[1]


def test_what_megatron_core_writes_is_read(chance, tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core")
    torch = pytest.importorskip("torch")
    documents = random_documents(chance, 60)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=numpy.uint16)
    for document in documents:
        builder.add_document(torch.tensor(numpy.concatenate(document)), [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "text.idx"))
    training, _ = held_out_of(*flat(documents))
    assert len(set(epoch_of(tmp_path / "text.bin", 6, training))) == len(training) // 6 - 1
