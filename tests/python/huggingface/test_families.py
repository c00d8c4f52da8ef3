"""Experts of every family in the installed transformers: converted and equal, or refused with the reason."""

import copy
import importlib
import inspect
import pathlib
import re

import anabranch
import pytest
import torch
import transformers
from models import MORE, assert_close, make_more, make_settled_batch
from test_convert import assert_same_weights, family_gradients, layers_of

HIDDEN, INNER, EXPERTS, TOP_K = 16, 12, 6, 3
SIZES = {
    **dict.fromkeys(["hidden_size", "moe_hidden_size", "d_model"], HIDDEN),
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"], INNER),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["dense_act_fn", "activation_function"], "relu"),
    **dict.fromkeys(["dropout_rate", "activation_dropout"], 0.0),
    **dict.fromkeys(["moe_latent_size", "mlp_gate_softcap", "mlp_up_softcap"]),
    **dict.fromkeys(["num_key_value_heads", "num_experts_per_tok", "zero_expert_num", "mlp_ratio"], 1),
    **dict(d_ff=INNER, kv_channels=4, part_features=4, ffn_act_fn={"name": "silu"}),
}

GATING, INTERFACE = "gating of their own", "do not follow transformers' interface"
NONE = "has no stacked experts"
REFUSED = {
    **dict.fromkeys(["inkling2", "inkling2_loop"], GATING),
    **dict.fromkeys(["llama4", "longcat_flash", "step3p7"], INTERFACE),
    "muse_spark": "norm behind each expert",
    **dict.fromkeys(["dbrx", "jetmoe"], NONE),
    **dict.fromkeys(["nllb_moe", "switch_transformers", "vitpose_backbone"], "list of modules"),
}
"""By family: what the error says. All others are converted."""


def expert_classes():
    """Family, class of its experts, and module."""
    for folder in sorted(pathlib.Path(transformers.models.__path__[0]).iterdir()):
        source = folder / f"modeling_{folder.name}.py"
        if not source.exists():
            continue
        names = sorted(set(re.findall(r"self\.experts\s*=\s*(\w+)\(", source.read_text())))
        for name in names:
            module = importlib.import_module(f"transformers.models.{folder.name}.modeling_{folder.name}")
            yield folder.name, getattr(module, name), module


def tiny_config(cls, module):
    """What the experts look at: small sizes, and the family's own activation."""
    used = set(re.findall(r"config\.(\w+)", inspect.getsource(inspect.unwrap(cls.__init__)))) - SIZES.keys()
    kinds = [kind for name, kind in vars(module).items() if name.endswith("Config") and inspect.isclass(kind)]
    for kind in kinds:
        config = kind()
        if all(hasattr(config, name) for name in used):
            return transformers.PreTrainedConfig(**{**SIZES, **{name: getattr(config, name) for name in used}})
    raise AssertionError(f"none of {kinds} has {used}")


class Alone(transformers.PreTrainedModel):
    """A model that is nothing but its experts."""

    config_class = transformers.PreTrainedConfig

    def __init__(self, config, cls):
        super().__init__(config)
        more = {"intermediate_size": INNER, "swiglu_limit": 7.0, "ffn_dim": INNER}
        asked = inspect.signature(inspect.unwrap(cls.__init__)).parameters
        self.experts = cls(config, **{name: value for name, value in more.items() if name in asked})

    def forward(self, x, ids, weights):
        return self.experts(x, ids, weights)


def run(model, x, ids, weights, dy):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = model(x, ids, weights)
    (out * dy).sum().backward()
    return out.detach(), x.grad, weights.grad


CLASSES = list(expert_classes())


@pytest.mark.parametrize("family, cls, module", CLASSES, ids=[cls.__name__ for _, cls, _ in CLASSES])
def test_every_family(family, cls, module):
    model = Alone(tiny_config(cls, module), cls)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if family in REFUSED:
        before = str(model)
        with pytest.raises(ValueError, match=REFUSED[family]):
            anabranch.convert(model)
        assert str(model) == before
        return

    x, dy = torch.randn(2, 17, HIDDEN).unbind()
    ids = torch.rand(17, EXPERTS).argsort(-1)[:, :TOP_K]
    weights = torch.rand(17, TOP_K)
    expected = run(model, x, ids, weights, dy)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = run(anabranch.convert(model), x, ids, weights, dy)
    # Sums of fewer than a hundred terms of the order of 10, rounded to 2⁻²⁴ each.
    close = dict(rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, **close)
    layout = model.experts.layout
    for theirs, ours in layout.names.items():
        gradient = layout.to_family(theirs, getattr(model.experts.moe.experts, ours).grad)
        torch.testing.assert_close(gradient, gradients[f"experts.{theirs}"], **close)


@pytest.mark.parametrize("family", MORE)
def test_whole_models(family, seed, tmp_path):
    plain = make_more(family, seed)
    batch = make_settled_batch(plain, seed)
    converted = anabranch.convert(copy.deepcopy(plain))
    assert layers_of(converted)
    results = []
    for model in (converted, plain):
        out = model(batch, labels=batch)
        out.loss.backward()
        results.append((out.logits, family_gradients(model)))
    (logits, gradients), (expected, expected_gradients) = results
    assert_close(logits, expected, batch, "logits")
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert (gradient is None) == (expected_gradients[name] is None), name
        if gradient is not None and gradient.shape != expected_gradients[name].shape:
            gradient = gradient.mT  # Aria's weights are [E, in, out]
        if gradient is not None:
            assert_close(gradient, expected_gradients[name], batch, name)
    converted.save_pretrained(tmp_path)
    assert_same_weights(plain, tmp_path)


def families_with_experts():
    """By what their configurations name: a number of experts."""
    number = re.compile(r"\b(num_experts|num_local_experts|n_routed_experts|moe_num_experts)\b")
    for folder in pathlib.Path(transformers.models.__path__[0]).iterdir():
        if any(number.search(file.read_text()) for file in folder.glob("configuration_*.py")):
            yield folder.name


def implementing(family):
    """Another family, whose classes are this one's models, or whose model is a part of this one's."""
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if family in names:
        return getattr(transformers, names[family]).__module__.split(".")[-2]
    kinds = vars(importlib.import_module(f"transformers.models.{family}.configuration_{family}")).values()
    return next(kind().text_config.model_type for kind in kinds if "text_config" in getattr(kind, "sub_configs", ()))


def test_every_configuration_with_experts_is_of_these_families():
    families = {family for family, _, _ in CLASSES}
    others = {family: implementing(family) for family in families_with_experts() if family not in families}
    assert others.pop("doge") == "doge"  # below
    assert set(others.values()) <= families - REFUSED.keys(), others
    assert REFUSED.keys() <= families and len(families - REFUSED.keys()) > 40


def test_experts_that_are_rows_of_embeddings(seed):
    sizes = dict(vocab_size=8, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_experts=16)
    model = transformers.DogeForCausalLM(transformers.DogeConfig(**sizes, num_experts_per_tok=2, is_moe=True))
    with pytest.raises(ValueError, match=NONE):
        anabranch.convert(model)
