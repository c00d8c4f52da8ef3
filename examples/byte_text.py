"""The text that the Python examples train on: batches as in examples/train_lm/data.cpp."""

import numpy
import torch


def seed_of(seed, stream, item):
    """The C++ program's (examples/train_lm/random.cpp)."""

    def mix(bits):
        bits = (bits + 0x9E3779B97F4A7C15) % 2**64
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
        return bits ^ (bits >> 31)

    return mix(mix(mix(seed) ^ ("parameter", "experts", "batch").index(stream)) ^ item)


def generator_of(*what):
    return torch.Generator().manual_seed(seed_of(*what))


class Text:
    """A file's bytes, the last twentieth held out. Batches are inputs and targets [B, S]: this rank's share of the
    sequences, B may be 0.

    Args:
        options: with data, sequence_length, batch_size, validation_sequences, seed and device.
        world: all ranks (anabranch.as_group()).
    """

    def __init__(self, options, world):
        self.options, self.world = options, world
        data = torch.from_numpy(numpy.fromfile(options.data, dtype=numpy.uint8))
        held_out = len(data) // 20
        if held_out <= options.sequence_length:
            raise SystemExit(f"--data {options.data} has {len(data)} bytes, too few for --sequence-length")
        self.training, self.validation = data[: len(data) - held_out], data[len(data) - held_out :]

    def gather(self, text, offsets):
        mine = offsets.tensor_split(self.world.size)[self.world.rank]
        windows = text[mine[:, None] + torch.arange(self.options.sequence_length + 1)].long().to(self.options.device)
        return windows[:, :-1], windows[:, 1:]

    def training_batch(self, step):
        """Depends on seed and step alone."""
        high = len(self.training) - self.options.sequence_length
        generator = generator_of(self.options.seed, "batch", step)
        return self.gather(self.training, torch.randint(high, (self.options.batch_size,), generator=generator))

    def validation_batches(self):
        """Sequences that lie evenly over the held-out text."""
        count, last = self.options.validation_sequences, len(self.validation) - self.options.sequence_length - 1
        offsets = torch.arange(count) * last // max(count - 1, 1)
        return [self.gather(self.validation, piece) for piece in offsets.split(self.options.batch_size)]
