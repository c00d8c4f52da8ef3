"""What the Python examples train on: the batches of examples/train_lm, of text, token files or random tokens."""

import json
from pathlib import Path

import numpy
import torch

STREAMS = ("parameter", "experts", "batch", "sample", "held out", "order", "epoch", "routing")
LLM_C = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # magic number and version
MEGATRON = {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def mixed_bits(bits):
    """SplitMix64's finalizer, of a number or an array of uint64 (examples/train_lm/data/random.cpp)."""
    bits = numpy.asarray(bits, dtype=numpy.uint64) + numpy.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> numpy.uint64(31))


def seed_of(seed, stream, item):
    with numpy.errstate(over="ignore"):
        seed = mixed_bits(seed % 2**64)
        return int(mixed_bits(mixed_bits(seed ^ numpy.uint64(STREAMS.index(stream))) ^ numpy.uint64(item)))


def generator_of(*what):
    return torch.Generator().manual_seed(seed_of(*what))


class Source:
    """Sequences of tokens; a subclass has `training` and `validation`, arrays of tokens, and where batches begin.

    Batches are inputs and targets [B, S] on the device: this rank's share of the sequences, B may be 0.

    Args:
        options: with data, sequence_length, batch_size, validation_sequences, seed and device.
        world: all ranks (anabranch.as_group()).
    """

    bytes_per_token: float | None = None
    vocabulary: int

    def __init__(self, options, world):
        self.options, self.world = options, world

    def mine(self, items):
        return numpy.array_split(items, self.world.size)[self.world.rank]

    def windows(self, tokens, offsets):
        """[B, S + 1]"""
        return tokens[self.mine(offsets)[:, None] + numpy.arange(self.options.sequence_length + 1)]

    def batch(self, windows):
        windows = torch.from_numpy(numpy.ascontiguousarray(windows.astype(numpy.int64)))
        if windows.numel() and (windows.min() < 0 or windows.max() >= self.vocabulary):
            raise SystemExit(f"--data {self.options.data} holds a token that is not below {self.vocabulary}")
        windows = windows.to(self.options.device)
        return windows[:, :-1], windows[:, 1:]

    def training_offsets(self, step):
        raise NotImplementedError

    def training_batch(self, step):
        """Depends on seed and step alone."""
        return self.batch(self.windows(self.training, self.training_offsets(step)))

    def validation_batches(self):
        """Sequences that lie evenly over the held-out text."""
        count, last = self.options.validation_sequences, len(self.validation) - self.options.sequence_length - 1
        offsets = numpy.arange(count) * last // max(count - 1, 1)
        for first in range(0, count, self.options.batch_size):
            yield self.batch(self.windows(self.validation, offsets[first : first + self.options.batch_size]))


class Text(Source):
    """A file's bytes, the last twentieth held out."""

    bytes_per_token, vocabulary = 1.0, 256

    def __init__(self, options, world):
        super().__init__(options, world)
        data = numpy.fromfile(options.data, dtype=numpy.uint8)
        held_out = len(data) // 20
        if held_out <= options.sequence_length:
            raise SystemExit(f"--data {options.data} has {len(data)} bytes, too few for --sequence-length")
        self.training, self.validation = data[: len(data) - held_out], data[len(data) - held_out :]

    def training_offsets(self, step):
        high = len(self.training) - self.options.sequence_length
        generator = generator_of(self.options.seed, "batch", step)
        return torch.randint(high, (self.options.batch_size,), generator=generator).numpy()


def read_llm_c(file):
    header = numpy.fromfile(file, "<i4", 256)
    dtype = LLM_C.get(tuple(header[:2]))
    if len(header) < 256 or not dtype or file.stat().st_size != 1024 + header[2] * numpy.dtype(dtype).itemsize:
        raise SystemExit(f"--data {file} is no whole token file of llm.c's, and there is no {file.with_suffix('.idx')}")
    tokens = numpy.memmap(file, dtype, "r", offset=1024)
    return tokens, len(tokens) - len(tokens) // 20


