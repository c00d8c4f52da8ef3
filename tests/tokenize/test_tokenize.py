"""tools/anabranch-tokenize: its files, read here with numpy, hold what the tokenizer says of the texts."""

import gzip
import itertools
import json
import os
import random
import signal
import struct
import subprocess
import time
from pathlib import Path

import numpy
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

TOKENIZE = Path(__file__).resolve().parents[2] / "tools/anabranch-tokenize"
SEED = int(os.environ.get("ANABRANCH_TEST_SEED", random.SystemRandom().randrange(2**32)))
WORDS = "the river carries what the rain has given: naïve façade, 河の水, and <|endoftext|> as words".split()


def run(*arguments, expect=0):
    command = [str(argument) for argument in (TOKENIZE, *arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def texts():
    print(f"ANABRANCH_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    return [
        "".join(chance.choice(WORDS) + chance.choice([" ", " ", "\n", "\n\n", "  "]) for _ in range(chance.randint(0, 60)))
        for _ in range(80)
    ]


@pytest.fixture
def jsonl(texts, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)))
    return file


def read_megatron(folder):
    """The documents: lists of tokens."""
    index = (folder / "tokens.idx").read_bytes()
    magic, version, code, sequences, ends = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    dtype = {8: "<u2", 4: "<i4"}[code]
    lengths = numpy.frombuffer(index, "<i4", sequences, 34)
    places = numpy.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    documents = numpy.frombuffer(index, "<i8", ends, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * ends
    tokens = numpy.fromfile(folder / "tokens.bin", dtype)
    assert lengths.sum() == len(tokens) and documents[0] == 0 and documents[-1] == sequences
    pieces = [tokens[place // tokens.itemsize :][:length] for place, length in zip(places, lengths)]
    return [sum((piece.tolist() for piece in pieces[a:b]), []) for a, b in itertools.pairwise(documents)]


def read_llm_c(folder):
    """The tokens of all files, and the type they have."""
    tokens = []
    for file in sorted(folder.glob("tokens_*.bin")):
        header = numpy.fromfile(file, "<i4", 256)
        dtype = {(20240520, 1): "<u2", (20240801, 7): "<u4"}[tuple(header[:2])]
        tokens.append(numpy.fromfile(file, dtype, offset=1024))
        assert len(tokens[-1]) == header[2] and not header[3:].any()
    return numpy.concatenate(tokens).tolist(), dtype


def expected_of(folder, texts):
    """The documents' tokens, by the tokenizer alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id("<|endoftext|>")
    return [tokenizer.encode(text).ids + [end] for text in texts if text]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_documents_are_what_the_tokenizer_makes_of_them(texts, jsonl, tmp_path):
    said = run(jsonl, "--output", tmp_path / "out", "--vocabulary", 300, "--part-bytes", 3000)
    documents = read_megatron(tmp_path / "out")
    assert documents == expected_of(tmp_path / "out", texts)
    about = json.loads((tmp_path / "out/tokens.json").read_text())
    tokens, size = sum(map(len, documents)), sum(len(text.encode()) for text in texts)
    assert about["tokens"] == tokens and about["documents"] == len(documents) and about["bytes"] == size
    assert about["bytes_per_token"] == size / tokens and about["vocabulary"] == 300
    assert f"{tokens:,} tokens of {len(documents)} documents" in said
    assert json.loads(run(jsonl, "--output", tmp_path / "again", "--vocabulary", 300, "--json")) == about
    # No text spells an end.
    assert all(document.count(about["end_of_text"]) == 1 for document in documents)
    assert sorted(contents(tmp_path / "out")) == ["tokenizer.json", "tokens.bin", "tokens.idx", "tokens.json"]


def test_the_files_are_the_same_for_any_number_of_workers(jsonl, tmp_path):
    for workers in (1, 3):
        run(jsonl, "--output", tmp_path / str(workers), "--vocabulary", 300, "--part-bytes", 2000, "--workers", workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_files_of_llm_c(texts, jsonl, tmp_path):
    options = ["--vocabulary", 300, "--format", "llm.c", "--part-bytes", 2000, "--shard-tokens", 700]
    run(jsonl, "--output", tmp_path / "out", *options)
    tokens, dtype = read_llm_c(tmp_path / "out")
    assert tokens == sum(expected_of(tmp_path / "out", texts), []) and dtype == "<u2"
    sizes = [file.stat().st_size for file in sorted((tmp_path / "out").glob("*.bin"))]
    assert len(sizes) > 2 and set(sizes[:-1]) == {1024 + 2 * 700}


def word_tokenizer(file, words, end="<|endoftext|>"):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, end])}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([end])
    tokenizer.save(str(file))
    return file


@pytest.mark.parametrize("kind", ["megatron", "llm.c"])
def test_a_large_vocabulary_of_a_given_tokenizer(tmp_path, kind):
    words = [f"w{i}" for i in range(70000)]
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", words, end="</s>")
    (tmp_path / "a.txt").write_text("w1 w69999\nw3\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"w4 w5|w6 w7\nw8|\n w9"))
    arguments = [tmp_path / "a.txt", tmp_path / "b.txt.gz", "--tokenizer", tokenizer, "--format", kind, "--separator", "|"]
    run(*arguments, "--output", tmp_path / "out")
    documents = [[1, 69999, 3], [4, 5], [6, 7, 8], [9]]
    documents = [[*document, 70000] for document in documents]
    if kind == "megatron":
        assert read_megatron(tmp_path / "out") == documents
    else:
        assert read_llm_c(tmp_path / "out") == (sum(documents, []), "<u4")
    assert json.loads((tmp_path / "out/tokens.json").read_text())["vocabulary"] == 70001


def test_a_long_text_is_one_document_of_several_pieces(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", ["x", "y"])
    lines = [" ".join(random.Random(SEED + i).choices("xy", k=99)) for i in range(20000)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    arguments = [tmp_path / "long.txt", "--tokenizer", tokenizer, "--workers", 2, "--part-bytes", 1 << 21]
    run(*arguments, "--output", tmp_path / "out")
    (document,) = read_megatron(tmp_path / "out")
    assert document == ["xy".index(word) for line in lines for word in line.split()] + [2]


def test_killed_it_goes_on_where_it_was(jsonl, tmp_path):
    options = ["--vocabulary", 300, "--part-bytes", 500, "--workers", 1]
    run(jsonl, "--output", tmp_path / "whole", *options)
    output = tmp_path / "out"
    command = [str(a) for a in (TOKENIZE, jsonl, "--output", output, *options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(output.glob("parts/*.json"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (output / "tokens.json").exists(), "it ended before it was killed"
    done = {file: file.stat().st_mtime_ns for file in output.glob("parts/0*.bin")}
    assert done
    # What is done is not done again: a part that is spoilt stays so, and is found out.
    victim = min(done)
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-2])
    assert "is not what was written" in run(jsonl, "--output", output, *options, expect=1)
    victim.write_bytes(whole)
    run(jsonl, "--output", output, *options)
    assert contents(output) == contents(tmp_path / "whole")


def test_parts_of_another_text_are_not_taken(texts, jsonl, tmp_path):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", WORDS)
    (tmp_path / "out/parts").mkdir(parents=True)
    (tmp_path / "out/parts/plan.json").write_text("another")
    (tmp_path / "out/parts/000000.json").write_text('{"lengths": [], "ends": [], "bytes": 0}')
    (tmp_path / "out/parts/000000.bin").write_bytes(b"")
    run(jsonl, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    assert len(read_megatron(tmp_path / "out")) == sum(map(bool, texts))


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', [], 'text.jsonl, line 2 from byte 0: no JSON object with a text named "text"'),
        ('{"text": 3}\n', [], "no JSON object with a text"),
        ("[]\n", [], "no JSON object with a text"),
        ('{"text": "\\ud800"}\n', [], "no JSON object with a text"),
        ("", [], "there is no text in these files"),
        ('{"text": "a"}\n', ["--vocabulary", 200], "--vocabulary 200: a tokenizer of bytes has at least 257 tokens"),
        ('{"text": "a"}\n', ["--vocabulary", 300, "--end-of-text", "</s>"], "the tokenizer has no token </s>"),
        ('{"text": "a"}\n', ["--tokenizer", "none.json"], "No such file or directory: 'none.json'"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(tmp_path, content, arguments, message):
    (tmp_path / "text.jsonl").write_text(content)
    output = run(tmp_path / "text.jsonl", "--output", tmp_path / "out", *arguments, expect=1)
    assert message in output and "Traceback" not in output


def test_files_that_are_there_are_not_overwritten(jsonl, tmp_path):
    run(jsonl, "--output", tmp_path, "--vocabulary", 300)
    assert "holds token files already" in run(jsonl, "--output", tmp_path, "--vocabulary", 300, expect=1)


def test_help_names_the_options():
    said = run("--help")
    assert all(name in said for name in ("--tokenizer", "--workers", "--format", "--separator", "goes on where it was"))
