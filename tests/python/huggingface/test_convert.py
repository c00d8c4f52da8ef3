"""anabranch.convert: models of transformers over anabranch layers, and back. The oracle is plain transformers."""

import copy
import gc
import pickle
import weakref

import anabranch
import pytest
import torch
import transformers
from models import FAMILIES, assert_close, make_batch, make_model, tolerance
from ranks import backend_for, run_ranks
from safetensors.torch import load_file

transformers.logging.set_verbosity_error()


def step(model, batch, **options):
    """Output, gradients by name: of the mean over tokens."""
    out = model(batch, labels=batch, **options)
    out.loss.backward()
    return out, family_gradients(model)


def family_gradients(model):
    """A converted model's gradients too by the family's names."""
    return {plain_name(name): parameter.grad for name, parameter in model.named_parameters()}


def plain_name(name):
    for ours, theirs in (("moe.experts.up_weight", "gate_up_proj"), ("moe.experts.down_weight", "down_proj")):
        name = name.replace(ours, theirs)
    return name


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, anabranch.MoE)]


def assert_same_weights(model, folder):
    """What plain transformers loads from `folder` is that model: in every bit, under the same names."""
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    assert type(loaded).__name__ == type(model).__name__ and not layers_of(loaded)
    expected = model.state_dict()
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.cpu()), name


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients(family, renormalize, device, seed):
    options = {} if family == "mixtral" else {"norm_topk_prob": renormalize}
    plain = make_model(family, seed, **options)
    batch = make_batch(plain, seed).to(device)
    plain.to(device)
    converted = anabranch.convert(copy.deepcopy(plain))
    assert len(layers_of(converted)) == (1 if family in ("qwen3_moe", "deepseek_v3") else 2)
    expected, expected_gradients = step(plain, batch)
    actual, gradients = step(converted, batch)
    assert_close(actual.logits, expected.logits, batch, "logits")
    assert_close(actual.loss, expected.loss, batch, "loss")
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], batch, name)
    assert layers_of(converted)[0].stats().expert_load.sum() == batch.numel() * plain.config.num_experts_per_tok


