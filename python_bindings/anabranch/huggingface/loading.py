"""Models of transformers of which each rank reads its own experts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DeviceMesh

from ..groups import Group, as_group
from ..layer.spread import mesh_of, spread
from . import convert, stacked_experts
from .stacked_experts import recognised

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_pretrained(
    folder: str | os.PathLike[str], group: object = None, *, model_class: Any = None, dtensor: bool = False, **options: Any
) -> PreTrainedModel:
    """A converted model whose experts this rank has read alone: `convert(AutoModelForCausalLM.from_pretrained(folder))`,
    in the memory and reading time of one rank's share.

    Args:
        folder: what transformers' from_pretrained takes, with weights in safetensors; on every rank the same.
        group: the expert-parallel group, a DeviceMesh or a process group; see `as_group`. Collective over it.
        model_class: of transformers, also one of its Auto classes; None: AutoModelForCausalLM.
        dtensor: see `convert`.
        options: of transformers' from_pretrained: dtype, config, attn_implementation, revision, …; device_map: one device.

    ValueError with the reason for a model that `convert` does not take, or a checkpoint that lacks experts.
    """
    import transformers

    chosen = model_class or transformers.AutoModelForCausalLM
    ranks = as_group(group)
    if not issubclass(chosen, transformers.PreTrainedModel):
        chosen, options = _class_of(chosen, folder, options)
    mesh = mesh_of(group, ranks, torch.device("meta"), "from_pretrained") if ranks.size > 1 else None
    reading: Any = type(chosen.__name__, (chosen,), {"__module__": chosen.__module__, "_load_pretrained_model": _reader(chosen, ranks, mesh)})
    model, report = reading.from_pretrained(folder, output_loading_info=True, **options)
    model.__class__ = chosen
    _check_complete(model, report, folder)
    return convert(model, group if dtensor else ranks, dtensor=dtensor)


def _class_of(auto: Any, folder: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that an Auto class of transformers chooses, and the options with the configuration it chose by."""
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    names = ("revision", "cache_dir", "local_files_only", "token", "subfolder", "trust_remote_code")
    config = options.get("config") or transformers.AutoConfig.from_pretrained(
        folder, **{name: options[name] for name in names if name in options}
    )
    if type(config) not in auto._model_mapping:
        raise ValueError(f"{auto.__name__} has no model for {type(config).__name__}: give model_class")
    return _get_model_class(config, auto._model_mapping), {**options, "config": config}


def _reader(chosen: Any, group: Group, mesh: DeviceMesh | None) -> Any:
    """What transformers calls with a model on the meta device, to fill it: of DTensors it reads this rank's rows."""

    def load(model: Any, *arguments: Any, **more: Any) -> Any:
        for name, experts in stacked_experts(model):
            layout, _ = recognised(name, experts)
            for theirs in layout.names if mesh is not None else ():
                _spread_parameter(experts, theirs, group, mesh)
        return chosen._load_pretrained_model(model, *arguments, **more)

    return staticmethod(load)


def _spread_parameter(experts: Any, name: str, group: Group, mesh: Any) -> None:
    whole = getattr(experts, name)
    if whole.device.type != "meta":
        raise ValueError(f"{name} is on {whole.device} before it is read: give from_pretrained no option that puts it there")
    count = whole.shape[0] // group.size + (group.rank < whole.shape[0] % group.size)
    rows = torch.empty(count, *whole.shape[1:], dtype=whole.dtype, device="meta")
    setattr(experts, name, nn.Parameter(spread(rows, whole.shape[0], mesh), requires_grad=whole.requires_grad))


def _check_complete(model: nn.Module, report: Any, folder: Any) -> None:
    """transformers makes up what it does not find: for a head that is new, not for experts."""
    absent = {key if isinstance(key, str) else key[0] for kind in ("missing_keys", "mismatched_keys") for key in report[kind]}
    experts = {f"{name}.{key}" for name, module in stacked_experts(model) for key, _ in module.named_parameters()}
    if absent & experts:
        raise ValueError(f"{folder} has no {min(absent & experts)}, or another shape of it than the configuration says")