def read_megatron(file):
    index = file.with_suffix(".idx").read_bytes()
    dtype = MEGATRON.get(index[17]) if len(index) >= 34 and index.startswith(b"MMIDIDX\0\0\1" + b"\0" * 7) else None
    sequences, ends = numpy.frombuffer(index, "<i8", 2, 18) if dtype else (0, 0)
    if not dtype or len(index) != 34 + 12 * int(sequences) + 8 * int(ends):
        raise SystemExit(f"--data {file.with_suffix('.idx')} is no whole index of Megatron's")
    lengths = numpy.frombuffer(index, "<i4", sequences, 34).astype(numpy.int64)
    begins = numpy.append(0, numpy.cumsum(lengths))
    if begins[-1] * numpy.dtype(dtype).itemsize != file.stat().st_size:
        raise SystemExit(f"--data {file} has not the size that its index says")
    first_sequences = numpy.frombuffer(index, "<i8", ends, 34 + 12 * sequences)
    starts, size = begins[first_sequences[first_sequences < sequences]], int(begins[-1])
    last = starts[starts >= size - size // 20]
    return numpy.memmap(file, dtype, "r"), int(last[0]) if len(last) else size - size // 20


class Joined:
    """Arrays end to end, of which some places can be read."""

    def __init__(self, arrays):
        self.arrays = [array for array in arrays if len(array)]
        self.begins = numpy.cumsum([0] + [len(array) for array in self.arrays])

    def __len__(self):
        return int(self.begins[-1])

    def __getitem__(self, places):
        out = numpy.empty(places.shape, numpy.int64)
        for array, begin, end in zip(self.arrays, self.begins, self.begins[1:]):
            here = (places >= begin) & (places < end)
            out[here] = array[places[here] - begin]
        return out


class TokenFiles(Source):
    """Token files of Megatron's or llm.c's: what examples/train_lm/data/data.h says of them."""

    def __init__(self, options, world):
        super().__init__(options, world)
        path = Path(options.data)
        files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
        if not files:
            raise SystemExit(f"--data {path} is a directory without token files (*.bin)")
        read = [read_megatron(file) if file.with_suffix(".idx").exists() else read_llm_c(file) for file in files]
        if any("_val_" in file.name for file in files):
            read = [(array, 0 if "_val_" in file.name else len(array)) for (array, _), file in zip(read, files)]
        self.training = Joined([array[:last] for array, last in read])
        self.validation = Joined([array[last:] for array, last in read])
        about = path / "tokens.json" if path.is_dir() else path.with_suffix(".json")
        about = json.loads(about.read_text()) if about.exists() else {}
        self.vocabulary = about.get("vocabulary") or int(max(array.max() for array, _ in read)) + 1
        self.bytes_per_token = about.get("bytes_per_token")
        length = options.sequence_length
        self.sequences = len(self.training) // length - 1  # of an epoch
        if self.sequences < 1 or len(self.validation) <= length:
            raise SystemExit(f"--data {path} has too few tokens for --sequence-length")

    def shuffled(self, index, epoch):
        """Feistel's network of examples/train_lm/data_order.cpp."""
        half = numpy.uint64(((self.sequences - 1).bit_length() + 1) // 2)
        mask = (numpy.uint64(1) << half) - numpy.uint64(1)
        keys = [numpy.uint64(seed_of(self.options.seed, "order", 4 * epoch + round)) for round in range(4)]
        index = numpy.uint64(index)
        while True:
            left, right = index >> half, index & mask
            for key in keys:
                left, right = right, left ^ (mixed_bits(key ^ right) & mask)
            index = left << half | right
            if index < self.sequences:
                return int(index)

    def training_offsets(self, step):
        options, offsets = self.options, []
        with numpy.errstate(over="ignore"):
            for number in range((step - 1) * options.batch_size, step * options.batch_size):
                epoch, index = divmod(number, self.sequences)
                begin = seed_of(options.seed, "epoch", epoch) % options.sequence_length
                offsets.append(begin + self.shuffled(index, epoch) * options.sequence_length)
        return numpy.array(offsets)


class SyntheticTokens(Source):
    """Uniformly random tokens."""

    def __init__(self, options, world):
        super().__init__(options, world)
        self.vocabulary = int(options.data.partition(":")[2])

    def drawn(self, stream, numbers):
        starts = [seed_of(self.options.seed, stream, int(number)) for number in self.mine(numbers)]
        starts = numpy.array(starts, numpy.uint64)[:, None]
        places = numpy.arange(self.options.sequence_length + 1, dtype=numpy.uint64)
        with numpy.errstate(over="ignore"):
            return self.batch(mixed_bits(starts + places) % numpy.uint64(self.vocabulary))

    def training_batch(self, step):
        return self.drawn("batch", numpy.arange(self.options.batch_size) + (step - 1) * self.options.batch_size)

    def validation_batches(self):
        for first in range(0, self.options.validation_sequences, self.options.batch_size):
            last = min(first + self.options.batch_size, self.options.validation_sequences)
            yield self.drawn("held out", numpy.arange(first, last))


def open_data(options, world):
    path = Path(options.data)
    if options.data.startswith("synthetic:"):
        return SyntheticTokens(options, world)
    if path.is_dir() or path.suffix == ".bin":
        return TokenFiles(options, world)
    return Text(options, world)
