"""The operators in LibTorch's registry: opcheck, torch.compile, and the functions over them."""

import anabranch
import anabranch.functional as F
import pytest
import reference
import torch
from case import parameters_of
from torch import nn
from torch.library import opcheck

OPERATORS = torch.ops.anabranch


def arguments(layer, x, routing=(None, None)):
    parts = {**layer._parts_but_experts(x), "experts": dict(layer.experts.named_parameters())}
    given = (*routing, None, False)
    return (x, layer._parameter_list(parts, x), *given, layer._options, layer._group, True, True, layer._probe.tensor)


def layer_of(device, **more):
    return anabranch.MoE(8, 12, 4, 2, glu=True, device=device, **more)


def a_routing(tokens, device, dtype=torch.float32):
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]).to(device)
    return ids, torch.rand(tokens, 2, device=device, dtype=dtype, requires_grad=True)


def a_plan(device, tokens=7):
    ids, weights = a_routing(tokens, device)
    return F.plan(ids, weights, 4), weights


ROUTER = dict(
    router_score="sigmoid", expert_bias=True, expert_groups=2, shared_expert_hidden_size=6, shared_expert_gate=True
)
LATENT = dict(latent_size=5, sequence_balance_coefficient=0.1, router_fp64=True)


def test_compilers_record_into_their_graphs_what_is_safe_there():
    """Not what keeps memory of its own, waits, or reads host memory; permute and unpermute do none of that."""
    for name in ("moe", "moe_forward", "moe_backward", "route_forward", "route_backward", "plan", "dispatch", "combine",
                 "router_forward", "router_backward", "grouped_gemm", "grouped_gemm_dgrad", "grouped_gemm_wgrad"):  # fmt: skip
        assert torch.Tag.cudagraph_unsafe in getattr(OPERATORS, name).default.tags, name
    for name in ("permute", "unpermute"):
        assert torch.Tag.cudagraph_unsafe not in getattr(OPERATORS, name).default.tags, name


@pytest.mark.parametrize("more", [{}, {"bias": True, "shared_expert_hidden_size": 6}, ROUTER, LATENT], ids=str)
def test_opcheck_of_the_layer(more, device):
    layer = layer_of(device, **more)
    x = torch.randn(7, 8, device=device, requires_grad=True)
    opcheck(OPERATORS.moe.default, arguments(layer, x))
    opcheck(OPERATORS.moe.default, arguments(layer, x, a_routing(7, device)))
    ids, padding = a_routing(7, device)[0], torch.rand(7, device=device) < 0.5
    call = arguments(layer, x)
    opcheck(OPERATORS.moe.default, (*call[:2], ids, None, padding, *call[5:]))
    layer.requires_grad_(False)
    opcheck(OPERATORS.moe.default, arguments(layer, x.detach()))


def test_opcheck_of_a_layer_without_a_router(device):
    layer = layer_of(device, router=False)
    x = torch.randn(7, 8, device=device, requires_grad=True)
    opcheck(OPERATORS.moe.default, arguments(layer, x, a_routing(7, device)))
    with pytest.raises(ValueError, match="neither a router nor a routing from outside"):
        OPERATORS.moe(*arguments(layer, x))


def test_opcheck_of_the_noisy_gate(device):
    """Shapes only: the noise of two calls differs."""
    call = arguments(layer_of(device, gate="noisy_top_k"), torch.randn(7, 8, device=device, requires_grad=True))
    opcheck(OPERATORS.moe.default, call, test_utils=("test_schema", "test_faketensor"))


def test_opcheck_of_its_forward(device):
    """Its backward takes a state that cannot be copied, as opcheck does; AOTAutograd's of the layer runs it."""
    layer = layer_of(device)
    call = arguments(layer, torch.randn(7, 8, device=device))
    values = [parameter.detach() for parameter in call[1]]
    needs_gradient = [True, True, False, True]
    opcheck(OPERATORS.moe_forward.default, (call[0], values, *call[2:], needs_gradient))


