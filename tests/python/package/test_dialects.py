"""MoE.from_config: other libraries' options give a layer that routes as they do, or are refused with the reason.

The rules are written down here from their papers and sources; where Megatron-Core is installed, its own function
is asked too.
"""

import inspect
import itertools
import pathlib
import re

import anabranch
import pytest
import torch
from anabranch.dialects.configuration import Configuration
from anabranch.dialects import DIALECTS, options_from

EXPERTS, TOKENS = 12, 40
MEGATRON = {"hidden_size": EXPERTS, "moe_ffn_hidden_size": 3, "num_moe_experts": EXPERTS, "add_bias_linear": False}


SIZES = dict(hidden_size=EXPERTS, expert_hidden_size=1, num_experts=EXPERTS, shared_expert_hidden_size=0)
PROBE = dict(**SIZES, shared_expert_gate=False, jitter=0.0, bias=True, dtype=torch.float64)


def routing_of(layer, logits, bias=None):
    """A layer's weights [T, E], 0 where it does not route: with the identity as router, and experts of which the
    e-th returns the e-th unit vector."""
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(EXPERTS))
        layer.experts.down_weight.zero_()
        layer.experts.down_bias.copy_(torch.eye(EXPERTS))
        if layer.options["expert_bias"]:
            layer.router.expert_bias.copy_(bias)
        return layer(logits).output


def settled(rule, draw):
    """Logits whose choices rounding does not change."""
    kept = []
    while len(kept) < TOKENS:
        logits = draw()
        if all(torch.equal(rule(logits + 1e-5 * torch.randn_like(logits)) > 0, rule(logits) > 0) for _ in range(4)):
            kept.append(logits)
    return torch.cat(kept)


def draw():
    return torch.randn(1, EXPERTS, dtype=torch.float64)


def dense(weights, ids):
    return torch.zeros(len(ids), EXPERTS, dtype=weights.dtype).scatter(1, ids, weights)


