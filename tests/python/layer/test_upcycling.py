"""Dense models into experts: what they compute at first, and that they train."""

import copy

import anabranch
import pytest
import torch
import transformers
from ranks import run_ranks


def dense_model(seed, dtype=torch.float64, bias=False):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=50,
        mlp_bias=bias, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def a_batch(seed):
    return torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(seed))


CASES = [dict(num_experts=4, top_k=2), dict(num_experts=4, top_k=1, granularity=3), dict(num_experts=3, top_k=2, granularity=4)]


def losses_of_a_rank(rank, size, seed, case, bias):
    """Before, after, and after a few steps."""
    model, batch = dense_model(seed, bias=bias), a_batch(seed)
    before = model(batch, labels=batch).loss.item()
    anabranch.upcycle(model, **case, attach_losses=True, balance_coefficient=0.01)
    losses = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(4):
        loss = model(batch, labels=batch).loss
        losses.append(loss.item())
        loss.backward()
        anabranch.finish_gradients(model)
        anabranch.clip_gradient_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    layer = model.model.layers[0].mlp.moe
    return before, losses, [layer.options["num_experts"], layer.options["top_k"], layer.options["expert_hidden_size"]]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size, bias", [(1, True), (2, False)])
def test_it_starts_at_the_dense_models_loss_and_learns(size, bias, case, seed):
    for before, losses, options in run_ranks(size, losses_of_a_rank, seed, case, bias):
        assert losses[0] == pytest.approx(before, rel=1e-12)
        assert losses[-1] < losses[0]
        granularity = case.get("granularity", 1)
        assert options == [case["num_experts"] * granularity, case["top_k"] * granularity, 24 // granularity]


def test_noise_parts_the_experts(seed):
    model, batch = dense_model(seed), a_batch(seed)
    plain, again = copy.deepcopy(model), copy.deepcopy(model)
    for each in (model, again):
        anabranch.upcycle(each, 4, 2, noise=0.05, seed=9)
    first, second = (each.model.layers[0].mlp.moe.experts.up_weight for each in (model, again))
    assert torch.equal(first, second) and not torch.equal(first[0], first[1])
    ratio = (first[0] / torch.cat([getattr(plain.model.layers[0].mlp, name).weight for name in ("gate_proj", "up_proj")])) - 1
    assert 0.03 < ratio.std() < 0.07 and abs(ratio.mean()) < 0.01
    changed = model(batch, labels=batch).loss.item()
    assert changed != plain(batch, labels=batch).loss.item()


def test_some_layers_and_a_checkpoint(seed, tmp_path):
    dense_model(seed, torch.float32).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = a_batch(seed)
    before = model(batch, labels=batch).loss.item()
    anabranch.upcycle(model, 4, 2, layers=["model.layers.1.mlp"])
    assert not isinstance(model.model.layers[0].mlp, anabranch.huggingface.upcycling.UpcycledFeedForward)
    assert isinstance(model.model.layers[1].mlp, anabranch.huggingface.upcycling.UpcycledFeedForward)
    assert model(batch, labels=batch).loss.item() == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(
    "arguments, shown",
    [
        (dict(num_experts=4, top_k=1), "top_k = 1"),
        (dict(num_experts=4, top_k=2, granularity=5), "granularity = 5"),
        (dict(num_experts=4, top_k=2, layers=["model.embed_tokens"]), "embed_tokens"),
        (dict(num_experts=4, top_k=2, activation="relu"), "activation follow"),
    ],
    ids=str,
)
def test_what_is_refused(arguments, shown, seed):
    with pytest.raises(ValueError, match=shown):
        anabranch.upcycle(dense_model(seed), **arguments)
