"""`import anabranch_baselines`: the engines that anabranch is compared with, beside its own."""

import random

import anabranch
import pytest
import torch

BEFORE = anabranch.grouped_gemm_engines("cpu")

import anabranch_baselines  # noqa: E402, F401

BASELINES = ["padded_bmm", "block_diagonal", "block_sparse", "block_sparse_64", "block_sparse_32", "torch_grouped_mm"]


def test_they_join_the_engines():
    assert BEFORE == ["cpu"]
    assert anabranch.grouped_gemm_engines("cpu") == ["cpu", *BASELINES]


@pytest.mark.parametrize("engine", BASELINES)
def test_a_layer_runs_on_them(engine):
    seed = random.randrange(1 << 31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    x = torch.randn(37, 16)
    dy = torch.randn(37, 16)

    def outcome(name):
        layer = anabranch.MoE(16, 24, 4, 2, engine=name, seed=7)
        leaf = x.clone().requires_grad_()
        y = layer(leaf).output
        y.backward(dy)
        return y.detach(), leaf.grad, layer.experts.up_weight.grad, layer.experts.down_weight.grad

    # fp32 sums of at most 37 products of numbers below 10, in another order.
    for result, expected in zip(outcome(engine), outcome("cpu"), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=37 * 10 * 2**-23)
