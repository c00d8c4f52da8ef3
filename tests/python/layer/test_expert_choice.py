"""Experts that choose their tokens, sequence by sequence, against sorts in plain PyTorch, at any number of ranks."""

import math

import anabranch
import pytest
import reference
import torch
from case import parameters_of
from ranks import run_ranks

EXPERTS, TOP_K, HIDDEN, SEQUENCES, LENGTH = 7, 2, 8, 6, 9
OPTIONS = dict(gate="expert_choice", glu=True, activation="silu", seed=5, dtype=torch.float64, renormalize=False)


def chosen(scores, padding):
    """[S, L, E] whether an expert takes a token: of each sequence the best, of equal ones the first."""
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for s, of_sequence in enumerate(scores.detach()):
        tokens = (~padding[s]).nonzero().flatten()
        share = math.ceil(len(tokens) * TOP_K / EXPERTS)
        for expert in range(EXPERTS):
            order = sorted(tokens.tolist(), key=lambda token, e=expert: (-of_sequence[token, e].item(), token))
            taken[s, order[:share], expert] = True
    return taken


def expected(x, padding, parameters):
    scores = (x @ parameters["router.weight"].T).softmax(-1)
    taken = chosen(scores, padding)
    plain = reference.Options(top_k=EXPERTS, glu=True, activation="silu")
    ids = torch.arange(EXPERTS).expand(x.shape[0] * x.shape[1], EXPERTS)
    rows = x.flatten(0, 1)
    return reference.mix(rows, parameters, ids, (scores * taken).flatten(0, 1), plain).view(x.shape), taken


def batch(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, SEQUENCES, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    x[1, 3:6] = x[1, 3]  # alike
    padding = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.3
    padding[2] = True
    if kind != "some":
        padding.fill_(kind == "all")
    return x, dy, padding


def step_of_a_rank(rank, size, seed, kind):
    x, dy, padding = batch(seed, kind)
    own = slice(SEQUENCES * rank // size, SEQUENCES * (rank + 1) // size)
    layer = anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, **OPTIONS)
    leaf = x[own].clone().requires_grad_()
    out = layer(leaf, padding_mask=padding[own])
    (out.output * dy[own]).sum().backward()
    anabranch.finish_gradients(layer)
    return {
        "output": out.output.tolist(),
        "x": leaf.grad.tolist(),
        "ids": out.expert_ids.tolist(),
        "load": out.expert_load.tolist(),
        **{name: parameter.grad.tolist() for name, parameter in layer.named_parameters()},
    }


@pytest.mark.parametrize("size, kind", [(1, "some"), (2, "none"), (3, "some"), (4, "some"), (2, "all")])
def test_equals_sorts_at_any_number_of_ranks(size, kind, seed):
    found = run_ranks(size, step_of_a_rank, seed, kind)
    x, dy, padding = batch(seed, kind)
    layer = anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, group=anabranch.groups.alone(), **OPTIONS)
    leaves = {name: value.requires_grad_() for name, value in parameters_of(layer).items()}
    leaf = x.clone().requires_grad_()
    output, taken = expected(leaf, padding, leaves)
    ((output * dy).sum() / size).backward()

    def check(actual, wanted, what):
        actual = torch.tensor(actual, dtype=torch.float64).reshape(wanted.shape)
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}")

    check([row for rank in found for row in rank["output"]], output.detach(), "output")
    check([row for rank in found for row in rank["x"]], leaf.grad * size, "x")
    ids = torch.tensor([row for rank in found for row in rank["ids"]])
    assert ids.eq(torch.where(taken, torch.arange(EXPERTS), -1).flatten(0, 1)).all()
    for rank in found:
        assert rank["load"] == taken.sum((0, 1)).tolist()
        check(rank["router.weight"], leaves["router.weight"].grad, "router.weight")
    for name in ("experts.up_weight", "experts.down_weight"):
        check([row for rank in found for row in rank[name]], leaves[name].grad, name)


def layer_of(device, **more):
    options = {**OPTIONS, **more}
    return anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, device=device, **options)


@pytest.mark.parametrize("score, renormalize", [("softmax", True), ("sigmoid", False)])
def test_gradcheck(score, renormalize, device):
    layer = layer_of(device, router_score=score, renormalize=renormalize, balance_coefficient=1.0)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64, device=device, requires_grad=True)
    padding = torch.rand(2, 5, device=device) < 0.2

    def run(rows):
        out = layer(rows, padding_mask=padding)
        return out.output, out.balance_loss

    assert torch.autograd.gradcheck(run, (x,))


def test_loads_are_equal_and_a_full_choice_is_all(device):
    x = torch.randn(3, 21, HIDDEN, dtype=torch.float64, device=device)
    out = layer_of(device)(x)
    assert out.expert_load.tolist() == [3 * 6] * EXPERTS  # of 21 tokens 6 a sequence
    all_experts = anabranch.MoE(HIDDEN, 6, EXPERTS, EXPERTS, device=device, **OPTIONS)
    plain = anabranch.MoE(HIDDEN, 6, EXPERTS, EXPERTS, device=device, **{**OPTIONS, "gate": "top_k"})
    torch.testing.assert_close(all_experts(x).output, plain(x).output)


def test_in_evaluation_a_token_depends_on_no_other(device):
    layer = layer_of(device).eval()
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64, device=device)
    out = layer(x)
    assert out.expert_ids.shape == (18, TOP_K)
    for length in (1, 4):
        torch.testing.assert_close(layer(x[:, :length]).output, out.output[:, :length])
    plain = anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, device=device, **{**OPTIONS, "gate": "top_k"})
    torch.testing.assert_close(plain(x).output, out.output)


def test_compiled_recorded_and_by_experts_of_ones_own(device):
    layer = layer_of(device)
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64, device=device)
    out = layer(x)
    compiled = torch.compile(lambda rows: layer(rows).output, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), out.output, rtol=0, atol=0)
    with anabranch.record_routing(layer) as record:
        layer(x)
    with anabranch.replay_routing(layer, record):
        torch.testing.assert_close(layer(x).output, out.output, rtol=0, atol=0)
    own = anabranch.MoE(
        HIDDEN, 6, EXPERTS, TOP_K, device=device, **{**OPTIONS, "activation": torch.nn.functional.silu}
    )
    torch.testing.assert_close(own(x).output, out.output)
    empty = layer(x[:, :0])
    assert empty.output.shape == (2, 0, HIDDEN) and empty.expert_load.sum() == 0
