"""Losses of a batch, of its sequences and of logits, padding, and losses attached inside the layer: against plain PyTorch."""

import anabranch
import pytest
import reference
import torch
from case import parameters_of
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

EXPERTS, TOP_K, HIDDEN = 12, 3, 8
COEFFICIENTS = dict(balance_coefficient=0.2, sequence_balance_coefficient=0.3, z_coefficient=0.05)


def layer_of(**more):
    options = {"glu": True, "activation": "silu", "seed": 5, "dtype": torch.float64, **COEFFICIENTS}
    return anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, **{**options, **more})


def scores_of(logits, score):
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else torch.log(1 + logits.exp()).sqrt()


def expected(x, padding, parameters, score="softmax"):
    """Output and losses of x [S, L, h], in plain PyTorch: one sequence after another."""
    plain = reference.Options(top_k=TOP_K, glu=True, activation="silu")
    output = torch.zeros_like(x)
    balance = []
    all_counts, all_probabilities, all_logits = torch.zeros(EXPERTS, dtype=x.dtype), torch.zeros(EXPERTS, dtype=x.dtype), []
    for s in range(x.shape[0]):
        kept = (~padding[s]).nonzero().flatten()
        logits = x[s, kept] @ parameters["router.weight"].T
        scores = scores_of(logits, score)
        weights, ids = scores.topk(TOP_K, dim=-1)
        y = reference.mix(x[s, kept], parameters, ids, weights / weights.sum(-1, keepdim=True), plain)
        output = output + torch.zeros_like(x).index_put((torch.full_like(kept, s), kept), y)
        counts = torch.bincount(ids.flatten(), minlength=EXPERTS).to(x.dtype)
        probabilities = (scores / scores.sum(-1, keepdim=True)).sum(0)
        if len(kept):
            balance.append(EXPERTS * (counts / (TOP_K * len(kept)) * probabilities / len(kept)).sum())
        all_counts, all_probabilities = all_counts + counts, all_probabilities + probabilities
        all_logits.append(logits)
    tokens = int((~padding).sum())
    logits = torch.cat(all_logits)
    losses = {
        "balance": EXPERTS * (all_counts / max(TOP_K * tokens, 1) * all_probabilities / max(tokens, 1)).sum(),
        "sequence_balance": torch.stack(balance).mean() if balance else torch.zeros((), dtype=x.dtype),
        "z": logits.logsumexp(-1).square().sum() / max(tokens, 1),
    }
    return output, losses, sum(COEFFICIENTS[f"{name}_coefficient"] * loss for name, loss in losses.items())


def batch(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, 5, 7, HIDDEN, generator=generator, dtype=torch.float64)
    padding = torch.rand(5, 7, generator=generator) < 0.3
    padding[2] = True  # a sequence that is padding throughout
    if kind in ("none", "all"):
        padding.fill_(kind == "all")
    return x, dy, padding


def step_of_a_rank(rank, size, seed, kind, score):
    x, dy, padding = batch(seed, kind)
    own = slice(5 * rank // size, 5 * (rank + 1) // size)
    layer = layer_of(attach_losses=True, router_score=score)
    leaf = x[own].clone().requires_grad_()
    out = layer(leaf, padding_mask=padding[own])
    (out.output * dy[own]).sum().backward()
    anabranch.finish_gradients(layer)
    assert out.expert_ids.shape == (leaf.shape[0] * 7, TOP_K)
    assert (out.expert_ids.eq(-1).all(-1) == padding[own].flatten()).all()
    assert out.output[padding[own]].eq(0).all()
    return {
        "losses": [out.balance_loss.item(), out.sequence_balance_loss.item(), out.z_loss.item(), out.auxiliary_loss.item()],
        "load": out.expert_load.tolist(),
        "output": out.output.detach().tolist(),
        "x": leaf.grad.tolist(),
        **{name: parameter.grad.tolist() for name, parameter in layer.named_parameters()},
    }


@pytest.mark.parametrize(
    "size, kind, score",
    [(1, "some", "softmax"), (2, "none", "sigmoid"), (3, "some", "sqrt_softplus"), (4, "some", "softmax"), (2, "all", "softmax")],
)
def test_losses_of_sequences_and_padding_at_any_number_of_ranks(size, kind, score, seed):
    found = run_ranks(size, step_of_a_rank, seed, kind, score)
    x, dy, padding = batch(seed, kind)
    layer = layer_of(router_score=score, group=anabranch.groups.alone())
    leaves = {name: value.requires_grad_() for name, value in parameters_of(layer).items()}
    leaf = x.clone().requires_grad_()
    output, losses, auxiliary = expected(leaf, padding, leaves, score)
    # Mean over ranks of ⟨output, dy⟩ and of the auxiliary loss, which is the same on each.
    ((output * dy).sum() / size + auxiliary).backward()

    def check(actual, wanted, what):
        torch.testing.assert_close(
            torch.tensor(actual, dtype=torch.float64).reshape(wanted.shape), wanted, rtol=1e-9, atol=1e-10, msg=lambda m: f"{what}: {m}"
        )

    for of_rank in found:
        check(of_rank["losses"], torch.stack([*losses.values(), auxiliary]).detach()[[0, 1, 2, 3]], "losses")
        check(of_rank["router.weight"], leaves["router.weight"].grad, "router.weight")
        assert sum(of_rank["load"]) == TOP_K * int((~padding).sum())
    for name in ("experts.up_weight", "experts.down_weight"):
        check([row for of_rank in found for row in of_rank[name]], leaves[name].grad, name)
    check([row for of_rank in found for row in of_rank["output"]], output.detach(), "output")
    check([row for of_rank in found for row in of_rank["x"]], leaf.grad * size, "x")


def gradients(layer, run):
    layer.zero_grad()
    run()
    return [parameter.grad.clone() for parameter in layer.parameters() if parameter.grad is not None]


def same(first, second, exact=True):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-12, atol=0 if exact else 1e-14)


