"""Adapters of peft around an anabranch layer, and around parts of converted models: plain peft is the oracle."""

import anabranch
import peft
import pytest
import torch
import transformers
from models import assert_close, make_batch, make_model
from ranks import run_ranks
from test_lora import own_experts

transformers.logging.set_verbosity_error()


def adapted(model, targets, seed, **options):
    """With LoRA on parameters; not as peft begins, where it changes nothing."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_parameters=targets, **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def lora_of(model):
    return [(parameter, parameter.grad) for name, parameter in model.named_parameters() if "lora_" in name]


@pytest.mark.parametrize(
    "targets, of_plain",
    [
        (["mlp.gate.weight"], ["mlp.gate.weight"]),
        (["moe.experts.up_weight"], ["mlp.experts.gate_up_proj"]),
        (["moe.experts.up_weight", "moe.experts.down_weight"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ],
    ids=["router", "up", "experts"],
)
def test_converted_models_learn_as_plain_ones(targets, of_plain, seed):
    batch = make_batch(make_model("olmoe", seed), seed)
    plain = adapted(make_model("olmoe", seed), of_plain, seed, target_modules=["q_proj"])
    converted = adapted(anabranch.convert(make_model("olmoe", seed)), targets, seed, target_modules=["q_proj"])
    ours, theirs = lora_of(converted), lora_of(plain)
    assert len(ours) == len(theirs) == 4 * (1 + len(targets))
    with torch.no_grad():
        for (parameter, _), (value, _) in zip(ours, theirs, strict=True):
            parameter.copy_(value)
    unadapted = make_model("olmoe", seed)(batch).logits
    results = []
    for model in (converted, plain):
        out = model(batch, labels=batch)
        out.loss.backward()
        results.append(out.logits)
    assert (results[1] - unadapted).abs().max() > 0.1
    assert_close(results[0], results[1], batch, "logits")
    for (_, gradient), (_, expected) in zip(lora_of(converted), lora_of(plain), strict=True):
        assert gradient is not None and expected.abs().max() > 0
        assert_close(gradient, expected, batch, "gradient")
    frozen = [name for name, parameter in converted.named_parameters() if "lora_" not in name and parameter.requires_grad]
    assert not frozen
    merged = converted.merge_and_unload()
    assert_close(merged(batch).logits, results[0], batch, "merged")


def over_ranks(rank, size, seed, folder):
    targets = ["mlp.gate.weight", "moe.experts.up_weight", "moe.experts.down_weight"]
    whole = adapted(anabranch.convert(make_model("olmoe", seed), anabranch.groups.alone()), targets, seed, target_modules=["q_proj"])
    model = adapted(anabranch.convert(make_model("olmoe", seed)), targets, seed, target_modules=["q_proj"])
    of_whole, own = dict(whole.named_parameters()), own_experts(rank, size)

    def part(name, values):
        """Of a tensor of all experts': A [6 · r, in], B [out, r · 6]."""
        if ".experts." not in name:
            return values
        if "lora_A" in name:
            return values.unflatten(0, (6, 2))[own].flatten(0, 1)
        return values.unflatten(1, (2, 6))[..., own].flatten(1)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(part(name, of_whole[name]))
    batch = make_batch(whole, seed)
    expected = whole(batch, labels=batch)
    expected.loss.backward()
    mine = slice(rank * 4 // size, (rank + 1) * 4 // size)
    out = model(batch[mine], labels=batch[mine])
    assert_close(out.logits, expected.logits[mine], batch, "logits")
    out.loss.backward()
    anabranch.finish_gradients(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(parameter.grad, part(name, of_whole[name].grad), batch, name)
    optimizer.step()
    anabranch.save_checkpoint(folder, model, optimizer)
    return model(batch).logits.tolist(), batch.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_over_ranks(size, seed, tmp_path):
    """What they save one process loads, with the optimizer's state."""
    logits, batch = run_ranks(size, over_ranks, seed, str(tmp_path))[0]
    targets = ["mlp.gate.weight", "moe.experts.up_weight", "moe.experts.down_weight"]
    model = adapted(anabranch.convert(make_model("olmoe", seed)), targets, seed + 1, target_modules=["q_proj"])
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    anabranch.load_checkpoint(tmp_path, model, optimizer)
    batch = torch.tensor(batch)
    assert_close(model(batch).logits, torch.tensor(logits), batch, "logits")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape and optimizer.state[parameter]["exp_avg"].abs().max() > 0, name


def test_a_layer_by_itself(device, seed):
    layer = anabranch.MoE(8, 12, 4, 2, glu=True, device=device, dtype=torch.float32, seed=seed)
    model = torch.nn.Sequential(layer)
    x = torch.randn(50, 8, device=device)
    before = model(x)
    targets = ["router.weight", "experts.up_weight"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_parameters=targets), model)
    assert torch.equal(model(x).output, before.output)
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(lora) == 4
    for parameter in lora:
        torch.nn.init.normal_(parameter)
    out = model(x)
    assert not torch.equal(out.expert_load, before.expert_load)
    (out.output.square().sum() + out.balance_loss).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in lora)


def test_experts_that_have_been_adapted_are_not_converted(seed):
    model = adapted(make_model("olmoe", seed), ["mlp.experts.down_proj"], seed).base_model.model
    with pytest.raises(ValueError, match="Convert first, then add adapters"):
        anabranch.convert(model)
