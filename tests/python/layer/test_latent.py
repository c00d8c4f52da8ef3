"""LatentMoE: projections around the exchange, against plain PyTorch, and what they save on the wire."""

import anabranch
import reference
import torch
from case import parameters_of
from ranks import run_ranks

HIDDEN, LATENT, INNER, EXPERTS, TOP_K = 16, 6, 10, 6, 2
OPTIONS = dict(glu=True, activation="silu", seed=3, dtype=torch.float64, shared_expert_hidden_size=5)


def rows_of(seed, rank, size):
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, 31, HIDDEN, generator=generator, dtype=torch.float64)
    return x[31 * rank // size : 31 * (rank + 1) // size], dy[31 * rank // size : 31 * (rank + 1) // size]


def step_of_a_rank(rank, size, seed):
    found = {}
    for latent in (0, LATENT):
        layer = anabranch.MoE(HIDDEN, INNER, EXPERTS, TOP_K, latent_size=latent, **OPTIONS)
        x, dy = rows_of(seed, rank, size)
        out = layer(x)
        sent = layer.stats().bytes_sent
        (out.output * dy).sum().backward()
        anabranch.finish_gradients(layer)
        found[latent] = {"sent": sent, "sent with backward": layer.stats().bytes_sent, "ids": out.expert_ids.tolist()}
    gradients = {name: parameter.grad.tolist() for name, parameter in layer.named_parameters()}
    return {**found, "output": out.output.tolist(), "gradients": gradients}


def expected(seed, size):
    layer = anabranch.MoE(HIDDEN, INNER, EXPERTS, TOP_K, latent_size=LATENT, group=anabranch.groups.alone(), **OPTIONS)
    leaves = {name: value.requires_grad_() for name, value in parameters_of(layer).items()}
    x, dy = rows_of(seed, 0, 1)
    plain = reference.Options(top_k=TOP_K, glu=True, activation="silu")
    _, ids, weights = reference.route(x @ leaves["router.weight"].T, plain)
    routed = {name: leaf for name, leaf in leaves.items() if name.startswith("experts")}
    y = reference.mix(x @ leaves["latent_down"].T, routed, ids, weights, plain) @ leaves["latent_up"].T
    y = y + reference.feed_forward(x, leaves, "shared_expert.", 0, plain)
    ((y * dy).sum() / size).backward()
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def test_equals_plain_pytorch_and_sends_fewer_bytes(seed):
    for size in (1, 3):
        found = run_ranks(size, step_of_a_rank, seed)
        y, gradients = expected(seed, size)
        output = torch.tensor([row for of_rank in found for row in of_rank["output"]], dtype=torch.float64)
        torch.testing.assert_close(output, y)
        for name, wanted in gradients.items():
            parts = [of_rank["gradients"][name] for of_rank in found]
            if name.startswith("experts."):
                parts = [[row for part in parts for row in part]]
            for part in parts:
                torch.testing.assert_close(torch.tensor(part, dtype=torch.float64), wanted, msg=lambda m, name=name: f"{name}: {m}")
        # A token's row goes to each other rank of its experts, and one comes back; so do the gradients.
        rows = 0
        for rank, of_rank in enumerate(found):
            assert of_rank[0]["ids"] == of_rank[LATENT]["ids"]
            for ids in of_rank[LATENT]["ids"]:
                rows += len({expert * size // EXPERTS for expert in ids} - {rank})
        saved = 2 * rows * (HIDDEN - LATENT) * 8
        for what, times in (("sent", 1), ("sent with backward", 2)):
            total = {latent: sum(of_rank[latent][what] for of_rank in found) for latent in (0, LATENT)}
            assert total[0] - total[LATENT] == times * saved, what
        assert size == 1 or rows > 0