def test_opcheck_of_the_functions(device):
    logits = torch.randn(7, 4, device=device, requires_grad=True)
    opcheck(OPERATORS.route_forward.default, (logits, 2, True, True))
    ids, weights = a_routing(7, device)
    opcheck(OPERATORS.plan.default, (ids, weights.detach(), 4, anabranch.as_group().name))
    plan = F.plan(ids, weights, 4)
    exchange = (plan.tensors, plan.top_k, plan.num_experts, plan.group)
    rows = torch.randn(7, 8, device=device, requires_grad=True)
    opcheck(OPERATORS.dispatch.default, (rows, None, *exchange))
    opcheck(OPERATORS.dispatch.default, (rows, weights, *exchange))
    values = torch.rand(14, device=device, requires_grad=True)
    opcheck(OPERATORS.combine.default, (rows, None, *exchange))
    opcheck(OPERATORS.combine.default, (rows, values, *exchange))
    opcheck(OPERATORS.permute.default, (rows, plan.tensors))
    assignments = torch.randn(14, 8, device=device, requires_grad=True)
    opcheck(OPERATORS.unpermute.default, (assignments, None, plan.tensors))
    opcheck(OPERATORS.unpermute.default, (assignments, values, plan.tensors))
    weight = torch.randn(4, 12, 8, device=device, requires_grad=True)
    opcheck(OPERATORS.grouped_gemm.default, (assignments, weight, plan.expert_counts, "auto"))


class Block(nn.Module):
    def __init__(self, device, **more):
        super().__init__()
        self.norm = nn.LayerNorm(8, device=device)
        self.moe = layer_of(device, **more)

    def forward(self, x):
        out = self.moe(self.norm(x))
        return x + out.output, out.balance_loss + out.z_loss


def results(block, x):
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    y, loss = block(leaf)
    (y.square().sum() + loss).backward()
    return [y, loss, leaf.grad, *(parameter.grad for parameter in block.parameters())]


def check_compiled(compiled, block, x):
    for actual, expected in zip(results(compiled, x), results(block, x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_compile_of_a_block(device):
    block = Block(device)
    block.norm = nn.Identity()  # few kernels: each takes g++ seconds
    # In this process, without a precompiled header or trials of instruction sets: quicker for few kernels.
    options = {"compile_threads": 1, "cpp_cache_precompile_headers": False, "cpp.simdlen": 1}
    check_compiled(torch.compile(block, fullgraph=True, options=options), block, torch.randn(11, 8, device=device))


def test_compile_for_any_number_of_tokens(device):
    block = Block(device, shared_expert_hidden_size=6, bias=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for tokens in (11, 5, 30, 0):
        x = torch.randn(tokens, 8, device=device)
        check_compiled(compiled, block, x)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], block(x)[0])


def test_equal_layers_share_what_is_compiled():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    blocks = [Block("cpu", seed=seed) for seed in range(3)]

    @torch.compile(backend=counter, fullgraph=True)
    def call(block, x):
        return block(x)

    x = torch.randn(5, 8)
    for block in blocks:
        torch.testing.assert_close(call(block, x)[0], block(x)[0])
    assert counter.frame_count == 1


def test_export_of_inference(device, tmp_path):
    block = Block(device, shared_expert_hidden_size=6).eval()
    block.moe.evaluation_losses = True
    tokens = torch.export.Dim("tokens", min=2, max=1000)
    with torch.no_grad():
        program = torch.export.export(block, (torch.randn(11, 8, device=device),), dynamic_shapes=({0: tokens},))
        torch.export.save(program, tmp_path / "block.pt2")
        again = torch.export.load(tmp_path / "block.pt2").module()
        for count in (5, 40):
            x = torch.randn(count, 8, device=device)
            for found in (program.module()(x), again(x)):
                torch.testing.assert_close(found, block(x))


def test_compile_under_autocast(device):
    block = Block(device)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 8, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual, expected = results(compiled, x), results(block, x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)


def test_fake_tensors_have_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    layer = anabranch.MoE(8, 12, 4, 2, device="meta")
    out = layer(torch.empty(3, 5, 8, device="meta"))
    assert out.output.shape == (3, 5, 8) and out.output.is_meta and out.expert_load.shape == (4,)
    with FakeTensorMode():
        assert layer_of("cpu", seed=1)(torch.empty(3, 8)).output.shape == (3, 8)


def layer_of_functions(x, parameters, options):
    routed = F.route(x @ parameters["router.weight"].T, options.top_k, options.renormalize)
    plan = F.plan(routed.expert_ids, routed.weights, parameters["router.weight"].shape[0])
    rows, values = F.dispatch(x, plan, routed.weights)
    hidden = F.grouped_gemm(F.permute(rows, plan), parameters["experts.up_weight"], plan.expert_counts)
    act = reference.ACTIVATIONS[options.activation](hidden)
    results = F.grouped_gemm(act, parameters["experts.down_weight"], plan.expert_counts)
    y, _ = F.combine(F.unpermute(results, plan, values), plan)
    return y, routed


@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_a_layer_of_functions(tokens, device):
    options = reference.Options(top_k=2)
    layer = anabranch.MoE(8, 12, 4, 2, dtype=torch.float64, device=device)
    x = torch.randn(tokens, 8, dtype=torch.float64, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    y, routed = layer_of_functions(x, dict(layer.named_parameters()), options)
    ((y * dy).sum() + routed.probability_sum.square().sum() + 0.1 * routed.squared_logsumexp_sum).backward()

    leaf = x.detach().cpu().requires_grad_()
    leaves = {name: value.requires_grad_() for name, value in parameters_of(layer).items()}
    logits = leaf @ leaves["router.weight"].T
    expected = reference.moe(leaf, leaves, options)
    loss = (expected.output * dy.cpu()).sum() + logits.softmax(-1).sum(0).square().sum()
    (loss + 0.1 * logits.logsumexp(-1).square().sum()).backward()
    torch.testing.assert_close(y.cpu(), expected.output)
    torch.testing.assert_close(x.grad.cpu(), leaf.grad)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), leaves[name].grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cublas_loop_in_a_cuda_graph():
    """The side streams join the capture; enough experts that they have threads of their own outside of it."""
    counts = torch.arange(40) % 7
    x = torch.randn(int(counts.sum()), 64, device="cuda")
    weight = torch.randn(40, 32, 64, device="cuda")
    F.grouped_gemm(x, weight, counts, "cublas_loop_4")  # makes the streams, chooses the algorithms
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.grouped_gemm(x, weight, counts, "cublas_loop_4")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, F.grouped_gemm(x, weight, counts, "cublas_loop_4"))


