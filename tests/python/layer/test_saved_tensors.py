"""Hooks on what autograd saves: activations offloaded, or computed again, give the gradients that staying does."""

import anabranch
import anabranch.functional as F
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

HIDDEN, INNER, EXPERTS, TOP_K, TOKENS = 8, 12, 6, 2, 23
ALL = dict(bias=True, shared_expert_hidden_size=6, shared_expert_gate=True, latent_size=5, router_score="sigmoid",
           sequence_balance_coefficient=0.1, z_coefficient=0.1)  # fmt: skip
KINDS = [{}, ALL, {"gate": "noisy_top_k"}, {"recompute": True}, {"router": False}, pytest.param({"activation": torch.relu}, id="activation")]


class Block(nn.Module):
    def __init__(self, device, **more):
        super().__init__()
        options = {"glu": True, "activation": "silu", "seed": 3, **more}
        self.norm = nn.LayerNorm(HIDDEN, device=device, dtype=torch.float64)
        self.moe = anabranch.MoE(HIDDEN, INNER, EXPERTS, TOP_K, device=device, dtype=torch.float64, **options)

    def forward(self, x, routing=None):
        out = self.moe(self.norm(x), routing)
        return out.output.square().sum() + sum(loss for loss in (out.balance_loss, out.auxiliary_loss) if loss is not None)


def arguments(block, device):
    x = torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.float64)
    if block.moe.has_router:
        return (x,)
    return x, (torch.rand(TOKENS, EXPERTS, device=device).argsort(-1)[:, :TOP_K], torch.rand(TOKENS, TOP_K, device=device))


def gradients(block, arguments, call=lambda block, *given: block(*given)):
    block.zero_grad()
    leaf = arguments[0].clone().requires_grad_()
    torch.manual_seed(1)  # of the noise
    call(block, leaf, *arguments[1:]).backward()
    return [leaf.grad, *(parameter.grad for parameter in block.parameters())]


def through(hooks):
    def call(block, *given):
        with hooks:
            return block(*given)

    return call


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_offloaded_comes_back(kind, device):
    block = Block(device, **kind)
    given = arguments(block, device)
    wanted = gradients(block, given)
    copies = saved_tensors_hooks(lambda tensor: (tensor.device, tensor.cpu().clone()), lambda packed: packed[1].to(packed[0]))
    for hooks in (copies, save_on_cpu(pin_memory=device.type == "cuda")):
        assert_same(gradients(block, given, through(hooks)), wanted)


def offloaded_on_ranks(rank, size, seed):
    for kind in ({}, ALL, {"overlap": "2"}, {"receive_capacity": float(size), "errors": "late"}, {"receive_rows_limit": 7}, {"balance": "shadow"}):
        torch.manual_seed(seed + rank)
        block = Block(torch.device("cpu"), **kind)
        tokens = TOKENS if "receive_capacity" in kind else TOKENS * (rank % 3)  # rank 0 has none
        given = (torch.randn(tokens, HIDDEN, dtype=torch.float64),)
        wanted = gradients(block, given)
        assert_same(gradients(block, given, through(saved_tensors_hooks(torch.clone, torch.clone))), wanted)


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_offloaded_comes_back_on_several_ranks(size, seed):
    run_ranks(size, offloaded_on_ranks, seed)


def test_what_is_saved_is_seen_whole(device):
    """Rows as received, what is activated and the plan's places: of the rows nothing is kept elsewhere."""
    block = Block(device)
    seen = []
    hooks = saved_tensors_hooks(lambda tensor: seen.append(tensor) or len(seen) - 1, lambda place: seen[place])
    loss = through(hooks)(block, *arguments(block, device))
    shapes = [tuple(tensor.shape) for tensor in seen]
    assert {(TOKENS, HIDDEN), (TOKENS * TOP_K, 2 * INNER)} <= set(shapes)
    assert len([tensor for tensor in seen if tensor.dtype == torch.int64 and tensor.numel() >= TOKENS]) >= 6
    floats = [tensor for tensor in seen if tensor.dim() and tensor.is_floating_point() and len(tensor) >= TOKENS]
    of_rows = [StorageWeakRef(tensor.untyped_storage()) for tensor in floats]
    del floats
    seen[:] = [tensor.clone() for tensor in seen]
    assert of_rows and all(each.expired() for each in of_rows)
    loss.backward()


@pytest.mark.parametrize("kind", [{}, ALL, {"gate": "noisy_top_k"}], ids=str)
def test_a_checkpoint_is_computed_again_once(kind, device):
    block = Block(device, **kind)
    given = arguments(block, device)
    wanted = gradients(block, given)
    block.moe.reset_stats()
    again = gradients(block, given, lambda block, *given: checkpoint(block, *given, use_reentrant=False))
    assert_same(again, wanted)
    assert block.moe.stats().forwards == 2


def test_a_router_of_functions(device):
    logits = torch.randn(TOKENS, EXPERTS, device=device, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(TOKENS, TOP_K, device=device, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((F.route(logits, TOP_K).weights * dy).sum(), [logits])
    with saved_tensors_hooks(torch.clone, lambda copy: copy):
        weights = F.route(logits, TOP_K).weights
    assert torch.equal(torch.autograd.grad((weights * dy).sum(), [logits])[0], wanted)


def test_the_state_of_a_compiled_layer_is_to_be_left_as_it_is(device):
    block = Block(device)
    compiled = torch.compile(block.moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(TOKENS, HIDDEN, device=device, dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(compiled(x).output.sum(), [x])
    with saved_tensors_hooks(lambda tensor: tensor if tensor.nbytes < 64 else tensor.clone(), lambda copy: copy):
        loss = compiled(x).output.sum()
    assert torch.equal(torch.autograd.grad(loss, [x])[0], wanted)
    with saved_tensors_hooks(torch.clone, lambda copy: copy):
        loss = compiled(x).output.sum()
    with pytest.raises((ValueError, RuntimeError), match="is a copy"):
        loss.backward()
