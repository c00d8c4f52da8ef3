"""What a user gets wrong raises ValueError, TypeError or RuntimeError that shows it."""

import anabranch
import pytest
import torch


def make(**options):
    return anabranch.MoE(**{"hidden_size": 8, "expert_hidden_size": 12, "num_experts": 4, "top_k": 2, **options})


@pytest.mark.parametrize(
    "options, error, shown",
    [
        ({"hidden_size": 0}, ValueError, "hidden_size = 0"),
        ({"hidden_size": "8"}, ValueError, 'hidden_size = "8"'),
        ({"expert_hidden_size": -3}, ValueError, "expert_hidden_size = -3"),
        ({"num_experts": 0}, ValueError, "num_experts = 0"),
        ({"top_k": 5}, ValueError, "top_k = 5"),
        ({"top_k": 0}, ValueError, "top_k = 0"),
        ({"top_k": None}, ValueError, "top_k = null"),
        ({"activation": "swish"}, ValueError, "swish"),
        ({"activation": 3}, TypeError, "activation"),
        ({"jitter": 1.5}, ValueError, "jitter = 1.5"),
        ({"shared_expert_hidden_size": -1}, ValueError, "shared_expert_hidden_size = -1"),
        ({"engine": "warp"}, ValueError, "warp"),
        ({"dtype": torch.int32}, ValueError, "Int"),
        ({"hidden_size": 2**40, "expert_hidden_size": 2**40}, ValueError, "overflow"),
        ({"group": "world"}, TypeError, "str"),
        ({"group": 3}, TypeError, "int"),
        ({"seed": -1.5}, ValueError, "seed = -1.5"),
    ],
    ids=str,
)
def test_options(options, error, shown):
    with pytest.raises(error) as raised:
        make(**options)
    assert shown in str(raised.value)


def test_unknown_option():
    with pytest.raises(TypeError, match="num_expert"):
        make(num_expert=4)


@pytest.mark.parametrize(
    "x, error, shown",
    [
        (lambda: torch.randn(3, 9), ValueError, "[3, 9]"),
        (lambda: torch.randn(3, 8, dtype=torch.float64), ValueError, "Double"),
        (lambda: torch.zeros(3, 8, dtype=torch.int64), ValueError, "Long"),
        (lambda: torch.randn(()), ValueError, "[]"),
        (lambda: torch.randn(3, 8, device="meta"), ValueError, "meta"),
        (lambda: [[0.0] * 8], TypeError, "list"),
        (lambda: None, TypeError, "NoneType"),
        (lambda: torch.full((3, 8), float("nan")), ValueError, "NaN"),
    ],
    ids=str,
)
def test_input(x, error, shown):
    layer = make(dtype=torch.float32)
    with pytest.raises(error) as raised:
        layer(x())
    assert shown in str(raised.value)
    layer(torch.randn(3, 8))  # and goes on


@pytest.mark.parametrize(
    "ids, weights, error, shown",
    [
        ([[0, 4]], [[1.0, 1.0]], ValueError, "[0, 4]"),
        ([[0, -1]], [[1.0, 1.0]], ValueError, "[0, -1]"),
        ([[2, 2]], [[1.0, 1.0]], ValueError, "[2, 2]"),
        ([[0]], [[1.0]], ValueError, "[1, 1]"),
        ([[0, 1], [0, 1]], [[1.0, 1.0]] * 2, ValueError, "[2, 2]"),
        ([[0, 1]], [[1.0]], ValueError, "[1, 1]"),
        ([[0, 1]], [[1.0, float("nan")]], ValueError, "NaN"),
        ([[0.5, 1]], [[1.0, 1.0]], ValueError, "Float"),
    ],
    ids=str,
)
def test_routing(ids, weights, error, shown):
    layer = make(dtype=torch.float32)
    with pytest.raises(error) as raised:
        layer(torch.randn(1, 8), routing=(torch.tensor(ids), torch.tensor(weights)))
    assert shown in str(raised.value)


@pytest.mark.parametrize("routing", [torch.zeros(1, 2), (torch.zeros(1, 2),), "all", (None, None), ([[0, 1]], [[1.0, 1.0]])])
def test_routing_of_another_kind(routing):
    with pytest.raises(TypeError, match="routing"):
        make()(torch.randn(1, 8), routing=routing)


@pytest.mark.parametrize("options", [{"gate": "noisy_top_k"}, {"expert_bias": True}, {"jitter": 0.1}], ids=str)
def test_options_of_a_router_that_there_is_not(options):
    with pytest.raises(ValueError, match="router=False"):
        make(router=False, **options)


def test_routing_that_is_not_given():
    layer = make(router=False)
    with pytest.raises(ValueError, match="the layer has no router"):
        layer(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"expert ids are \(3,\)"):
        layer(torch.randn(3, 8), routing=(torch.zeros(3, dtype=torch.int64), torch.ones(3, 1)))


def test_group_of_another_kind_of_mesh():
    with pytest.raises(TypeError, match="Generator"):
        make(group=torch.Generator())
