"""Balance of a whole step, over micro-batches and replicas of the experts: its loss, and biases by quantile."""

import anabranch
import pytest
import torch
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

EXPERTS, TOP_K, HIDDEN, MICRO_BATCHES = 6, 2, 8, 3
OPTIONS = dict(seed=4, dtype=torch.float64, router_score="sigmoid")
LOSSES = dict(global_balance_coefficient=0.5, z_coefficient=0.1)
QUANTILES = dict(expert_bias=True, expert_bias_update="quantile")


def layer_of(group, **more):
    return anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, group=group, **OPTIONS, **more)


def batches(seed):
    """[steps, micro-batches, tokens, hidden], far from balance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, MICRO_BATCHES, 24, HIDDEN, generator=generator, dtype=torch.float64) + 1


def train(layer, groups, parts, recompute=None):
    """Of each step the losses, and the router's gradient of the losses alone."""
    anabranch.set_expert_replicas(layer, groups)
    found = []
    for step in parts:
        layer.zero_grad()
        losses = []
        for x in step:

            def losses_of(rows):
                out = layer(rows)
                return out.auxiliary_loss, out.global_balance_loss

            if recompute is None:
                auxiliary, of_step = losses_of(x)
            else:
                rows = x.clone().requires_grad_()  # what reentrant checkpointing asks for
                auxiliary, of_step = checkpoint(losses_of, rows, use_reentrant=recompute)
            auxiliary.backward()
            losses.append(of_step.item())
        layer.eval()
        layer(step[0])  # is not counted
        layer.train()
        anabranch.finish_gradients(layer, groups)
        found.append((losses, layer.router.weight.grad.tolist()))
    return found


def rank_of_replicas(rank, size, seed, expert_parallel):
    groups = anabranch.make_parallel_groups(expert_parallel)
    return train(layer_of(groups.expert_parallel, **LOSSES), groups, own_tokens(seed, rank, size))


def own_tokens(seed, rank, size):
    return batches(seed)[:, :, 24 * rank // size : 24 * (rank + 1) // size]


def by_hand(seed, weight, size, expert_parallel):
    """The same, of groups one after another."""
    found = []
    per_group = 24 * expert_parallel // size
    for step in batches(seed):
        weight = weight.detach().clone().requires_grad_()
        load, total, losses = torch.zeros(EXPERTS, dtype=torch.float64), 0, []
        for x in step:
            logits = x @ weight.T
            scores = logits.sigmoid()
            load = load + torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
            of_groups = []
            for group in range(size // expert_parallel):
                own = slice(group * per_group, (group + 1) * per_group)
                shares = (scores / scores.sum(-1, keepdim=True))[own].mean(0)
                of_groups.append(EXPERTS * (load / load.sum() * shares).sum())
                z = logits[own].logsumexp(-1).square().mean()
                total = total + (0.5 * of_groups[-1] + 0.1 * z) * expert_parallel / size
            losses.append([loss.item() for loss in of_groups])
        total.backward()
        found.append((losses, weight.grad))
    return found


@pytest.mark.parametrize("size, expert_parallel", [(1, 1), (2, 1), (4, 2), (3, 3)])
def test_a_steps_balance_over_micro_batches_and_replicas(size, expert_parallel, seed):
    found = run_ranks(size, rank_of_replicas, seed, expert_parallel)
    weight = layer_of(anabranch.groups.alone()).router.weight
    for rank, steps in enumerate(found):
        for (losses, gradient), (wanted, wanted_gradient) in zip(steps, by_hand(seed, weight, size, expert_parallel)):
            of_group = [each[rank // expert_parallel] for each in wanted]
            assert losses == pytest.approx(of_group, rel=1e-12)
            torch.testing.assert_close(torch.tensor(gradient, dtype=torch.float64), wanted_gradient)


def test_recomputed_forwards_are_counted_once(seed):
    alone = anabranch.groups.alone()
    groups = anabranch.ParallelGroups(alone, alone, alone)
    plain = train(layer_of(alone, **LOSSES), groups, batches(seed))
    for reentrant in (False, True):
        assert train(layer_of(alone, **LOSSES), groups, batches(seed), reentrant) == plain


def test_attached_compiled_and_without_gradients(device):
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64, device=device)
    plain = anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, device=device, **OPTIONS, **LOSSES)
    attached = anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, device=device, **OPTIONS, **LOSSES, attach_losses=True)
    with torch.no_grad():
        first = plain(x[:1])  # is counted
        attached(x[:1])
    out = plain(x[1:])
    assert not torch.equal(out.global_balance_loss, first.global_balance_loss)
    (out.output.sum() + out.auxiliary_loss).backward()
    compiled = torch.compile(lambda rows: attached(rows).output, fullgraph=True, backend="aot_eager")
    compiled(x[1:]).sum().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(attached.get_parameter(name).grad, parameter.grad, msg=name)
    assert torch.equal(attached._step_load, plain._step_load) and plain._step_load.sum() == 2 * 9 * TOP_K
    plain.eval()
    assert plain(x).global_balance_loss is None
    plain.evaluation_losses = True
    out = plain(x)
    torch.testing.assert_close(out.global_balance_loss, out.balance_loss)  # of these tokens alone


def test_gradcheck(device):
    layer = anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, device=device, **OPTIONS, **LOSSES)
    layer.eval()  # a loss of these tokens alone, whatever has been before
    layer.evaluation_losses = True
    x = torch.randn(3, 4, HIDDEN, dtype=torch.float64, device=device, requires_grad=True)
    padding = torch.rand(3, 4, device=device) < 0.3

    def losses(rows):
        out = layer(rows, padding_mask=padding)
        return out.global_balance_loss, out.mean_probabilities, out.auxiliary_loss

    assert torch.autograd.gradcheck(losses, (x,))


