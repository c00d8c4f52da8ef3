"""Numerics of the layer against the dense reference: types, shapes, options, routing, zero tokens."""

import random

import anabranch
import pytest
import reference
import torch
from case import DTYPES, assert_close, expect, parameters_of, separated


def compare(layer, options, x, routing=None):
    """Forward and backward of a layer on one process."""
    dtype = layer.experts.up_weight.dtype
    dy = torch.randn_like(x)
    x = x.clone().requires_grad_()
    out = layer(x, routing)
    (out.output.double() * dy.double()).sum().backward()

    expected = expect(x, dy, parameters_of(layer), options, routing)
    length = 2 * layer.options["hidden_size"] + 3 * layer.options["expert_hidden_size"] + x.numel() // x.shape[-1]
    actual = {name: parameter.grad for name, parameter in layer.named_parameters()} | {"x": x.grad}
    if routing is not None:
        actual["weights"] = routing[1].grad
        assert actual.pop("router.weight") is None
        assert out.balance_loss is None and out.z_loss is None
    for name, gradient in actual.items():
        assert gradient.dtype == (torch.float32 if name == "weights" and dtype != torch.float64 else gradient.dtype)
        assert_close(gradient, expected.gradients[name], expected.magnitudes[name], dtype, length, f"d {name}")
    assert out.output.dtype == dtype
    assert_close(out.output, expected.result.output, expected.magnitudes["output"], dtype, length, "output")
    assert out.expert_load.tolist() == expected.result.load.tolist()
    return out, expected


def random_case(dtype, device, **fixed):
    hidden, inner = random.choice([8, 24, 33]), random.choice([8, 16, 40])
    experts = random.choice([1, 3, 8])
    options = {
        "top_k": random.randint(1, experts),
        "activation": random.choice(["gelu_tanh", "gelu", "silu", "quick_gelu"]),
        # In 16 bits a rounded value may lie on the other side of the limit, where the gradient is another.
        "activation_limit": random.choice([0.0, 0.25]) if dtype in (torch.float32, torch.float64) else 0.0,
        "glu": random.random() < 0.5,
        "bias": random.random() < 0.5,
        "renormalize": random.random() < 0.5,
        "shared_expert_hidden_size": random.choice([0, 0, 12]),
        "recompute": random.random() < 0.5,
        "seed": random.randrange(2**62),
    } | fixed
    options["renormalize"] &= options["top_k"] > 1  # of one expert, a layer refuses it
    layer = anabranch.MoE(hidden, inner, experts, dtype=dtype, device=device, **options)
    plain = {key: options[key] for key in ("top_k", "activation", "glu", "renormalize")}
    return layer, reference.Options(**plain, limit=options["activation_limit"] or torch.inf)


@pytest.mark.parametrize("shape", [(0,), (1,), (37,), (2, 9), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_dense_reference_with_routing_from_outside(dtype, shape, device, seed):
    random.seed(seed)
    layer, options = random_case(dtype, device)
    tokens = torch.Size(shape).numel()
    x = torch.randn(*shape, layer.options["hidden_size"], dtype=dtype, device=device)
    experts = layer.options["num_experts"]
    ids = torch.stack([torch.randperm(experts)[: options.top_k] for _ in range(tokens)] or [torch.empty(options.top_k)])
    ids = ids[:tokens].long().to(device)
    # A gradient times a small weight may lie where fp16 has no more digits, and errs by more than its roundoff.
    weights = torch.rand(tokens, options.top_k, device=device).clamp(min=2.0**-4 if dtype == torch.float16 else 0.0)
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    compare(layer, options, x, (ids, weights))


@pytest.mark.parametrize("shape", [(0,), (1,), (41,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_the_dense_reference_with_its_own_router(dtype, shape, device, seed):
    random.seed(seed)
    layer, options = random_case(dtype, device)
    while True:
        x = torch.randn(*shape, layer.options["hidden_size"], dtype=dtype, device=device)
        if separated(x, layer.router.weight, options.top_k):
            break
    out, expected = compare(layer, options, x)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(out.balance_loss.double().cpu(), expected.result.balance_loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(out.z_loss.double().cpu(), expected.result.z_loss, rtol=tolerance, atol=0)


def test_gradients_of_the_auxiliary_losses(device):
    layer = anabranch.MoE(8, 8, 4, 2, dtype=torch.float64, device=device)
    x = torch.randn(13, 8, dtype=torch.float64, device=device, requires_grad=True)
    out = layer(x)
    (0.3 * out.balance_loss + 0.2 * out.z_loss).backward()

    leaf = x.detach().cpu().requires_grad_()
    parameters = {name: value.requires_grad_() for name, value in parameters_of(layer).items()}
    expected = reference.moe(leaf, parameters, reference.Options(top_k=2))
    (0.3 * expected.balance_loss + 0.2 * expected.z_loss).backward()
    torch.testing.assert_close(x.grad.cpu(), leaf.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(layer.router.weight.grad.cpu(), parameters["router.weight"].grad, rtol=1e-10, atol=1e-14)


def test_one_expert_takes_all(device):
    layer = anabranch.MoE(8, 12, 5, 1, renormalize=False, device=device, dtype=torch.float32)
    ids = torch.full((29, 1), 3, device=device)
    weights = torch.ones(29, 1, device=device, requires_grad=True)
    out, _ = compare(layer, reference.Options(top_k=1), torch.randn(29, 8, device=device), (ids, weights))
    assert out.expert_load.tolist() == [0, 0, 0, 29, 0]
    assert layer.experts.up_weight.grad[0].eq(0).all()


def test_inputs_of_any_strides(device):
    layer = anabranch.MoE(8, 12, 4, 2, device=device)
    x = torch.randn(5, 8, 3, device=device).transpose(1, 2)
    torch.testing.assert_close(layer(x).output, layer(x.contiguous()).output, rtol=0, atol=0)


def test_two_runs_agree_bit_for_bit(device):
    layer = anabranch.MoE(16, 24, 8, 2, glu=True, device=device)
    x = torch.randn(50, 16, device=device, requires_grad=True)
    results = []
    for _ in range(2):
        layer.zero_grad()
        x.grad = None
        out = layer(x)
        out.output.sin().sum().backward()
        results.append([out.output, x.grad] + [parameter.grad for parameter in layer.parameters()])
    for first, second in zip(*results):
        assert torch.equal(first, second)


@pytest.mark.parametrize("engine", ["auto", "deterministic", *anabranch.grouped_gemm_engines("cpu")])
def test_engines_by_name(engine):
    layer = anabranch.MoE(8, 12, 4, 2, engine=engine, dtype=torch.float32)
    weights = torch.rand(9, 2, requires_grad=True)
    ids = torch.tensor([[0, 1], [1, 2], [2, 3]]).repeat(3, 1)
    compare(layer, reference.Options(top_k=2), torch.randn(9, 8), (ids, weights))