@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_and_their_loss(family, seed):
    plain = make_model(family, seed)
    batch = make_batch(plain, seed)
    converted = anabranch.convert(copy.deepcopy(plain))
    without, _ = step(converted, batch)
    assert without.router_logits is None
    converted.zero_grad()
    plain.zero_grad()
    expected, expected_gradients = step(plain, batch, output_router_logits=True)
    actual, gradients = step(converted, batch, output_router_logits=True)
    assert len(actual.router_logits) == len(expected.router_logits) == len(layers_of(converted))
    for mine, theirs in zip(actual.router_logits, expected.router_logits):
        assert_close(mine, theirs, batch, "router logits")
    if expected.get("aux_loss") is not None:
        assert_close(actual.aux_loss, expected.aux_loss, batch, "auxiliary loss")
    for name, gradient in gradients.items():
        assert_close(gradient, expected_gradients[name], batch, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_what_is_saved(family, dtype, seed, tmp_path):
    plain = make_model(family, seed).to(dtype)
    converted = anabranch.convert(copy.deepcopy(plain))
    converted.save_pretrained(tmp_path / "of the state")
    assert_same_weights(plain, tmp_path / "of the state")
    converted.save_pretrained(tmp_path / "given", state_dict=converted.state_dict())
    assert_same_weights(plain, tmp_path / "given")
    # The file of plain transformers, key for key: what other programs read.
    plain.save_pretrained(tmp_path / "plain")
    written, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("given", "plain"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    # A part of the model saves itself, too.
    converted.model.save_pretrained(tmp_path / "part")
    part, report = type(plain.model).from_pretrained(tmp_path / "part", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(part.state_dict()[name], value) for name, value in plain.model.state_dict().items())
    with pytest.raises(ValueError, match="expected model.state_dict"):
        converted.save_pretrained(tmp_path / "wrong", state_dict=plain.state_dict())
    with pytest.raises(ValueError, match="push_to_hub"):
        converted.save_pretrained(tmp_path / "wrong", push_to_hub=True)
    # Over what was there: several files, and one again.
    for size in (3000, "1GB"):
        converted.save_pretrained(tmp_path / "given", max_shard_size=size)
        assert (tmp_path / "given/model.safetensors").exists() == (size == "1GB")
        assert bool(list((tmp_path / "given").glob("model-*"))) == (size == 3000)
        assert_same_weights(plain, tmp_path / "given")


def test_trained_and_loaded_again(seed, tmp_path):
    plain = make_model("olmoe", seed)
    batch = make_batch(plain, seed)
    converted = anabranch.convert(plain)
    optimizer = torch.optim.AdamW(converted.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(step(converted, batch)[0].loss.item())
        optimizer.step()
    assert losses[-1] < losses[0]
    converted.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(anabranch.convert(loaded)(batch).logits, converted(batch).logits, batch, "logits")


def on_ranks(rank, size, experts, seed, folder, device):
    transformers.logging.set_verbosity_error()
    own = slice(0, 3) if rank == 0 else slice(3, experts)
    for family in FAMILIES:
        plain = make_model(family, seed, experts)
        batch = make_batch(plain, seed).to(device)
        plain.to(device)
        mine = slice(3, 4) if rank == 0 else slice(0, 3)
        expected, expected_gradients = step(plain, batch)

        converted = anabranch.convert(copy.deepcopy(plain))
        actual = converted(batch[mine])
        assert_close(actual.logits, expected.logits[mine], batch, "logits")
        # finish_gradients leaves the gradient of the ranks' mean loss.
        loss = torch.nn.functional.cross_entropy(
            actual.logits[:, :-1].flatten(0, 1), batch[mine, 1:].flatten(), reduction="sum"
        )
        (loss * size / batch[:, 1:].numel()).backward()
        anabranch.finish_gradients(converted)
        for name, gradient in family_gradients(converted).items():
            whole = expected_gradients[name]
            assert_close(gradient, whole[own] if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else whole, batch, name)

        answer = dict(max_new_tokens=2 + 3 * rank, do_sample=False)  # one rank has done before the other
        found = converted.eval().generate(batch[mine], synced_gpus=True, **answer)
        assert torch.equal(found, plain.eval().generate(batch[mine], **answer))

        converted.save_pretrained(f"{folder}/{family}")
        assert_same_weights(plain, f"{folder}/{family}")  # on every rank: none returns before it is written
    try:
        converted.save_pretrained(f"{folder}/{family}/config.json/below a file")
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


def test_ranks_keep_their_experts(device, seed, tmp_path):
    errors = run_ranks(2, on_ranks, 5, seed, str(tmp_path), device.type, backend=backend_for(device, 2))
    assert "config.json" in errors[0] and "rank 0 could not save" in errors[1]


def test_frozen_parameters_stay_frozen(seed):
    plain = make_model("mixtral", seed)
    frozen = [name for name, _ in plain.named_parameters() if "gate_up_proj" in name or "gate.weight" in name]
    for name in frozen:
        plain.get_parameter(name).requires_grad_(False)
    plain.eval()
    converted = anabranch.convert(plain)
    assert {plain_name(name) for name, p in converted.named_parameters() if not p.requires_grad} == set(frozen)
    assert not any(module.training for module in converted.modules())


def test_mixtral_jitter_is_of_training(seed):
    plain = make_model("mixtral", seed, router_jitter_noise=0.3)
    batch = make_batch(plain.eval(), seed)
    converted = anabranch.convert(copy.deepcopy(plain))
    clean, noisy = {}, {}
    for name, model in (("plain", plain), ("converted", converted)):
        with torch.no_grad():
            clean[name] = model.eval()(batch).logits
            torch.manual_seed(seed)
            noisy[name] = model.train()(batch).logits
    assert_close(clean["converted"], clean["plain"], batch, "logits")
    # The same noise. Rows for which it brings two experts within rounding of each other may differ.
    error = (noisy["converted"] - noisy["plain"]).abs().amax(-1)
    assert (error <= tolerance(noisy["plain"], batch)).double().mean() > 0.7
    assert (noisy["converted"] - clean["converted"]).abs().max() > 1e-3


def test_generation_copies_and_checkpointing(seed):
    plain = make_model("olmoe", seed).eval()
    batch = make_batch(plain, seed)
    converted = copy.deepcopy(anabranch.convert(copy.deepcopy(plain)))
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(converted.generate(batch, **options), plain.generate(batch, **options))
    converted.train().activation_checkpointing_enable()
    _, gradients = step(converted, batch)
    _, expected = step(plain.train(), batch)
    for name, gradient in gradients.items():
        assert_close(gradient, expected[name], batch, name)


def test_hooks_stay(seed):
    """Of the user's: on the block, its router and its experts; and their handles still remove them."""
    model = make_model("olmoe", seed)
    batch = make_batch(model, seed)
    block = model.model.layers[0].mlp
    seen, handles = [], []
    for part in (block, block.gate, block.experts):
        handles.append(part.register_forward_hook(lambda module, inputs, output: seen.append("forward")))
        handles.append(part.register_forward_pre_hook(lambda module, inputs: seen.append("before")))
        handles.append(part.register_full_backward_hook(lambda module, dinput, doutput: seen.append("backward")))
    block.register_forward_hook(lambda module, inputs, output: 2 * output)
    expected, _ = step(model, batch)
    assert len(seen) == 9
    model.zero_grad()
    converted = anabranch.convert(model)
    actual, _ = step(converted, batch)
    assert_close(actual.logits, expected.logits, batch, "logits")
    assert len(seen) == 18
    for handle in handles:
        handle.remove()
    step(converted, batch)
    assert len(seen) == 18


def test_copied_and_pickled(seed):
    plain = make_model("olmoe", seed)
    batch = make_batch(plain, seed)
    converted = anabranch.convert(make_model("olmoe", seed))  # no forward yet, in which transformers adds hooks that no pickle takes
    assert type(converted) is type(plain)
    twins = [copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))]
    expected = converted(batch).logits
    for twin in twins:
        assert type(twin) is type(plain) and torch.equal(twin(batch).logits, expected)
        for parameter in twin.parameters():
            torch.nn.init.zeros_(parameter)
        assert torch.equal(converted(batch).logits, expected)


def test_a_copy_saves_itself(seed, tmp_path):
    plain = make_model("olmoe", seed)
    converted = anabranch.convert(copy.deepcopy(plain))
    for how, twin in (("copied", copy.deepcopy(converted)), ("pickled", pickle.loads(pickle.dumps(converted)))):
        changed = copy.deepcopy(plain)
        with torch.no_grad():
            for model in (twin, changed):
                model.lm_head.weight.add_(1)
        twin.save_pretrained(tmp_path / how)
        assert_same_weights(changed, tmp_path / how)
    converted.save_pretrained(tmp_path / "first")
    assert_same_weights(plain, tmp_path / "first")


def test_a_converted_model_is_freed_when_it_is_dropped(seed):
    converted = anabranch.convert(make_model("olmoe", seed))
    weight = weakref.ref(converted.model.layers[0].mlp.experts.moe.experts.up_weight)
    gc.collect()
    gc.disable()
    try:
        del converted
        assert weight() is None
    finally:
        gc.enable()


def pickled(rank, size, seed):
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(anabranch.convert(make_model("olmoe", seed)))


def test_a_model_over_ranks_is_not_pickled(seed):
    run_ranks(2, pickled, seed)


def test_other_models_are_refused(seed):
    with pytest.raises(TypeError, match="Linear"):
        anabranch.convert(torch.nn.Linear(2, 2))
    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    with pytest.raises(ValueError, match="'llama', has no stacked experts"):
        anabranch.convert(llama)
    converted = anabranch.convert(make_model("olmoe", seed))
    with pytest.raises(ValueError, match="has been converted"):
        anabranch.convert(converted)
    with pytest.raises(ValueError, match="MixtralExperts, have the activation .*Mish"):
        anabranch.convert(make_model("mixtral", seed, hidden_act="mish"))
    quantized = make_model("olmoe", seed)
    experts = quantized.model.layers[1].mlp.experts
    weight = experts.down_proj.detach()
    del experts.down_proj
    experts.down_proj = weight
    with pytest.raises(ValueError, match="model.layers.1.mlp.experts.down_proj is a Tensor"):
        anabranch.convert(quantized)
    assert not layers_of(quantized)
    hooked = make_model("olmoe", seed)
    hooked.model.layers[1].mlp.experts.gate_up_proj.register_hook(lambda gradient: 2 * gradient)
    with pytest.raises(ValueError, match="model.layers.1.mlp.experts.gate_up_proj has hooks"):
        anabranch.convert(hooked)
    older = make_model("olmoe", seed)
    older.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="model.layers.0.mlp.experts is a list.*transformers 5"):
        anabranch.convert(older)
