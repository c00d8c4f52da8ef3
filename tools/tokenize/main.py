"""Turns text into the token files that examples/train_lm reads.

    tools/anabranch-tokenize corpus/*.jsonl --output data/corpus     # trains a tokenizer of 32,768 tokens first
    tools/anabranch-tokenize book.txt --tokenizer tokenizer.json --output data/book --format llm.c

A line of a .jsonl file (also .jsonl.gz) is a document: an object with the field "text". Any other file is text in
UTF-8 (also .gz): one document, or several with --separator. Each document ends with the end-of-text token.

DIR holds the files (megatron: tokens.bin and tokens.idx; llm.c: tokens_000000.bin and on), tokenizer.json and
tokens.json, which says what they are. Interrupted, the same command goes on where it was: what is done lies in
DIR/parts until all is. The files do not depend on the number of workers.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import numpy
from files import LlmCFiles, MegatronFiles, dtype_of, write_whole
from text import Refused, parts_of, pieces_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

NAME = os.environ.get("ANABRANCH_PROGRAM", "anabranch-tokenize")
END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


def train_tokenizer(parts, options):
    """A byte-level BPE: any text is of its tokens."""
    if options.vocabulary < 257:
        raise Refused(f"--vocabulary {options.vocabulary}: a tokenizer of bytes has at least 257 tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary, special_tokens=[END_OF_TEXT], show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip

    def texts():
        """From all over the data, --train-bytes of it."""
        wanted, total = options.train_bytes, sum(end - begin for _, begin, end in parts)
        for part in parts:
            left = wanted * (part[2] - part[1]) / total
            for text, _ in pieces_of(part, options.field, options.separator):
                if left <= 0:
                    break
                left -= len(text)
                yield text

    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def end_of_text_of(tokenizer, name):
    found = [known for known in ([name] if name else KNOWN_ENDS) if tokenizer.token_to_id(known) is not None]
    if not found:
        raise Refused(f"the tokenizer has no token {name or ' or '.join(KNOWN_ENDS)}: name it with --end-of-text")
    return tokenizer.token_to_id(found[0])


def start_worker(file, end, dtype, folder, options):
    global worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(file)
    tokenizer.encode_special_tokens = True  # a text that spells one does not end a document
    worker = tokenizer, end, dtype, folder, options


def encode_part(number_and_part):
    """NUMBER.bin: tokens. NUMBER.json: lengths of the pieces, which of them end documents, bytes of text."""
    number, part = number_and_part
    tokenizer, end, dtype, folder, options = worker
    tokens, lengths, ends, size = [], [], [], 0
    for text, is_end in pieces_of(part, options.field, options.separator):
        ids = tokenizer.encode(text, add_special_tokens=False).ids + [end] * is_end
        if ids:
            tokens.append(numpy.array(ids, dtype=dtype))
            lengths.append(len(ids))
            ends.append(is_end)
        size += len(text.encode())
    write_whole(folder / f"{number:06}.bin", *tokens)
    about = {"lengths": lengths, "ends": ends, "bytes": size}
    write_whole(folder / f"{number:06}.json", json.dumps(about).encode())
    return part[2] - part[1]


def encode_all(parts, file, end, dtype, folder, options):
    todo = [(i, part) for i, part in enumerate(parts) if not (folder / f"{i:06}.json").exists()]
    sizes = [part[2] - part[1] for part in parts]
    done = sum(sizes) - sum(part[2] - part[1] for _, part in todo)
    bar = tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with bar, multiprocessing.get_context("spawn").Pool(
        min(options.workers, len(todo)) or 1, start_worker, (file, end, dtype, folder, options)
    ) as pool:
        for size in pool.imap_unordered(encode_part, todo):
            bar.update(size)


def join(parts, folder, files, dtype):
    """Returns tokens, documents and bytes of text."""
    totals = numpy.zeros(3, dtype=numpy.int64)
    for number in tqdm(range(len(parts)), unit="part", desc="joining", disable=None):
        about = json.loads((folder / f"{number:06}.json").read_text())
        tokens = numpy.fromfile(folder / f"{number:06}.bin", dtype)
        if len(tokens) != sum(about["lengths"]):
            raise Refused(f"{folder}/{number:06}.bin is not what was written: delete {folder} and start again")
        files.add(tokens, about)
        totals += [len(tokens), sum(about["ends"]), about["bytes"]]
    files.close()
    return totals.tolist()


def prepare(options, parts):
    """DIR with its tokenizer, and only such parts in it as were made with the same. Returns the tokenizer."""
    file, folder = options.output / "tokenizer.json", options.output / "parts"
    sizes = {name: [os.path.getsize(name), os.path.getmtime(name)] for name, _, _ in parts}
    given = options.tokenizer and hashlib.sha256(options.tokenizer.read_bytes()).hexdigest()
    plan = [parts, sizes, given or [options.vocabulary, options.train_bytes], options.field, options.separator]
    plan = json.dumps([*plan, options.end_of_text, options.format])
    options.output.mkdir(parents=True, exist_ok=True)
    if folder.exists() and (not (folder / "plan.json").exists() or (folder / "plan.json").read_text() != plan):
        shutil.rmtree(folder)
    if not folder.exists():
        if any(options.output.glob("tokens*.bin")):
            raise Refused(f"{options.output} holds token files already: delete them, or give another --output")
        tokenizer = Tokenizer.from_file(str(options.tokenizer)) if given else train_tokenizer(parts, options)
        write_whole(file, tokenizer.to_str().encode())
        folder.mkdir()
        write_whole(folder / "plan.json", plan.encode())
    return Tokenizer.from_file(str(file))


def tokenize(options):
    parts = parts_of(options.files, options.part_bytes)
    if not parts:
        raise Refused("there is no text in these files")
    tokenizer = prepare(options, parts)
    vocabulary = tokenizer.get_vocab_size(with_added_tokens=True)
    end, dtype = end_of_text_of(tokenizer, options.end_of_text), dtype_of(options.format, vocabulary)
    folder = options.output / "parts"
    encode_all(parts, str(options.output / "tokenizer.json"), end, dtype, folder, options)
    if options.format == "llm.c":
        files = LlmCFiles(options.output, dtype, options.shard_tokens)
    else:
        files = MegatronFiles(options.output, dtype)
    tokens, documents, size = join(parts, folder, files, dtype)
    about = {
        "format": options.format, "vocabulary": vocabulary, "end_of_text": end, "tokens": tokens,
        "documents": documents, "bytes": size, "bytes_per_token": size / tokens, "tokenizer": "tokenizer.json",
    }  # fmt: skip
    write_whole(options.output / "tokens.json", json.dumps(about, indent=2).encode() + b"\n")
    shutil.rmtree(folder)
    if options.json:
        print(json.dumps(about, indent=1))
        return
    print(f"{tokens:,} tokens of {documents:,} documents, {size / tokens:.2f} bytes a token, in {options.output}")
    print(f"to train on them: train_lm --data {options.output}")


def main():
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(NAME, description=__doc__, formatter_class=kind)
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="text, or .jsonl; either may be compressed (.gz)")
    add("--output", required=True, type=Path, metavar="DIR", help="for all that is written")
    add("--format", choices=["megatron", "llm.c"], default="megatron", help="of the token files (default: megatron)")
    add("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json of Hugging Face's (default: one is trained)")
    add("--vocabulary", type=int, default=32768, metavar="N", help="of a tokenizer that is trained (default: 32768)")
    add("--train-bytes", type=float, default=1e9, metavar="N", help="text that it is trained on (default: 1e9)")
    add("--end-of-text", metavar="TOKEN", help=f"what ends a document (default: {END_OF_TEXT} or another known one)")
    add("--field", default="text", metavar="NAME", help="of .jsonl, what holds the text (default: text)")
    add("--separator", metavar="STRING", help="what stands between documents of a text file, within a line")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: the cores)")
    add("--part-bytes", type=int, default=64 << 20, metavar="N", help="text of a part (default: 64 MiB)")
    add("--shard-tokens", type=int, default=10**8, metavar="N", help="tokens of an llm.c file (default: 100 million)")
    add("--json", action="store_true", help="print what tokens.json says, in the place of text")
    options = parser.parse_args()
    for name, least in (("workers", 1), ("part_bytes", 1), ("shard_tokens", 1), ("train_bytes", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if options.shard_tokens >= 2**31:
        parser.error("--shard-tokens must be below 2^31: llm.c's header holds 32 bits")
    try:
        tokenize(options)
    except (Refused, OSError) as error:
        sys.exit(f"{NAME}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{NAME}: interrupted; the same command goes on from here")


if __name__ == "__main__":
    main()
