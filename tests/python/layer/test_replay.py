"""Routing recorded, replayed and traced; ids of no expert from outside."""

import json

import anabranch
import pytest
import reference
import torch
from case import parameters_of
from torch import nn
from torch.utils.checkpoint import checkpoint


class Two(nn.Module):
    def __init__(self, device, **options):
        super().__init__()
        make = lambda seed: anabranch.MoE(8, 12, 6, 2, seed=seed, dtype=torch.float64, device=device, **options)  # noqa: E731
        self.first, self.second = make(1), make(2)
        self.checkpointed = False

    def forward(self, x):
        for layer in (self.first, self.second):
            run = lambda rows, layer=layer: layer(rows).output  # noqa: E731
            x = x + (checkpoint(run, x, use_reentrant=False) if self.checkpointed else run(x))
        return x


def gradients(model, xs):
    model.zero_grad()
    outputs = []
    for x in xs:
        y = model(x)
        y.square().sum().backward()
        outputs.append(y.detach())
    return [*outputs, *(parameter.grad for parameter in model.parameters())]


def inputs(device, count=2):
    return [torch.randn(11, 8, dtype=torch.float64, device=device) for _ in range(count)]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("options", [{}, {"jitter": 0.4}], ids=str)
def test_a_run_is_reproduced_bit_for_bit(options, checkpointed, device, tmp_path):
    model = Two(device, engine="deterministic", **options)  # not one that is still measured
    xs = inputs(device)
    model.eval()  # a rollout
    with anabranch.record_routing(model) as record:
        wanted = gradients(model, xs)
    assert [len(ids) for ids in record.expert_ids.values()] == [2, 2]
    record.save(tmp_path / "routing.pt")
    model.checkpointed = checkpointed
    with anabranch.replay_routing(model, anabranch.RoutingRecord.load(tmp_path / "routing.pt")):
        for found, expected in zip(gradients(model, xs), wanted):
            assert torch.equal(found, expected)


def test_replayed_experts_are_weighed_by_the_router_of_now(device):
    model = Two(device)
    x = torch.randn(11, 8, dtype=torch.float64, device=device)
    with anabranch.record_routing(model) as record:
        model(x)
    with torch.no_grad():
        model.first.router.weight.normal_()
    leaf = x.clone().requires_grad_()
    with anabranch.replay_routing(model, record):
        out = model.first(leaf)
    out.output.square().sum().backward()
    ids = record.expert_ids["first"][0]
    assert torch.equal(out.expert_ids, ids)

    leaves = {name: value.requires_grad_() for name, value in parameters_of(model.first).items()}
    plain = x.cpu().clone().requires_grad_()
    scores = (plain @ leaves["router.weight"].T).softmax(-1).gather(1, ids.cpu())
    weights = scores / scores.sum(-1, keepdim=True)
    reference.mix(plain, leaves, ids.cpu(), weights, reference.Options(top_k=2)).square().sum().backward()
    torch.testing.assert_close(out.expert_weights.cpu(), weights.detach())
    torch.testing.assert_close(leaf.grad.cpu(), plain.grad)
    for name, parameter in model.first.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), leaves[name].grad)


def test_a_mask_leaves_the_rest_to_the_router(device):
    model = Two(device)
    x = torch.randn(11, 8, dtype=torch.float64, device=device)
    with anabranch.record_routing(model) as record:
        model.first(x)
    with torch.no_grad():
        model.first.router.weight.normal_()
    record.expert_ids["second"] = record.expert_ids["first"]
    mask = torch.rand(11, device=device) < 0.5
    own = model.first(x).expert_ids
    with anabranch.replay_routing(model, record, mask):
        mixed = model.first(x).expert_ids
    assert torch.equal(mixed, torch.where(mask.unsqueeze(1), record.expert_ids["first"][0], own))


def test_ids_of_no_expert(device):
    """Of a choice and of a whole routing: nothing is computed for them, and a token without any gets zeros."""
    layer = anabranch.MoE(8, 12, 6, 2, dtype=torch.float64, device=device)
    x = torch.randn(5, 8, dtype=torch.float64, device=device)
    ids = torch.tensor([[0, 1], [2, -1], [-1, -1], [-1, 5], [3, 4]], device=device)
    weights = torch.rand(5, 2, dtype=torch.float64, device=device)
    out = layer(x, (ids, weights), may_skip=True)
    plain = reference.mix(
        x.cpu(), parameters_of(layer), ids.cpu().clamp_min(0), weights.cpu().masked_fill(ids.cpu() < 0, 0), reference.Options(2)
    )
    torch.testing.assert_close(out.output.cpu()[[0, 2, 4]], plain[[0, 2, 4]])
    assert out.expert_load.tolist() == [1, 1, 1, 1, 1, 1]
    chosen = layer(x, expert_ids=ids)
    assert torch.equal(chosen.expert_ids, ids) and chosen.expert_load.sum() == 6
    torch.testing.assert_close(chosen.expert_weights.sum(-1).cpu(), torch.tensor([1.0, 1, 0, 1, 1], dtype=torch.float64))
    assert chosen.output[2].eq(0).all()
    with pytest.raises((ValueError, RuntimeError), match="token 1"):
        layer(x, (ids, weights))
        anabranch.check()
    for wrong in ([6, 0], [1, 1], [-3, 0]):
        ids[4] = torch.tensor(wrong)
        with pytest.raises(ValueError, match="token 4"):
            layer(x, expert_ids=ids)


def test_a_trace_has_a_line_a_forward(device, tmp_path):
    model = Two(device)
    with anabranch.trace_routing(model, tmp_path / "trace.jsonl"), anabranch.record_routing(model) as record:
        for x in inputs(device):
            model(x)
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [(line["layer"], line["forward"]) for line in lines] == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    for line in lines:
        assert line["expert_ids"] == record.expert_ids[line["layer"]][line["forward"]].tolist()
        assert all(sum(weights) == pytest.approx(1) for weights in line["expert_weights"])


def test_what_is_refused(device):
    model = Two(device)
    x = inputs(device, 1)[0]
    with anabranch.record_routing(model) as record:
        model(x)
    with anabranch.replay_routing(model, record), pytest.raises(RuntimeError, match="first has run 2 times"):
        model(x)
        model(x)
    with pytest.raises(ValueError, match="the record is of"), anabranch.replay_routing(model.first, record):
        pass
