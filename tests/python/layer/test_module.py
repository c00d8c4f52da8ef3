"""The layer as a torch.nn.Module: what people do to modules."""

import copy

import anabranch
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

OPTIONS = dict(hidden_size=8, expert_hidden_size=12, num_experts=4, top_k=2, glu=True, bias=True)


def make(device="cpu", **more):
    return anabranch.MoE(**{**OPTIONS, "shared_expert_hidden_size": 6, "seed": 3, "device": device, **more})


def gradients(layer, x):
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    out = layer(leaf)
    (out.output.square().sum() + out.balance_loss + out.z_loss).backward()
    return [out.output, leaf.grad] + [parameter.grad for parameter in layer.parameters()]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert torch.equal(one, other)


def test_parameters_are_named_as_in_cpp_and_seeded():
    layer = make()
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "router.weight": (4, 8),
        "experts.up_weight": (4, 24, 8),
        "experts.up_bias": (4, 24),
        "experts.down_weight": (4, 8, 12),
        "experts.down_bias": (4, 8),
        "shared_expert.up_weight": (1, 12, 8),
        "shared_expert.up_bias": (1, 12),
        "shared_expert.down_weight": (1, 8, 6),
        "shared_expert.down_bias": (1, 8),
        "_extra_state": (3,),
    }
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in layer.parameters())
    assert_same(list(layer.parameters()), list(make().parameters()))
    assert not torch.equal(layer.router.weight, make(seed=4).router.weight)
    bound = 8**-0.5
    assert layer.experts.up_weight.abs().max() <= bound and layer.experts.up_weight.abs().max() > 0.8 * bound
    torch.manual_seed(5)
    first = make(seed=None)
    torch.manual_seed(5)
    assert_same(list(first.parameters()), list(make(seed=None).parameters()))


