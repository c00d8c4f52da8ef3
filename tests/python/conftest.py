"""Seeds that are printed and can be given again, devices, and what shows no failure but a skip."""

from __future__ import annotations

import os
import random

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Fresh for each test; a failing test shows it. ANABRANCH_TEST_SEED gives it again."""
    value = int(os.environ.get("ANABRANCH_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"ANABRANCH_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        from anabranch.features import with_cuda

        if not with_cuda():
            pytest.skip("anabranch was built without CUDA")
    return torch.device(request.param)
