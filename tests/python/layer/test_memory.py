"""plan_memory in Python; what it foresees is measured in tests/memory_plan_test.cpp."""

import pytest
import torch

import anabranch

LAYER = {"hidden_size": 256, "expert_hidden_size": 512, "num_experts": 8, "top_k": 2, "glu": True}


def test_parameters_are_those_of_a_layer():
    for more in ({}, {"bias": True}, {"shared_expert_hidden_size": 128, "shared_expert_gate": True}):
        layer = anabranch.MoE(**LAYER, **more, dtype=torch.bfloat16)
        plan = anabranch.plan_memory(1000, **LAYER, **more, dtype=torch.bfloat16)
        assert sum(plan.parameters.values()) == sum(p.nbytes for p in layer.parameters())


def test_what_is_kept_grows_with_the_tokens():
    plans = [anabranch.plan_memory(tokens, 4, **LAYER) for tokens in (1000, 2000)]
    assert sum(plans[1].saved.values()) == pytest.approx(2 * sum(plans[0].saved.values()), rel=1e-3)
    rows = 4 * 1000 * (1 - (6 * 5) / (8 * 7)) * 256 * 4  # of each rank's tokens those with one of 2 experts in 8
    assert plans[0].saved["rows received"] == pytest.approx(rows, rel=1e-3)
    assert plans[0].peak > sum(plans[0].parameters.values()) + sum(plans[0].saved.values())


def test_a_gpu_is_asked_about_without_one():
    plan = anabranch.plan_memory(16384, 8, **LAYER, dtype=torch.bfloat16, device="cuda")
    assert plan.mailboxes and "MiB" in plan.explain()
    assert not anabranch.plan_memory(16384, 8, **LAYER).mailboxes


def test_refusals():
    with pytest.raises(ValueError, match="tokens = -1"):
        anabranch.plan_memory(-1, **LAYER)
    with pytest.raises(ValueError, match="hidden"):
        anabranch.plan_memory(1, **LAYER, hidden=3)
    with pytest.raises(ValueError, match="load"):
        anabranch.plan_memory(1, **LAYER, load=float("nan"))