def test_nothing_to_balance(device):
    layer = anabranch.MoE(HIDDEN, 6, EXPERTS, TOP_K, device=device, **OPTIONS, **LOSSES)
    for shape in ((3, 4), (0, 4)):
        x = torch.randn(*shape, HIDDEN, dtype=torch.float64, device=device, requires_grad=True)
        out = layer(x, padding_mask=torch.ones(shape, dtype=torch.bool, device=device))
        out.auxiliary_loss.backward()
        assert out.global_balance_loss == 0 and x.grad.eq(0).all()


def quantiles_of_a_rank(rank, size, seed, expert_parallel):
    groups = anabranch.make_parallel_groups(expert_parallel)
    return quantiles(layer_of(groups.expert_parallel, **QUANTILES), groups, own_tokens(seed, rank, size))


def quantiles(layer, groups, parts, recompute=False):
    anabranch.set_expert_bias_rate(layer, 0.75)
    biases = []
    for step in parts:
        for x in step:
            y = checkpoint(lambda x: layer(x).output, x, use_reentrant=False) if recompute else layer(x).output
            y.sum().backward()
        anabranch.finish_gradients(layer, groups)
        biases.append(layer.router.expert_bias.tolist())
    return biases


@pytest.mark.parametrize("size, expert_parallel", [(2, 1), (4, 2), (3, 3)])
def test_quantiles_are_those_of_all_ranks_tokens(size, expert_parallel, seed):
    found = run_ranks(size, quantiles_of_a_rank, seed, expert_parallel)
    alone = anabranch.groups.alone()
    groups = anabranch.ParallelGroups(alone, alone, alone)
    layer = layer_of(alone, **QUANTILES)
    wanted = quantiles(layer_of(alone, **QUANTILES), groups, batches(seed))
    assert all(biases == wanted for biases in found)
    assert quantiles(layer_of(alone, **QUANTILES), groups, batches(seed), recompute=True) == wanted
    bias = torch.zeros(EXPERTS, dtype=torch.float64)  # by hand, of sorted numbers
    for step, biases in zip(batches(seed), wanted):
        scores = (step.flatten(0, 1) @ layer.router.weight.detach().T).sigmoid()
        cutoff = (scores + bias).sort(-1, descending=True).values[:, TOP_K : TOP_K + 1]
        sorted_wanted = (cutoff - scores).sort(0).values
        exact = sorted_wanted[len(scores) * TOP_K // EXPERTS - 1]
        width = (2 + bias.max() - bias.min()) / 1000
        new = torch.tensor(biases, dtype=torch.float64)
        assert ((new - (0.25 * bias + 0.75 * (exact - exact.mean()))).abs() < 1.51 * width).all()
        bias = new


def test_megatrons_global_loss(seed):
    utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    alone = anabranch.groups.alone()
    layer, load = layer_of(alone, **LOSSES), torch.zeros(EXPERTS, dtype=torch.float64)
    for forwards, x in enumerate(batches(seed)[0], 1):
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        scores = (theirs @ layer.router.weight.detach().T).sigmoid()
        load += torch.bincount(scores.topk(TOP_K).indices.flatten(), minlength=EXPERTS)
        probabilities = scores / scores.sum(-1, keepdim=True)
        loss = utils.switch_load_balancing_loss_func(probabilities, load / forwards, len(x), TOP_K, EXPERTS, 1.0)
        out = layer(mine)
        torch.testing.assert_close(out.global_balance_loss, loss)
        torch.autograd.backward([loss, out.global_balance_loss])
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_megatrons_quantiles(seed):
    utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    if not hasattr(utils, "qb_dual_update"):
        pytest.skip("this Megatron-Core has no quantile balancing")
    layer = layer_of(anabranch.groups.alone(), **QUANTILES)
    bias = layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, EXPERTS)).clone()
    x = batches(seed)[0, 0]
    scores = (x @ layer.router.weight.detach().T).sigmoid()
    ids, theirs = utils.qb_dual_update(scores, TOP_K, -bias)
    out = layer(x)
    assert torch.equal(out.expert_ids, ids)
    layer.update_expert_bias(out.bias_histogram, 1.0)
    # Theirs is the next order statistic, ours between it and the one before, but for the width of a bin.
    cutoff = (scores + bias).sort(-1, descending=True).values[:, TOP_K : TOP_K + 1]
    ordered = (cutoff - scores).sort(0).values
    share = len(x) * TOP_K // EXPERTS
    allowed = 2 * (ordered[share] - ordered[share - 1] + (2 + bias.max() - bias.min()) / 1000).max()
    assert (layer.router.expert_bias + theirs - theirs.mean()).abs().max() <= allowed