def test_an_attached_loss_counts_once(device):
    """As the loss handed on: plain, recomputed by either checkpointing, over micro-batches, scaled, in evaluation."""
    plain, attached = layer_of(device=device), layer_of(device=device, attach_losses=True)
    x = torch.randn(4, 9, HIDDEN, dtype=torch.float64, device=device, requires_grad=True)

    def handed_on():
        out = plain(x)
        (out.output.square().sum() + out.auxiliary_loss).backward()

    wanted = gradients(plain, handed_on)
    same(gradients(attached, lambda: attached(x).output.square().sum().backward()), wanted)
    for reentrant in (False, True):

        def recomputed(reentrant=reentrant):
            checkpoint(lambda rows: attached(rows).output, x, use_reentrant=reentrant).square().sum().backward()

        same(gradients(attached, recomputed), wanted)

    def in_halves(layer, extra):
        for half in x.split(2):
            out = layer(half)
            ((out.output.square().sum() + extra(out)) / 2).backward()

    accumulated = gradients(plain, lambda: in_halves(plain, lambda out: out.auxiliary_loss))
    attached.attached_loss_scale = torch.tensor(0.5)
    same(gradients(attached, lambda: in_halves(attached, lambda out: 0)), accumulated, exact=False)
    attached.attached_loss_scale = None

    with torch.no_grad():
        assert attached(x).auxiliary_loss.item() == pytest.approx(plain(x).auxiliary_loss.item(), rel=1e-12)
    attached.eval(), plain.eval()
    same(
        gradients(attached, lambda: attached(x).output.square().sum().backward()),
        gradients(plain, lambda: plain(x).output.square().sum().backward()),
    )


def test_an_attached_loss_under_compile(device):
    layer = layer_of(device=device, attach_losses=True)
    x = torch.randn(4, 9, HIDDEN, dtype=torch.float64, device=device, requires_grad=True)
    wanted = gradients(layer, lambda: layer(x).output.square().sum().backward())
    compiled = torch.compile(lambda rows: layer(rows).output, fullgraph=True, backend="aot_eager")
    same(gradients(layer, lambda: compiled(x).square().sum().backward()), wanted)


def test_gradcheck_of_the_losses_with_padding(device):
    layer = layer_of(device=device, router_score="sqrt_softplus")
    x = torch.randn(3, 4, HIDDEN, dtype=torch.float64, device=device, requires_grad=True)
    padding = torch.rand(3, 4, device=device) < 0.3

    def losses(rows):
        out = layer(rows, padding_mask=padding)
        return out.balance_loss, out.sequence_balance_loss, out.z_loss, out.auxiliary_loss

    assert torch.autograd.gradcheck(losses, (x,))


@pytest.mark.parametrize("options", [{}, {"gate": "gshard", "top_k": 2}, {"gate": "noisy_top_k"}], ids=str)
def test_only_padding_and_no_tokens(options, device):
    options = {"top_k": TOP_K, **options}
    layer = anabranch.MoE(HIDDEN, 6, EXPERTS, dtype=torch.float64, device=device, **COEFFICIENTS, **options)
    for shape in ((3, 4), (0, 4), (3, 0)):
        x = torch.randn(*shape, HIDDEN, dtype=torch.float64, device=device, requires_grad=True)
        out = layer(x, padding_mask=torch.ones(shape, dtype=torch.bool, device=device))
        assert out.output.eq(0).all() and out.expert_load.sum() == 0
        (out.output.sum() + out.auxiliary_loss).backward()
        assert out.auxiliary_loss == 0 and x.grad.eq(0).all()


def test_what_is_refused(device):
    layer = layer_of(device=device)
    x = torch.randn(3, 4, HIDDEN, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="padding_mask is \\(12,\\)"):
        layer(x, padding_mask=torch.zeros(12, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match="bool"):
        layer(x, padding_mask=torch.zeros(3, 4, device=device))
    routing = torch.zeros(12, 1, dtype=torch.int64, device=device), torch.ones(12, 1, device=device)
    with pytest.raises(ValueError, match="routing with"):
        layer(x, routing, padding_mask=torch.zeros(3, 4, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match="z_coefficient"):
        layer_of(z_coefficient=-1.0)
    with pytest.raises(ValueError, match="attach_losses without"):
        anabranch.MoE(4, 4, 4, attach_losses=True)
    with pytest.raises(ValueError, match="router=False with attach_losses, z_coefficient"):
        anabranch.MoE(4, 4, 4, attach_losses=True, z_coefficient=0.1, router=False)
