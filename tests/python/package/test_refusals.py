"""What would be wrong without a word is refused, with words that name it."""

import anabranch
import anabranch.functional as F
import pytest
import torch
from ranks import run_ranks

IN_PLACE = "modified by an inplace operation"


def make(device="cpu", **more):
    sizes = {"hidden_size": 8, "expert_hidden_size": 12, "num_experts": 4, "top_k": 2, "shared_expert_hidden_size": 6}
    return anabranch.MoE(**{**sizes, "bias": True, "device": device, **more})


def overwrite(tensor):
    with torch.no_grad():
        tensor.add_(1)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_input_without_gradient_is_overwritten(device, autocast):
    """As a static buffer is by the next batch."""
    layer = make(device)
    x = torch.randn(7, 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = layer(x).output.float().sum()
    overwrite(x)
    if autocast:
        loss.backward()  # the layer was given a copy in 16 bits
    else:
        with pytest.raises(RuntimeError, match=IN_PLACE):
            loss.backward()


@pytest.mark.parametrize("name", ["experts.up_weight", "experts.down_weight", "shared_expert.up_weight", "router.weight"])
def test_a_frozen_parameter_is_overwritten(name, device):
    layer = make(device)
    parameter = layer.get_parameter(name).requires_grad_(False)
    loss = layer(torch.randn(7, 8, device=device, requires_grad=True)).output.sum()
    overwrite(parameter)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()


def test_what_backward_does_not_read_may_change(device):
    """A bias for the choice alone is updated between forward and backward by those who accumulate gradients."""
    layer = make(device, expert_bias=True)
    x = torch.randn(7, 8, device=device, requires_grad=True)
    out = layer(x)
    layer.update_expert_bias(out.expert_load, 0.1)
    out.output.sum().backward()
    ids = torch.tensor([[0, 1]] * 7, device=device)
    weights = torch.rand(7, 2, device=device)
    loss = layer(x, (ids, weights)).output.sum()
    overwrite(layer.router.weight)  # routing from outside does without
    overwrite(weights)  # they have travelled
    loss.backward()


def overwritten_on_two_ranks(rank, size):
    layer = make()
    layer.experts.down_weight.requires_grad_(False)
    loss = layer(torch.randn(7, 8, requires_grad=True)).output.sum()
    overwrite(layer.experts.down_weight)
    with pytest.raises(RuntimeError, match=IN_PLACE):
        loss.backward()


def test_a_frozen_parameter_is_overwritten_on_two_ranks():
    run_ranks(2, overwritten_on_two_ranks)


def test_double_backward_of_the_layer(device):
    layer = make(device)
    x = torch.randn(7, 8, device=device, requires_grad=True)
    out = layer(x)
    for loss in (out.output.sum(), out.balance_loss, out.z_loss):
        with pytest.raises(NotImplementedError, match="differentiated again"):
            torch.autograd.grad(loss, list(layer.router.parameters()), create_graph=True)
    torch.autograd.grad(out.output.sum() + out.z_loss, x)  # and once is well


def test_double_backward_of_the_functions():
    logits = torch.randn(7, 4, requires_grad=True)
    x, weight = torch.randn(7, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    for loss, leaf in (
        (F.route(logits, 2).weights.square().sum(), logits),
        (F.grouped_gemm(x, weight, torch.tensor([3, 4])).square().sum(), x),
    ):
        with pytest.raises(NotImplementedError, match="differentiated again"):
            torch.autograd.grad(loss, leaf, create_graph=True)
    plan = F.plan(torch.tensor([[0, 1]] * 7), torch.ones(7, 2), 2)
    assert torch.autograd.gradgradcheck(lambda r: F.dispatch(r.square(), plan)[0], (x.detach().double().requires_grad_(),))


def test_routing_on_the_meta_device():
    layer = make()
    ids, weights = torch.tensor([[0, 1]] * 7), torch.ones(7, 2)
    for routing in ((ids.to("meta"), weights.to("meta")), (ids, weights.to("meta")), (ids.to("meta"), weights)):
        with pytest.raises(ValueError, match="meta"):
            layer(torch.randn(7, 8), routing)
        with torch.inference_mode(), pytest.raises(ValueError, match="meta"):
            layer(torch.randn(7, 8), routing)
    with pytest.raises(ValueError, match="meta"):
        F.plan(ids, weights.to("meta"), 4)
    plan = F.plan(ids, weights, 4)
    with pytest.raises(ValueError, match="meta"):
        F.dispatch(torch.randn(7, 8), plan, weights.to("meta"))
    with pytest.raises(ValueError, match="meta"):
        F.grouped_gemm(torch.randn(7, 8, device="meta"), torch.randn(2, 3, 8), torch.tensor([3, 4]))


def through(plan, device):
    """Every function that reads a plan."""
    values = torch.ones(7, 2, device=device)
    yield lambda: F.dispatch(torch.randn(7, 8, device=device), plan, values)
    yield lambda: F.combine(torch.randn(7, 8, device=device), plan)
    yield lambda: F.permute(torch.randn(7, 8, device=device), plan)
    yield lambda: F.unpermute(torch.randn(14, 8, device=device), plan)


INDICES = [name for name in F.PlanTensors._fields if name not in F.PlanTensors._fields[:5]]


@pytest.mark.parametrize("name", INDICES)
def test_indices_of_a_plan_that_are_out_of_range(name, device):
    fits = F.plan(torch.tensor([[0, 1]] * 7, device=device), torch.ones(7, 2, device=device), 4)
    for value in (-1, 10**6, 2**62, -(2**63)):
        tensors = F.PlanTensors(*(tensor.clone() for tensor in fits.tensors))
        getattr(tensors, name)[-1] = value
        for number, call in enumerate(through(fits._replace(tensors=tensors), device)):
            if name != "send_order" or number < 2:
                with pytest.raises(ValueError, match=f"plan: {name}"):
                    call()
    for call in through(fits, device):
        call()
    getattr(fits.tensors, name)[0] = -5  # in place, after it was found to fit
    for call in list(through(fits, device))[:2]:
        with pytest.raises(ValueError, match=f"plan: {name}"):
            call()


@pytest.mark.parametrize("name", F.PlanTensors._fields)
def test_sizes_of_a_plan_that_do_not_fit(name):
    fits = F.plan(torch.tensor([[0, 1]] * 7), torch.ones(7, 2), 4)
    tensor = getattr(fits.tensors, name)
    wrong = [tensor[:-1], tensor.repeat(2), tensor.unsqueeze(0), tensor.float(), tensor[:0]]
    if name in F.PlanTensors._fields[:5]:
        wrong += [tensor - 100, tensor + 1]
    for value in wrong:
        changed = fits._replace(tensors=fits.tensors._replace(**{name: value}))
        for call in list(through(changed, "cpu"))[:2]:
            with pytest.raises(ValueError, match="plan|rows|values|counts"):
                call()


def a_gate_that_is_not_finite(rank, size):
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits = torch.randn(6, 4)
        if rank == 1:
            logits[3, 2] = bad
        routed = F.route(logits, 2)
        assert routed.weights[3].isnan().all() == (rank == 1) and routed.weights[:3].isfinite().all()
        with pytest.raises((ValueError, RuntimeError), match="token 3"):
            F.plan(routed.expert_ids, routed.weights, 4)
    F.plan(*F.route(torch.randn(6, 4), 2)[:2], 4)


def test_a_gate_that_is_not_finite_is_refused_on_every_rank():
    run_ranks(2, a_gate_that_is_not_finite)


@pytest.mark.parametrize("name", ["routing_scale", "jitter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_options_that_are_not_finite(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        make(**{name: value})


@pytest.mark.parametrize("value", [2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**200, -(2**63), -(2**63) - 1])
@pytest.mark.parametrize(
    "name", ["hidden_size", "expert_hidden_size", "num_experts", "top_k", "shared_expert_hidden_size", "expert_groups"]
)
def test_sizes_of_64_bits_and_more(name, value):
    with pytest.raises(ValueError, match=name if value != 2**63 - 1 else f"{name}|overflow"):
        make(**{name: value})


def test_a_router_that_would_not_learn():
    with pytest.raises(ValueError, match="top_k = 1 with renormalize.*renormalize = false"):
        make(top_k=1)
    for layer in (make(top_k=1, renormalize=False), anabranch.MoE(8, 12, 4)):
        layer(torch.randn(30, 8)).output.square().sum().backward()
        assert layer.router.weight.grad.abs().max() > 0
