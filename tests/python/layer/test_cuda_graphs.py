"""A layer's step recorded into a CUDA graph, by the ways that PyTorch has, replayed with other routing."""

import pytest
import torch

import anabranch

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="no engine here reads its counts from GPU memory",
    ),
]

TOKENS, HIDDEN = 384, 128


def make_layer():
    return anabranch.MoE(HIDDEN, 64, 16, 4, glu=True, activation="silu", seed=3, device="cuda", dtype=torch.bfloat16)


def step(layer, x, dy):
    out = layer(x)
    torch.autograd.backward([out.output, 0.01 * out.balance_loss], [dy, torch.ones_like(out.balance_loss)])
    return out


def tensors(turn):
    generator = torch.Generator("cuda").manual_seed(turn)
    # Turn by turn all tokens differ, or all are alike: nearly all experts then have none.
    rows = torch.randn(TOKENS if turn % 2 == 0 else 1, HIDDEN, device="cuda", generator=generator)
    dy = torch.randn(TOKENS, HIDDEN, device="cuda", generator=generator)
    return rows.expand(TOKENS, HIDDEN).bfloat16(), dy.bfloat16()


def eager(x, dy):
    layer = make_layer()
    x = x.clone().requires_grad_()
    out = step(layer, x, dy)
    return [out.output.detach(), x.grad, out.expert_load] + [p.grad for p in layer.parameters()]


def test_torch_cuda_graph():
    layer = make_layer()
    x, dy = (tensor.clone() for tensor in tensors(0))
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(layer, x, dy)
    torch.cuda.current_stream().wait_stream(side)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(layer, x, dy)
    found = [out.output, x.grad, out.expert_load] + [p.grad for p in layer.parameters()]
    for turn in range(40):
        new_x, new_dy = tensors(turn)
        with torch.no_grad():
            x.copy_(new_x)
            dy.copy_(new_dy)
        graph.replay()
        replayed = [tensor.clone() for tensor in found]
        for ours, expected in zip(replayed, eager(new_x, new_dy)):
            assert torch.equal(ours, expected), turn
    anabranch.check()


def test_a_replay_with_a_bad_gate_is_heard():
    layer = make_layer()
    x = tensors(0)[0].clone()
    with torch.no_grad():
        for _ in range(2):
            layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x[5, 7] = float("nan")
        graph.replay()
        with pytest.raises(ValueError, match="token 5"):
            anabranch.check()
        assert out.output[5].isnan().all()
        x.copy_(tensors(2)[0])
        graph.replay()
        anabranch.check()
        assert not out.output.isnan().any()


def test_make_graphed_callables():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = make_layer()

        def forward(self, x):
            return self.moe(x).output

    block = Block()
    x, dy = tensors(0)
    graphed = torch.cuda.make_graphed_callables(block, (x.clone().requires_grad_(),))
    for turn in range(10):
        x, dy = tensors(turn)
        x = x.clone().requires_grad_()
        block.zero_grad(set_to_none=True)
        y = graphed(x)
        y.backward(dy)
        reference = Block()
        x_reference = x.detach().clone().requires_grad_()
        expected = reference(x_reference)
        expected.backward(dy)
        assert torch.equal(y, expected) and torch.equal(x.grad, x_reference.grad)
        for ours, theirs in zip(block.parameters(), reference.parameters()):
            assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("kept", [False, True], ids=["backward at once", "backward later"])
def test_reduce_overhead(kept):
    """The compiler's own graphs end before the layer and begin anew behind it: whatever is computed between a
    forward and its backward, what the layer has kept is as it was."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = make_layer()

        def forward(self, x):
            out = self.moe(x * 2)
            return out.output + x, out.balance_loss

    def step(block, x, dy, between=lambda: None):
        x = x.clone().requires_grad_()
        y, loss = block(x)
        y, loss = y.clone(), loss.clone()
        between()
        torch.autograd.backward([y, 0.01 * loss], [dy, torch.ones_like(loss)])
        return [y.detach(), x.grad.clone()] + [p.grad.clone() for p in block.parameters()]

    block = Block()
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for turn in range(8):
        x, dy = tensors(turn)
        block.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        # Memory that was free is written over.
        found = step(compiled, x, dy, (lambda: [torch.full((2**16,), float("nan"), device="cuda") for _ in range(50)]) if kept else lambda: None)
        block.zero_grad(set_to_none=True)
        for ours, expected in zip(found, step(block, x, dy), strict=True):
            assert torch.equal(ours, expected), turn
    anabranch.check()