def test_state_dict(device):
    layer, other = make(device), make(device, seed=9)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(7, 8, device=device)
    assert_same(gradients(layer, x), gradients(other, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_another_type(dtype, device):
    layer = make(device).to(dtype)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    x = torch.randn(7, 8, device=device, dtype=dtype, requires_grad=True)
    out = layer(x)
    out.output.sum().backward()
    assert out.output.dtype == dtype and layer.router.weight.grad.dtype == dtype
    assert layer.experts.up_weight.grad.dtype == dtype
    if dtype != torch.float64:
        wide = make(device).to(dtype).to(torch.float32)
        torch.testing.assert_close(out.output.float(), wide(x.float()).output, rtol=0.05, atol=0.05)


def test_half_and_back():
    layer = make().half().float()
    assert torch.equal(layer.experts.up_weight, make().experts.up_weight.half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    layer = make(device)
    x = torch.randn(11, 8, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=dtype):
        out = layer(x * 1.0)
    assert out.output.dtype == dtype and out.balance_loss.dtype == torch.float32
    out.output.float().sum().backward()
    assert layer.experts.up_weight.grad.dtype == torch.float32 and x.grad.dtype == torch.float32

    # The router keeps fp32, the experts compute in the narrow type.
    narrow = make(device)
    for module in (narrow.experts, narrow.shared_expert):
        module.to(dtype)
    expected = narrow(x.detach().to(dtype))
    assert torch.equal(out.output, expected.output)
    assert torch.equal(out.expert_load, expected.expert_load)


def test_no_grad_and_inference_mode(device):
    layer = make(device)
    x = torch.randn(7, 8, device=device)
    expected = layer(x).output
    with torch.no_grad():
        out = layer(x).output
        assert torch.equal(out, expected) and not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(layer(x).output, expected)


def test_frozen_experts_get_no_gradient_and_others_do(device):
    layer, whole = make(device), make(device)
    x = torch.randn(9, 8, device=device)
    layer.experts.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    layer(leaf).output.square().sum().backward()
    reference = x.clone().requires_grad_()
    whole(reference).output.square().sum().backward()
    assert torch.equal(leaf.grad, reference.grad)
    assert torch.equal(layer.router.weight.grad, whole.router.weight.grad)
    assert all(parameter.grad is None for parameter in layer.experts.parameters())
    layer.requires_grad_(False)
    assert not layer(x).output.requires_grad


def test_only_some_experts_parameters_frozen():
    layer, whole = make(), make()
    layer.experts.up_weight.requires_grad_(False)
    layer.experts.down_bias.requires_grad_(False)
    x = torch.randn(9, 8)
    for each in (layer, whole):
        each(x).output.square().sum().backward()
    for (name, parameter), (_, other) in zip(layer.named_parameters(), whole.named_parameters()):
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, other.grad), name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_checkpoint(reentrant, recompute, device):
    layer = make(device, recompute=recompute)
    x = torch.randn(9, 8, device=device)
    expected = gradients(layer, x)
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    output, balance_loss, z_loss, *_ = checkpoint(layer, leaf, use_reentrant=reentrant)
    (output.square().sum() + balance_loss + z_loss).backward()
    assert_same(expected, [output, leaf.grad] + [parameter.grad for parameter in layer.parameters()])


def test_checkpoint_of_a_block_of_two_layers():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(8), make(), make(seed=5)

        def forward(self, x):
            return x + self.second(torch.tanh(self.first(self.norm(x)).output)).output

    block = Block()
    x = torch.randn(9, 8, requires_grad=True)
    block(x).square().sum().backward()
    expected = [x.grad.clone()] + [parameter.grad.clone() for parameter in block.parameters()]
    block.zero_grad()
    x.grad = None
    checkpoint(block, x, use_reentrant=False).square().sum().backward()
    assert_same(expected, [x.grad] + [parameter.grad for parameter in block.parameters()])


def test_retained_graph():
    layer = make()
    x = torch.randn(9, 8, requires_grad=True)
    loss = layer(x).output.square().sum()
    loss.backward(retain_graph=True)
    first = [x.grad.clone()] + [parameter.grad.clone() for parameter in layer.parameters()]
    loss.backward()
    for once, twice in zip(first, [x.grad] + [parameter.grad for parameter in layer.parameters()]):
        assert torch.equal(2 * once, twice)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_autograd_grad_of_some_inputs():
    layer = make()
    x = torch.randn(9, 8, requires_grad=True)
    expected = gradients(layer, x)
    loss = layer(x).output.square().sum()
    (dx,) = torch.autograd.grad(loss, [x], retain_graph=True)
    (dup,) = torch.autograd.grad(loss, [layer.experts.up_weight])
    assert dx.isfinite().all() and torch.equal(dup, expected[3])


def test_parameters_changed_before_backward_are_noticed():
    layer = make()
    loss = layer(torch.randn(9, 8, requires_grad=True)).output.sum()
    with torch.no_grad():
        layer.experts.up_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_graphs_that_never_run_backward_are_freed():
    import resource

    layer = anabranch.MoE(64, 256, 4, 2)
    x = torch.randn(4096, 64, requires_grad=True)
    layer(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(10):
        layer(x)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    kept_by_one = 4096 * 2 * 256 * 4
    assert grown < 4 * kept_by_one, f"{grown} bytes more after 10 forwards"


def test_hooks(device):
    layer = make(device)
    seen = []
    layer.register_forward_hook(lambda module, arguments, result: seen.append(result.output.shape))
    layer.register_full_backward_hook(lambda module, dinput, doutput: seen.append(dinput[0].shape))
    layer.experts.up_weight.register_hook(lambda gradient: seen.append(gradient.shape))
    layer(torch.randn(5, 8, device=device, requires_grad=True)).output.sum().backward()
    assert sorted(seen) == sorted([(5, 8), (5, 8), (4, 24, 8)])


def test_parts_are_called(device):
    """So hooks on them run, and what wraps them takes effect."""
    layer = make(device)
    seen = []
    for name in ("router", "experts", "shared_expert"):
        layer.get_submodule(name).register_forward_hook(lambda module, x, found, name=name: seen.append((name, x[0].shape)))
    layer.shared_expert.register_forward_hook(lambda module, x, found: {**found, "up_weight": 2 * found["up_weight"]})
    layer.experts.register_forward_hook(lambda module, x, out: out._replace(output=2 * out.output))  # the layer's
    doubled = make(device)
    with torch.no_grad():
        doubled.shared_expert.up_weight.mul_(2)
    x = torch.randn(5, 8, device=device)
    assert torch.equal(layer(x).output, 2 * doubled(x).output)
    assert seen == [(name, (5, 8)) for name in ("router", "shared_expert", "experts")]


def test_without_a_router(device):
    """Its routing is given, of any top_k; what it has are experts."""
    whole = make(device)
    layer = make(device, router=False)
    assert [name for name, _ in layer.named_parameters()] == [n for n, _ in whole.named_parameters() if "router" not in n]
    layer.load_state_dict({name: value for name, value in whole.state_dict().items() if "router" not in name})
    for top_k in (1, 3):
        ids = torch.rand(9, 4, device=device).argsort(-1)[:, :top_k]
        x, weights = torch.randn(9, 8, device=device, requires_grad=True), torch.rand(9, top_k, device=device)
        found = layer(x, routing=(ids, weights.requires_grad_())).output
        gradients = torch.autograd.grad(found.sum(), [x, weights, *layer.experts.parameters()])
        again = make(device, top_k=top_k, renormalize=False)
        expected = again(x, routing=(ids, weights)).output
        assert_same(gradients, torch.autograd.grad(expected.sum(), [x, weights, *again.experts.parameters()]))
        assert torch.equal(found, expected)
    layer.reset_parameters()
    assert_same(list(layer.parameters()), [value for name, value in whole.named_parameters() if "router" not in name])
    compiled = torch.compile(lambda *given: layer(x, routing=given).output, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, weights), layer(x, routing=(ids, weights)).output)


def test_deepcopy(device):
    layer = make(device)
    twin = copy.deepcopy(layer)
    x = torch.randn(7, 8, device=device)
    assert_same(gradients(layer, x), gradients(twin, x))
    with torch.no_grad():
        twin.experts.up_weight.zero_()
    assert layer.experts.up_weight.abs().sum() > 0


def test_meta_device(device):
    with torch.device("meta"):
        layer = make(device=None)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer = layer.to_empty(device=device)
    layer.reset_parameters()
    assert_same(list(layer.parameters()), list(make(device).parameters()))
    x = torch.randn(7, 8, device=device)
    assert_same(gradients(layer, x), gradients(make(device), x))


def test_parametrize():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, doubled = make(), make()
    parametrize.register_parametrization(layer.experts, "up_weight", Doubled())
    with torch.no_grad():
        doubled.experts.up_weight.mul_(2)
    x = torch.randn(7, 8)
    for each in (layer, doubled):
        each(x).output.square().sum().backward()
    assert torch.equal(layer(x).output, doubled(x).output)
    original = layer.experts.parametrizations.up_weight.original
    torch.testing.assert_close(original.grad, 2 * doubled.experts.up_weight.grad)


def test_functional_call():
    layer, other = make(), make(seed=8)
    x = torch.randn(7, 8)
    swapped = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert torch.equal(swapped.output, other(x).output)


def test_jitter_only_in_training():
    layer = make(jitter=0.5)
    x = torch.randn(50, 8)
    layer.eval()
    assert torch.equal(layer(x).output, make().eval()(x).output)
    layer.train()
    torch.manual_seed(0)
    first = layer(x).output
    assert not torch.equal(first, layer(x).output)


def test_trains():
    torch.manual_seed(0)
    layer = anabranch.MoE(8, 16, 4, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x, target = torch.randn(64, 8), torch.randn(64, 8)
    losses = []
    for _ in range(60):
        out = layer(x)
        loss = (out.output - target).square().mean() + 0.01 * out.balance_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
