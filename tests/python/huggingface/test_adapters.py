"""Adapters of peft around an anabranch layer, and around parts of converted models: plain peft is the oracle."""

import anabranch
import peft
import pytest
import torch
import transformers
from models import assert_close, make_batch, make_model

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
