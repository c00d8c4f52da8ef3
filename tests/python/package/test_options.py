"""The options' one list, of the C++ library, is what Python offers."""

import inspect
import json

import anabranch
import torch

NOT_OPTIONS = {"self", "group", "router", "dtensor", "experts"}  # what is not the core's
OWN_DEFAULTS = {"seed", "dtype", "device"}  # torch's generator, type and device


def test_signature_has_every_option_with_its_default():
    options = json.loads(torch.ops.anabranch.default_options())
    signature = inspect.signature(anabranch.MoE.__init__).parameters
    assert set(signature) - NOT_OPTIONS == set(options)
    for name in set(options) - OWN_DEFAULTS:
        default = signature[name].default
        if default is inspect.Parameter.empty:
            assert options[name] == 0, f"{name} must be given, and 0 is refused"
        else:
            assert (default, type(default)) == (options[name], type(options[name])), name


def test_every_option_reaches_the_core():
    layer = anabranch.MoE(8, 12, 4, 2)
    assert set(layer.options) == set(json.loads(torch.ops.anabranch.default_options())) - OWN_DEFAULTS


def test_a_plan_has_the_names_of_the_core():
    assert list(anabranch.functional.PlanTensors._fields) == torch.ops.anabranch.plan_fields()
