"""The files that are written: Megatron's and llm.c's."""

import os

import numpy

LLM_C = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # magic number and version
MEGATRON = {"uint16": 8, "int32": 4}  # code of the type


def dtype_of(kind, vocabulary):
    wide = "uint32" if kind == "llm.c" else "int32"
    return "uint16" if vocabulary <= 65536 else wide


def write_whole(path, *arrays):
    """Under its name only once it is on disk."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "wb") as file:
        for array in arrays:
            file.write(array if isinstance(array, bytes) else array.tobytes())
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class MegatronFiles:
    def __init__(self, output, dtype):
        self.output, self.dtype = output, dtype
        self.file = open(output / "tokens.bin.partial", "wb")
        self.lengths, self.documents = [], [0]

    def add(self, tokens, about):
        self.file.write(tokens.tobytes())
        first = len(self.lengths)
        self.lengths += about["lengths"]
        self.documents += [first + i + 1 for i, is_end in enumerate(about["ends"]) if is_end]

    def close(self):
        self.file.close()
        lengths, documents = numpy.array(self.lengths, "<i4"), numpy.array(self.documents, "<i8")
        begins = numpy.cumsum(lengths, dtype="<i8") - lengths
        header = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([MEGATRON[self.dtype]])
        counts = numpy.array([len(lengths), len(documents)], "<u8")
        places = begins * numpy.dtype(self.dtype).itemsize
        (self.output / "tokens.bin.partial").replace(self.output / "tokens.bin")
        write_whole(self.output / "tokens.idx", header, counts, lengths, places, documents)


class LlmCFiles:
    def __init__(self, output, dtype, shard_tokens):
        self.output, self.dtype, self.shard_tokens = output, dtype, shard_tokens
        self.waiting, self.count, self.shards = [], 0, 0

    def add(self, tokens, _about):
        self.waiting.append(tokens)
        self.count += len(tokens)
        while self.count >= self.shard_tokens:
            self.write(self.shard_tokens)

    def write(self, count):
        tokens = numpy.concatenate(self.waiting)
        header = numpy.zeros(256, "<i4")
        header[:3] = *LLM_C[self.dtype], count
        write_whole(self.output / f"tokens_{self.shards:06}.bin", header, tokens[:count])
        self.waiting, self.count, self.shards = [tokens[count:]], len(tokens) - count, self.shards + 1

    def close(self):
        if self.count or not self.shards:
            self.write(self.count)
