"""train_lm on models of Hugging Face's transformers: the same loss, and what it writes loads there again.

The program and what it needs: see test_train_lm.py.
"""

import json
import os
import subprocess

import numpy
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_train_lm import (
    SEQUENCE_LENGTH,
    model_options,
    read_metrics,
    run,
    text,  # noqa: F401 a fixture
)

BATCH = 6
HELD_OUT = 7
WINDOWS = os.environ.get("ANABRANCH_TOKEN_WINDOWS", "build/release/tests/token_windows")
COMMON = dict(vocab_size=260, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
DENSE = dict(moe_intermediate_size=12, intermediate_size=20, head_dim=8)
CONFIGS = {
    "mixtral": dict(num_local_experts=5, num_experts_per_tok=2, intermediate_size=12, sliding_window=None, tie_word_embeddings=True),
    "olmoe": dict(num_experts=5, num_experts_per_tok=3, intermediate_size=12, norm_topk_prob=False),
    "qwen3_moe": dict(DENSE, num_experts=5, num_experts_per_tok=2, norm_topk_prob=True, mlp_only_layers=[0], attention_bias=True),
    "glm4_moe": dict(
        DENSE, n_routed_experts=5, num_experts_per_tok=2, n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=1.5,
        use_qk_norm=True, attention_bias=False, n_group=1, topk_group=1, partial_rotary_factor=1.0,
    ),
    "deepseek_v3": dict(
        moe_intermediate_size=12, intermediate_size=20, num_key_value_heads=4, n_routed_experts=6, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, n_group=3, topk_group=2, q_lora_rank=10, kv_lora_rank=14,
        qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
    ),
}
STRETCHED = dict(rope_type="yarn", rope_theta=100.0, factor=8.0, original_max_position_embeddings=32, beta_fast=2.0, beta_slow=0.5)
CONFIGS["deepseek_v3, stretched"] = CONFIGS["deepseek_v3"] | dict(
    qk_rope_head_dim=8, rope_parameters=STRETCHED | dict(mscale=1.0, mscale_all_dim=0.7))  # fmt: skip
CONFIGS["qwen3_moe, stretched"] = CONFIGS["qwen3_moe"] | dict(head_dim=16, rope_parameters=STRETCHED | dict(truncate=False))
# Moonlight's, with all of a query of the token itself.
CONFIGS["deepseek_v3, whole queries"] = CONFIGS["deepseek_v3"] | dict(q_lora_rank=None, n_group=1, topk_group=1, v_head_dim=6)  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory):
    """A folder of transformers' with a small random model of fp64, and the model."""
    seed = int(torch.randint(2**31, ()))
    print(f"seed {seed}")
    torch.manual_seed(seed)
    name = request.param.partition(",")[0]
    config = transformers.AutoConfig.for_model(name, **COMMON | CONFIGS[request.param], initializer_range=0.3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    model.set_experts_implementation("eager")  # the grouped one takes no fp64
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)  # at first all ones, whose order nobody sees
            if name.endswith(("e_score_correction_bias", "_proj.bias")):
                tensor.normal_(std=0.2)
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder, max_shard_size=20_000)  # in several files
    return folder, model


def windows(data, part, size):
    """[size, S + 1] token ids that train_lm reads."""
    words = [WINDOWS, data, SEQUENCE_LENGTH, 1, part, 0, size, size]
    read = subprocess.run(list(map(str, words)), stdout=subprocess.PIPE, check=True).stdout
    return torch.from_numpy(numpy.frombuffer(read, numpy.int64).copy()).view(size, SEQUENCE_LENGTH + 1)


@torch.no_grad()
def loss_of(model, batch):
    """Mean of −ln p of each next token, in transformers' model."""
    logits = model(batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten()).item()


def tensors_in(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def options(directory, folder, **changes):
    """Without those that the folder says."""
    given = model_options(**{"output": directory, "load_hf": folder, "steps": 1, "sample_length": 0, "log_interval": 1} | changes)
    said = {"--hidden", "--expert-hidden", "--layers", "--heads", "--experts"}
    return [word for name, value in zip(given[::2], given[1::2]) if name not in said for word in (name, value)]


def test_the_loss_is_transformers_and_what_is_written_loads_there(family, text, tmp_path):  # noqa: F811
    folder, model = family
    written = tmp_path / "written"
    more = dict(save_hf=written, validation_interval=1, move_experts=1)  # wherever they lie in the end
    run(2, *options(tmp_path / "run", folder, data=text, **more), "--no-save")
    (line,) = read_metrics(tmp_path / "run")
    # transformers has its norms, positions and router in fp32, also of a model of fp64.
    assert line["loss"] == pytest.approx(loss_of(model, windows(text, "training", BATCH)), rel=2**-20)
    assert tensors_in(written).keys() == tensors_in(folder).keys()
    again = transformers.AutoModelForCausalLM.from_pretrained(written, dtype=torch.float64)
    again.set_experts_implementation("eager")
    assert type(again) is type(model)
    held_out = windows(text, "validation", HELD_OUT)
    assert line["validation_loss"] == pytest.approx(loss_of(again, held_out), rel=2**-20)
    assert line["validation_loss"] != pytest.approx(loss_of(model, held_out), rel=2**-10)


def test_it_writes_what_transformers_does(family):
    folder, model = family
    expected = model.generate(torch.tensor([[3, 1, 4]]), do_sample=False, max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    words = ["--load-hf", folder, "--generate", "--prompt", "3 1 4", "--sample-length", 20, "--temperature", 0]
    written = run(0, *words).splitlines()[-1]  # what MPI may have to say comes first
    assert written.split() == list(map(str, expected[0].tolist()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type llama is none of"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "has no model.layers.2."),
        ({"num_hidden_layers": 1}, "the model has not"),
        ({"hidden_size": 24}, "has shape"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "stretched by YaRN alone"),
    ],
)
def test_folders_of_other_models_are_refused(tmp_path, text, change, message):  # noqa: F811
    config = transformers.AutoConfig.for_model("olmoe", **COMMON | CONFIGS["olmoe"])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "folder")
    changed = config.to_dict() | change
    (tmp_path / "folder/config.json").write_text(json.dumps(changed))
    output = run(0, *options(tmp_path / "run", tmp_path / "folder", data=text), expect=2)
    assert message in output