def best(scores, top_k, groups=None, taken=None, summed=None):
    """The top_k best ids, of the `taken` groups whose `summed` best experts have the largest sum."""
    if groups:
        of_group = scores.view(-1, groups, EXPERTS // groups)
        chosen = of_group.topk(summed, dim=-1).values.sum(-1).topk(taken, dim=-1).indices
        kept = torch.zeros(len(scores), groups, dtype=torch.bool).scatter(1, chosen, True)
        scores = of_group.masked_fill(~kept.unsqueeze(-1), -torch.inf).view(len(scores), EXPERTS)
    return scores.topk(top_k, dim=-1).indices


def megatron(logits, config, bias):
    top_k, score = config["moe_router_topk"], config.get("moe_router_score_function", "softmax")
    groups, taken = config.get("moe_router_num_groups"), config.get("moe_router_group_topk")
    grouped = (groups, taken, top_k // taken) if taken else ()
    if score != "softmax":
        scores = logits.sigmoid() if score == "sigmoid" else torch.log(1 + logits.exp()).sqrt()
        ids = best(scores + bias, top_k, *grouped)
        weights = scores.gather(1, ids)
        weights = weights / weights.sum(-1, keepdim=True) if top_k > 1 else weights
    elif config.get("moe_router_pre_softmax"):
        scores = logits.softmax(-1)
        ids = best(scores, top_k, *grouped)
        weights = scores.gather(1, ids)
    else:
        ids = best(logits, top_k, *grouped)
        weights = logits.gather(1, ids).softmax(-1)
    return dense(weights * config.get("moe_router_topk_scaling_factor", 1.0), ids)


def megatrons_own(logits, config, bias):
    utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    score = config.get("moe_router_score_function", "softmax")
    probabilities, _ = utils.topk_routing_with_score_function(
        logits.float(),
        config["moe_router_topk"],
        use_pre_softmax=config.get("moe_router_pre_softmax", False),
        num_groups=config.get("moe_router_num_groups"),
        group_topk=config.get("moe_router_group_topk"),
        scaling_factor=config.get("moe_router_topk_scaling_factor"),
        score_function=score,
        expert_bias=bias.float() if score != "softmax" else None,
    )
    return probabilities.double()


def knows_sqrtsoftplus():
    """Whether the Megatron-Core that is installed does: 0.16 does not."""
    utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    return "sqrtsoftplus" in inspect.getsource(utils.topk_routing_with_score_function)


def megatron_configs():
    """All combinations of what decides about the routing."""
    scores = [{}, {"moe_router_pre_softmax": True}, {"moe_router_score_function": "sigmoid"}]
    scores.append({"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True})
    scores.append({"moe_router_score_function": "sqrtsoftplus", "moe_router_enable_expert_bias": True})
    groups = [{}] + [
        {"moe_router_num_groups": groups, "moe_router_group_topk": taken} for groups, taken in ((2, 1), (3, 2), (4, 2), (6, 3))
    ]
    scales = [{}, {"moe_router_topk_scaling_factor": 2.5}]
    for top_k, score, group, scale in itertools.product((1, 2, 3, 4, 6), scores, groups, scales):
        taken = group.get("moe_router_group_topk", 1)
        if group and (top_k < taken or top_k // taken > EXPERTS // group["moe_router_num_groups"]):
            continue  # refused there too
        yield {**MEGATRON, "moe_router_topk": top_k, **score, **group, **scale}


def computed_here(config):
    """Whether docs/python.md says so."""
    softmax = config.get("moe_router_score_function", "softmax") == "softmax"
    return config["moe_router_topk"] > 1 or not softmax or config.get("moe_router_pre_softmax", False)


def assert_routes_as(rule, config):
    bias = 0.3 * torch.randn(EXPERTS, dtype=torch.float64) if config.get("moe_router_enable_expert_bias") else torch.zeros(EXPERTS)
    logits = settled(lambda logits: megatron(logits, config, bias), draw)
    expected = rule(logits, config, bias)
    found = routing_of(anabranch.MoE.from_config(config, "megatron", **PROBE), logits, bias)
    assert torch.equal(found > 0, expected > 0), config
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=str(config))


@pytest.mark.parametrize("rule", [megatron, megatrons_own])
def test_megatron_routes_the_same_or_is_refused(rule):
    refused = 0
    for config in megatron_configs():
        if rule is megatrons_own and config.get("moe_router_score_function") == "sqrtsoftplus" and not knows_sqrtsoftplus():
            continue
        if computed_here(config):
            assert_routes_as(rule, config)
        else:
            refused += 1
            with pytest.raises(ValueError, match="moe_router_pre_softmax"):
                options_from(config, "megatron")
    assert refused == 4


@pytest.mark.parametrize("top_k, normalise", [(1, None), (3, None), (3, 1)])
def test_megablocks_routes_the_same(top_k, normalise):
    config = {"hidden_size": 8, "moe_num_experts": 4, "moe_top_k": top_k, "moe_normalize_expert_weights": normalise, "bias": False}

    def theirs(logits):
        weights, ids = logits.softmax(-1).topk(top_k, dim=-1)
        return dense(weights / torch.norm(weights, p=normalise, dim=-1, keepdim=True) if normalise else weights, ids)

    logits = settled(theirs, draw)
    torch.testing.assert_close(routing_of(anabranch.MoE.from_config(config, "megablocks", **PROBE), logits), theirs(logits))


def torchtitan(logits, config, bias):
    scores = logits.sigmoid() if config["score_func"] == "sigmoid" else logits.softmax(-1)
    grouped = (config["num_expert_groups"], config["num_limited_groups"], 2) if "num_expert_groups" in config else ()
    ids = best(scores + bias, config["top_k"], *grouped)
    weights = scores.gather(1, ids)
    if config["route_norm"]:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return dense(weights * config["route_scale"], ids)


def test_torchtitan_routes_the_same():
    groups = [{}, {"num_expert_groups": 3, "num_limited_groups": 2}]
    for score, norm, balance, group in itertools.product(("softmax", "sigmoid"), (True, False), (None, 1e-3), groups):
        config = {"dim": 8, "hidden_dim": 5, "num_experts": 4, "top_k": 3, "score_func": score, "route_norm": norm}
        config |= {"route_scale": 2.5, "load_balance_coeff": balance, "score_before_experts": False, **group}
        bias = torch.zeros(EXPERTS) if balance is None else 0.3 * torch.randn(EXPERTS, dtype=torch.float64)
        logits = settled(lambda logits, config=config, bias=bias: torchtitan(logits, config, bias), draw)
        found = routing_of(anabranch.MoE.from_config(config, "torchtitan", **PROBE), logits, bias)
        torch.testing.assert_close(found, torchtitan(logits, config, bias), msg=str(config))


CONFIGS = {
    "megatron": (
        {**MEGATRON, "swiglu": True, "moe_shared_expert_intermediate_size": 7, "moe_input_jitter_eps": 0.1, "num_layers": 3,
         "moe_router_load_balancing_type": "aux_loss", "moe_grouped_gemm": True, "moe_aux_loss_coeff": 0.01},
        dict(hidden_size=EXPERTS, expert_hidden_size=3, num_experts=EXPERTS, top_k=2, glu=True, activation="silu", jitter=0.1,
             renormalize=True, shared_expert_hidden_size=7, bias=False),
    ),
    "megatron by its command line": (
        {"--num-experts": 8, "--hidden-size": 4, "--moe-ffn-hidden-size": 3, "--moe-router-topk": 2, "--disable-bias-linear": True,
         "--moe-router-score-function": "sigmoid", "--moe-router-topk-scaling-factor": 2.5, "--moe-router-enable-expert-bias": True},
        dict(num_experts=8, top_k=2, router_score="sigmoid", renormalize=True, routing_scale=2.5, expert_bias=True, bias=False),
    ),
    "megatron with what newer models have": (
        {"num_moe_experts": 8, "hidden_size": 4, "moe_ffn_hidden_size": 3, "add_bias_linear": False, "gated_linear_unit": True,
         "activation_func": lambda x: x * torch.sigmoid(1.702 * x), "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0,
         "moe_latent_size": 2, "moe_router_dtype": "fp64", "moe_router_force_load_balancing": True, "moe_z_loss_coeff": 1e-3,
         "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [1e-4, 1e-2]},
        dict(activation="quick_gelu", activation_limit=7.0, glu_offset=1.0, latent_size=2, router_fp64=True, forced_routing="random",
             z_coefficient=1e-3, sequence_balance_coefficient=1e-4, global_balance_coefficient=1e-2),
    ),
    "megablocks": (
        {"hidden_size": 8, "ffn_hidden_size": 5, "moe_num_experts": 4, "moe_top_k": 2, "mlp_type": "glu", "bias": False,
         "activation_fn": torch.nn.functional.silu, "shared_expert": True, "moe_capacity_factor": 0, "mlp_impl": "grouped"},
        dict(hidden_size=8, expert_hidden_size=5, num_experts=4, top_k=2, glu=True, activation="silu", renormalize=False,
             shared_expert_hidden_size=5),
    ),
    "torchtitan": (
        {"dim": 8, "num_experts": 4, "top_k": 2, "score_before_experts": False, "load_balance_coeff": None,
         "router": {"num_experts": 4, "top_k": 2, "score_func": "softmax", "route_norm": True, "gate": {"bias": False}},
         "routed_experts": {"inner_experts": {"dim": 8, "hidden_dim": 5, "num_experts": 4}},
         "shared_experts": {"w1": {"out_features": 10}, "gate": {"bias": False}}},
        dict(hidden_size=8, expert_hidden_size=5, num_experts=4, top_k=2, router_score="softmax", renormalize=True,
             expert_bias=False, shared_expert_hidden_size=10, shared_expert_gate=True, glu=True, activation="silu"),
    ),
    "torchtitan's MoEArgs": (
        {"dim": 8, "hidden_dim": 5, "top_k": 2, "score_before_experts": False},
        dict(num_experts=8, router_score="sigmoid", renormalize=False, expert_bias=True, shared_expert_hidden_size=5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_options(name):
    config, expected = CONFIGS[name]
    layer = anabranch.MoE.from_config(config, re.split("[ ']", name)[0], dtype=torch.bfloat16, engine="auto")
    assert {option: layer.options[option] for option in expected} == expected
    assert layer.experts.up_weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "dialect, config, shown",
    [
        ("megatron", {"moe_expert_capacity_factor": 1.0}, "moe_expert_capacity_factor = 1.0: nothing is dropped"),
        ("megatron", {"moe_router_score_function": "tanh"}, "tanh"),
        ("megatron", {"moe_aux_loss_coeff": [0.1, 0.2]}, "each with a coefficient"),
        ("megatron", {"moe_router_dtype": "bf16"}, "moe_router_dtype"),
        ("megatron", {"moe_router_load_balancing_type": ["sinkhorn"]}, "sinkhorn"),
        ("megatron", {"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input"),
        ("megatron", {"moe_latent_size": 4, "add_bias_linear": True}, "moe_latent_size"),
        ("megatron", {"moe_of_tomorrow": 4}, "moe_of_tomorrow = 4: this option is not known"),
        ("megatron", {"activation_func": torch.nn.functional.mish}, "activation_func"),
        ("megatron", {"num_moe_experts": None}, "there is no num_moe_experts"),
        ("megablocks", {}, "bias = True"),
        ("megablocks", {"bias": False, "moe_normalize_expert_weights": 2}, "moe_normalize_expert_weights = 2"),
        ("megablocks", {"bias": False, "uniform_expert_assignment": True}, "uniform_expert_assignment"),
        ("torchtitan", {}, "score_before_experts = True"),
        ("torchtitan", {"score_before_experts": False, "gate_bias": True}, "gate_bias"),
        ("hf", {"model_type": "gpt_oss"}, "model_type = 'gpt_oss'.*mixtral.*convert"),
        ("tutel", {}, "dialect = 'tutel', expected one of megatron, megablocks, torchtitan, hf"),
    ],
)
def test_what_no_layer_computes_is_refused(dialect, config, shown):
    complete = {"megatron": MEGATRON, "torchtitan": {"dim": 8, "hidden_dim": 5}}.get(dialect, {})
    with pytest.raises(ValueError, match=shown):
        anabranch.MoE.from_config({**complete, **config}, dialect)


def test_what_is_no_configuration():
    with pytest.raises(TypeError, match="int, expected a mapping"):
        anabranch.MoE.from_config(3, "megatron")


@pytest.mark.parametrize("dialect, title", [("megatron", "Megatron-Core"), ("megablocks", "MegaBlocks"), ("torchtitan", "torchtitan")])
def test_the_tables_of_the_documentation_are_those_of_the_code(dialect, title):
    text = (pathlib.Path(__file__).parents[3] / "docs" / "python.md").read_text()
    table = re.search(rf"^\| {title}.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    keys = {
        re.split("[ =]", key.lstrip("-"))[0].replace("-", "_")
        for row in table[1].splitlines()
        for key in re.findall(r"`([a-z_-][^`]*)`", row.split("|")[1])
    }
    complete = {**next(config for name, (config, _) in CONFIGS.items() if name == dialect)}
    config = Configuration(dialect, complete)
    DIALECTS[dialect](config)
    assert keys <= config.known | set(config.values), keys - config.known
