"""Muon against each matrix on its own, in plain PyTorch, at several numbers of ranks."""

import copy
import math

import anabranch
import pytest
import torch
from ranks import run_ranks
from small import Small, batch_of, expected_gradients, part_of, whole_parameters

STEPS = 3
OPTIONS = dict(lr=0.02, momentum=0.9, weight_decay=0.05)


def plain_step(matrix, momentum, gradient):
    """One matrix: what becomes of it and of its momentum."""
    momentum = 0.9 * momentum + gradient
    x = gradient + 0.9 * momentum
    x = x / (x.pow(2).sum().sqrt() + 1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    return matrix - 0.02 * (0.2 * math.sqrt(max(matrix.shape)) * x + 0.05 * matrix), momentum


def matrices_of(name, value):
    """[count, m, n]: gate and up of the experts apart."""
    parts = 2 if name.endswith("up_weight") else 1
    return value.reshape(-1, value.shape[-2] // parts, value.shape[-1])


def is_matrix(name, value):
    return value.ndim >= 2 and "router" not in name and not name.endswith("bias")


def plain_training(seed, size):
    """All parameters after the steps; those that are no matrices stay."""
    values = whole_parameters(seed)
    momenta = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(STEPS):
        gradients = expected_gradients(values, [batch_of(seed + step, 0, 1)], size)
        for name, value in values.items():
            if is_matrix(name, value):
                each = [matrices_of(name, tensor) for tensor in (value, momenta[name], gradients[name])]
                stepped = [plain_step(*matrices) for matrices in zip(*each)]
                values[name] = torch.stack([matrix for matrix, _ in stepped]).view(value.shape)
                momenta[name] = torch.stack([momentum for _, momentum in stepped]).view(value.shape)
    return values


def trained(rank, size, seed):
    model = Small(seed)
    matrices = [(name, p) for name, p in model.named_parameters() if is_matrix(name, p)]
    groups = [{"params": [p], "parts": 2 if name.endswith("up_weight") else 1} for name, p in matrices]
    optimizer = anabranch.Muon(groups, **OPTIONS)
    for step in range(STEPS):
        model.zero_grad()
        x, dy = batch_of(seed + step, rank, size)
        (model(x) * dy).sum().backward()
        anabranch.finish_gradients(model)
        optimizer.step()
    expected = plain_training(seed, size)
    for name, p in model.named_parameters():
        wanted = part_of(name, expected[name], rank, size)
        # Errors of the gradients, see assert_gradients, grow at most by 3.4445⁵ < 500 in each step.
        allowed = 1000 * 500 * STEPS * 2.0**-53 * max(1.0, expected[name].abs().max().item())
        assert (p - wanted).abs().max().item() <= allowed, name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_muon_is_that_of_each_matrix(size, seed):
    run_ranks(size, trained, seed)


def test_bf16_parameters_have_a_momentum_of_fp32(seed):
    parameter = torch.nn.Parameter(torch.randn(2, 8, 4, dtype=torch.bfloat16))
    before = parameter.detach().clone()
    optimizer = anabranch.Muon([parameter], lr=0.5)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["momentum_buffer"].dtype == torch.float32
    assert not torch.equal(parameter, before)


def test_its_state_is_saved_and_loaded(seed):
    parameter = torch.nn.Parameter(torch.randn(8, 4))
    other = torch.nn.Parameter(parameter.detach().clone())
    first, second = anabranch.Muon([parameter]), anabranch.Muon([other])
    parameter.grad = torch.randn_like(parameter)
    first.step()
    other.data.copy_(parameter.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other.grad = parameter.grad = torch.randn_like(parameter)
    first.step()
    second.step()
    assert torch.equal(parameter, other)


def test_opcheck(seed):
    torch.library.opcheck(torch.ops.anabranch.orthogonalize, (torch.randn(3, 4, 8), 5))


@pytest.mark.parametrize(
    ("shape", "more", "message"),
    [((4,), {}, "is not 1 matrices"), ((3, 4), {"parts": 2}, "is not 2 matrices"), ((4, 4), {"momentum": 1}, "momentum < 1")],
)
def test_what_muon_refuses(shape, more, message):
    with pytest.raises(ValueError, match=message):
        anabranch.Muon([torch.nn.Parameter(torch.zeros(shape))], **more)