def test_gradcheck_of_the_functions():
    plan, _ = a_plan("cpu")
    double = dict(dtype=torch.float64, requires_grad=True)
    rows, weights = torch.randn(7, 3, **double), torch.rand(7, 2, **double)
    assignments, values = torch.randn(14, 3, **double), torch.rand(14, **double)
    weight = torch.randn(4, 5, 3, **double)
    check = torch.autograd.gradcheck
    assert check(lambda r, v: F.dispatch(r, plan, v), (rows, weights))
    assert check(lambda r: F.dispatch(r, plan)[0], (rows,))
    assert check(lambda r, v: F.combine(r, plan, v), (rows, values))
    assert check(lambda r: F.permute(r, plan), (rows,))
    assert check(lambda a, v: F.unpermute(a, plan, v), (assignments, values))
    assert check(lambda a: F.unpermute(a, plan), (assignments,))
    assert check(lambda a, w: F.grouped_gemm(a, w, plan.expert_counts), (assignments, weight))
    assert torch.autograd.gradgradcheck(lambda r: F.permute(r, plan), (rows,))


def test_compile_of_the_functions():
    layer = anabranch.MoE(8, 12, 4, 2)
    options = reference.Options(top_k=2)
    parameters = dict(layer.named_parameters())
    x = torch.randn(9, 8)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(layer_of_functions, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, parameters, options)[0], layer_of_functions(x, parameters, options)[0])


@pytest.mark.parametrize(
    "call, shown",
    [
        (lambda plan: F.route(torch.randn(3, 4), 5), "top_k = 5"),
        (lambda plan: F.route(torch.randn(3, 4).half(), 2), "Half"),
        (lambda plan: F.plan(torch.tensor([[0, 9]]), torch.ones(1, 2), 4), "[0, 9]"),
        (lambda plan: F.plan(torch.tensor([[0, 1]]), torch.ones(1, 1), 4), "[1, 1]"),
        (lambda plan: F.dispatch(torch.randn(8, 8), plan), "[8, 8]"),
        (lambda plan: F.dispatch(torch.randn(7, 8), plan, torch.ones(7, 3)), "[7, 3]"),
        (lambda plan: F.combine(torch.randn(6, 8), plan), "[6, 8]"),
        (lambda plan: F.permute(torch.randn(6, 8), plan), "[6, 8]"),
        (lambda plan: F.unpermute(torch.randn(6, 8), plan), "[6, 8]"),
        (lambda plan: F.unpermute(torch.randn(14, 8), plan, torch.ones(3)), "[3]"),
        (lambda plan: F.grouped_gemm(torch.randn(14, 8), torch.randn(4, 6, 9), plan.expert_counts), "9"),
        (lambda plan: F.grouped_gemm(torch.randn(13, 8), torch.randn(4, 6, 8), plan.expert_counts), "13"),
        (lambda plan: F.grouped_gemm(torch.randn(14, 8), torch.randn(4, 6, 8), plan.expert_counts, "warp"), "warp"),
    ],
)
def test_wrong_arguments_of_functions(call, shown):
    plan, _ = a_plan("cpu")
    with pytest.raises(ValueError) as raised:
        call(plan)
    assert shown in str(raised.value)
