"""LoRA on experts as grouped GEMMs, under peft: the same as experts whose weights have the products added."""

import anabranch
import peft
import pytest
import torch
import transformers
from models import assert_close, make_batch, make_model, make_more
from ranks import run_ranks
from test_convert import layers_of
from torch.utils._python_dispatch import TorchDispatchMode

transformers.logging.set_verbosity_error()


def adapted(model, seed, r=3, **options):
    from anabranch.lora import lora_config

    torch.manual_seed(seed)
    config = lora_config(r=r, lora_alpha=6, target_modules=["q_proj", "moe.experts"], **options)
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)  # not as peft begins, where it changes nothing
    return model


def lora_experts(model):
    from anabranch.lora import LoraExperts

    return [module for module in model.modules() if isinstance(module, LoraExperts)]


def expected_of(family, seed, model, batch):
    """Plain transformers with W + scale · B A in the experts' place, differentiable in A and B, and LoRA on attention
    by peft: logits and gradients of the adapters, by name."""
    plain = make_model(family, seed)
    plain = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    theirs, leaves, weights = dict(plain.named_parameters()), {}, {}
    for name, value in model.named_parameters():
        if "lora_" not in name:
            continue
        if ".experts." not in name:
            theirs[name].data.copy_(value)
            leaves[name] = theirs[name]
        else:
            leaves[name] = value.detach().clone().requires_grad_()
    for name, leaf in leaves.items():
        if ".experts." in name and "lora_A" in name:
            target = name.split(".moe.experts.")[0] + "." + ("gate_up_proj" if "up_weight" in name else "down_proj")
            product = leaves[name.replace("lora_A", "lora_B")] @ leaf
            weights[target] = theirs[target].detach() + 2.0 * product
    out = torch.func.functional_call(plain, weights, (batch,), dict(labels=batch), strict=False)
    out.loss.backward()
    return out.logits, {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_they_learn_as_merged_weights_would(family, seed, tmp_path):
    batch = make_batch(make_model(family, seed), seed)
    model = adapted(anabranch.convert(make_model(family, seed)), seed)
    assert len(lora_experts(model)) == 2
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained) and len(trained) == 2 * (2 + 4)
    logits, gradients = expected_of(family, seed, model, batch)
    out = model(batch, labels=batch)
    out.loss.backward()
    assert_close(out.logits, logits, batch, "logits")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert_close(parameter.grad, gradients[name], batch, name)
    with model.disable_adapter():
        assert_close(model(batch).logits, make_model(family, seed)(batch).logits, batch, "without")
    # Adapters by peft's own files.
    model.save_pretrained(tmp_path / "adapters")
    state = peft.utils.save_and_load.load_peft_weights(tmp_path / "adapters")
    assert sum("experts" in name and "_extra" not in name for name in state) == 2 * 4
    other = adapted(anabranch.convert(make_model(family, seed)), seed + 1)
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(other(batch).logits, model(batch).logits)
    # Merged, and saved as a plain model.
    merged = model.merge_and_unload()
    assert not lora_experts(merged) and layers_of(merged)
    assert_close(merged(batch).logits, logits, batch, "merged")
    merged.save_pretrained(tmp_path / "merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(loaded(batch).logits, logits, batch, "merged and loaded")


class Products(TorchDispatchMode):
    """Shapes of the weights' gradients that are computed."""

    def __init__(self):
        super().__init__()
        self.of_weights = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        if function is torch.ops.anabranch.grouped_gemm_wgrad.default:
            self.of_weights.append(tuple(found.shape))
        return found


def test_frozen_weights_cost_no_gradient(seed):
    model = adapted(anabranch.convert(make_model("olmoe", seed)), seed)
    batch = make_batch(make_model("olmoe", seed), seed)
    out = model(batch, labels=batch)
    with Products() as products:
        out.loss.backward()
    assert sorted(set(products.of_weights)) == [(6, 3, 12), (6, 3, 16), (6, 16, 3), (6, 24, 3)]
    assert len(products.of_weights) == 2 * 4


def everywhere(model, seed, r=3):
    """On attention, router, shared and routed experts, as peft begins."""
    from anabranch.lora import lora_config

    torch.manual_seed(seed)
    shared = [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    config = lora_config(
        r=r, lora_alpha=6, target_modules=["q_proj", "shared_expert_gate", *shared, "moe.experts"], target_parameters=["mlp.gate.weight"]
    )
    return peft.get_peft_model(model, config)


def own_experts(rank, size, experts=6):
    """The first ranks have one more."""
    counts = [experts // size + (other < experts % size) for other in range(size)]
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def over_ranks(rank, size, seed, folder):
    alone = anabranch.groups.alone()
    whole = everywhere(anabranch.convert(make_more("Qwen2Moe", seed), alone), seed)
    model = everywhere(anabranch.convert(make_more("Qwen2Moe", seed)), seed)
    of_whole, own = dict(whole.named_parameters()), own_experts(rank, size)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # as it begins, at any number of ranks
            assert torch.equal(parameter, of_whole[name][own] if ".experts." in name else of_whole[name]), name
    for name, parameter in whole.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    batch = make_batch(whole, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(of_whole[name][own] if ".experts." in name else of_whole[name])
    expected = whole(batch, labels=batch)
    expected.loss.backward()
    mine = slice(rank * 4 // size, (rank + 1) * 4 // size)
    out = model(batch[mine], labels=batch[mine])
    assert_close(out.logits, expected.logits[mine], batch, "logits")
    out.loss.backward()  # equal parts: the mean of the ranks' means is the mean
    anabranch.finish_gradients(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = of_whole[name].grad
            assert_close(parameter.grad, gradient[own] if ".experts." in name else gradient, batch, name)
    anabranch.save_checkpoint(folder, model)
    other = everywhere(anabranch.convert(make_more("Qwen2Moe", seed)), seed + 1)
    anabranch.load_checkpoint(folder, other)
    assert torch.equal(other(batch[mine]).logits, out.logits)
    peft_files(rank, model, seed, folder, batch[mine], out.logits)
    merged = model.merge_and_unload()
    merged.save_pretrained(f"{folder}/merged")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/merged")
    assert_close(loaded(batch).logits, expected.logits, batch, "merged and loaded")


def peft_files(rank, model, seed, folder, batch, logits):
    """Of all ranks' adapters, which each rank takes its own from, and a rank alone all; of rank 0's alone, which others refuse."""
    from anabranch.lora import load_adapters, save_adapters

    save_adapters(model, f"{folder}/adapters")
    again = load_adapters(anabranch.convert(make_more("Qwen2Moe", seed)), f"{folder}/adapters")
    for (name, value), other in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other), name
    alone = load_adapters(anabranch.convert(make_more("Qwen2Moe", seed), anabranch.groups.alone()), f"{folder}/adapters")
    assert_close(alone(batch).logits, logits, batch, "alone")
    if rank == 0:
        model.save_pretrained(f"{folder}/of rank 0")
    torch.distributed.barrier()
    model = anabranch.convert(make_more("Qwen2Moe", seed))
    if rank == 0:
        load_adapters(model, f"{folder}/of rank 0")
    else:
        with pytest.raises(ValueError, match=r"of 6, this rank has .* anabranch\.lora\.save_adapters"):
            load_adapters(model, f"{folder}/of rank 0")


@pytest.mark.parametrize("size", [2, 4])
def test_over_ranks(size, seed, tmp_path):
    run_ranks(size, over_ranks, seed, str(tmp_path))


def test_what_is_refused(seed):
    from anabranch.lora import lora_config, save_adapters

    with pytest.raises(ValueError, match="lora_dropout = 0.1"):
        adapted(anabranch.convert(make_model("olmoe", seed)), seed, lora_dropout=0.1)
    layer = torch.nn.Sequential(anabranch.MoE(8, 12, 4, 2, seed=seed))
    model = peft.inject_adapter_in_model(lora_config(r=2, target_modules=["experts"]), layer)
    with pytest.raises(ValueError, match="has its own router"):
        model(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"model\.save_pretrained\(folder\) saves it"):
        save_adapters(peft.get_peft_model(make_model("olmoe", seed), peft.LoraConfig(r=2, target_modules=["q_proj"])), "")


def test_biases_and_autocast(seed):
    from anabranch.lora import lora_config

    layer = anabranch.MoE(8, 12, 4, 2, bias=True, activation="gelu", router=False, seed=seed, dtype=torch.float32)
    torch.nn.init.normal_(layer.experts.up_bias)
    torch.nn.init.normal_(layer.experts.down_bias)
    x, ids, weights = torch.randn(2, 9, 8), torch.rand(18, 4).argsort(-1)[:, :2], torch.rand(18, 2)
    model = peft.inject_adapter_in_model(lora_config(r=2, target_modules=["experts"]), torch.nn.Sequential(layer))[0]
    found = model(x, routing=(ids, weights))
    layer.experts.enable_adapters(False)
    expected = model(x, routing=(ids, weights))  # B is 0
    layer.experts.enable_adapters(True)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-5, atol=1e-5)
    assert found.expert_load.equal(expected.expert_load)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(x, routing=(ids, weights)).output
    assert rounded.dtype == torch.bfloat16
    assert (rounded - expected.output).abs().max() < 0.05 * expected.output.abs().max()
