"""Options in JSON as operators take them: whatever the text, an error or options, and the process lives."""

import json
import os
import random
import time

import anabranch  # noqa: F401  the operators
import pytest
import torch

SOUND = json.dumps(
    {"hidden_size": 8, "expert_hidden_size": 12, "num_experts": 4, "top_k": 2, "glu": True, "activation": "silu"}
)
WORDS = [
    *("{", "}", "[", "]", ":", ",", '"', "null", "true", "-1", "0", "1.5", "1e999", "NaN", "\\u0000", "\x00", "ä"),
    *("9223372036854775808", "18446744073709551616", '"hidden_size"', '"seed"', '"engine"', '"jitter"', '"silu"'),
]
SECONDS = float(os.environ.get("ANABRANCH_TEST_FUZZ_SECONDS", "2"))


def parse(text):
    return torch.ops.anabranch.parameter_names(text)


@pytest.mark.parametrize(("left", "right"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("around", ["{}", '{{"top_k": {}}}', '{{"unknown": {}}}'])
def test_a_million_brackets(left, right, around):
    depth = 1_000_000
    with pytest.raises((ValueError, RuntimeError), match="options"):
        parse(around.format(left * depth + "1" + right * depth))


def mutated(generator):
    text = SOUND
    for _ in range(generator.randint(1, 6)):
        begin = generator.randint(0, len(text))
        end = min(len(text), begin + generator.choice([0, 0, 1, 4, 16]))
        text = text[:begin] + generator.choice(["", *WORDS]) * generator.choice([1, 1, 1, 2, 1000]) + text[end:]
    return text


def test_fuzzed_options(seed):
    generator = random.Random(seed)
    end, counts = time.monotonic() + SECONDS, {True: 0, False: 0}
    while time.monotonic() < end:
        text = mutated(generator)
        try:
            names = parse(text)
        except (ValueError, RuntimeError) as error:
            assert not isinstance(error, UnicodeError) and "options" in str(error), (text, error)
            counts[False] += 1
        else:
            assert "router.weight" in names and isinstance(json.loads(text, strict=False), dict), text
            counts[True] += 1
    assert counts[True] and counts[False], counts
