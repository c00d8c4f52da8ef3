"""LoRA on experts as grouped GEMMs, for peft: W x + (alpha / r) B (A x) of each expert's own rows, and no W + B A."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as nnF
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from . import functional as F
from .layer.activations import ACTIVATIONS
from .layer.factors import Factors, like_linear
from .layer.moe import MoE
from .layer.parts import Experts
from .layer.through import MoEOutput, Through


def lora_config(**options: Any) -> peft.LoraConfig:
    """peft's LoraConfig, under which experts among `target_modules`, such as "moe.experts", have adapters of their own:
    A [E / W, r, in] and B [E / W, out, r] for both projections. For layers that are given their routing, as those of
    `convert` are. Adapters are each rank's own, as its experts are: `save_adapters` and `save_checkpoint` keep them, and
    `merge_and_unload()` makes a model whose save_pretrained holds them."""
    return _with_experts(peft.LoraConfig(**options))


def _with_experts(config: Any) -> Any:
    config._register_custom_module({Experts: LoraExperts})
    return config


def has_adapted_experts(model: nn.Module) -> bool:
    """Whether experts of `model` have adapters as of `lora_config`."""
    return isinstance(model, peft.PeftModel) and any(isinstance(module, LoraExperts) for module in model.modules())


def save_adapters(model: peft.PeftModel, folder: str | os.PathLike[str], is_main_process: bool = True) -> None:
    """The files of peft's own save_pretrained with all ranks' adapters in them, which `load_adapters` reads at any number of
    ranks. Collective over the layers' group: its rank 0 writes, unless `is_main_process` is False there. All return
    when the files are there; RuntimeError on all if it failed."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Factors)}
    if not found:
        raise ValueError("the model has no adapters on experts as `lora_config` makes them: model.save_pretrained(folder) saves it")
    first = next(iter(found.values()))
    group = first.group
    state = model.state_dict()
    for name, factors in found.items():
        factors.gather_into(state, f"{name}.")
    error: Exception | None = None
    if group.rank == 0 and is_main_process:
        try:
            _write(model, Path(folder), state)
        except Exception as raised:  # the other ranks are waiting to hear of it
            error = raised
    group.raise_together(error, first.up_weight.device, f"rank 0 could not save the adapters in {os.fspath(folder)}")


def _write(model: peft.PeftModel, folder: Path, state: dict[str, Any]) -> None:
    """Each file is replaced as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        model.save_pretrained(beside, state_dict=state)
        for path in [path for path in Path(beside).rglob("*") if path.is_file()]:
            place = folder / path.relative_to(beside)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)


def load_adapters(model: Any, folder: str | os.PathLike[str], **options: Any) -> peft.PeftModel:
    """`model`, from `convert` or `from_pretrained`, with the adapters that `save_adapters` has written: each rank takes its
    own experts'. `options` are those of peft's PeftModel.from_pretrained, as is_trainable=True."""
    config = _with_experts(peft.PeftConfig.from_pretrained(os.fspath(folder)))
    return peft.PeftModel.from_pretrained(model, os.fspath(folder), config=config, **options)


class LoraExperts(nn.Module, LoraLayer):
    """In the place of a layer's experts."""

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, r: int = 0, lora_alpha: int = 1, **more: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.up_weight.shape[2], module.down_weight.shape[1]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **more: Any) -> None:
        for name in ("lora_dropout", "use_dora", "lora_bias"):
            if getattr(config, name):
                raise ValueError(f"LoRA on experts: {name} = {getattr(config, name)}, expected none")
        if r < 1:
            raise ValueError(f"LoRA on experts: r = {r}, expected at least 1")
        if config.init_lora_weights is not True:
            raise ValueError(f"LoRA on experts: init_lora_weights = {config.init_lora_weights!r}, expected True")
        base: Any = self.base_layer
        up, down = base.up_weight, base.down_weight
        if type(up) is not nn.Parameter:
            raise ValueError(f"LoRA on experts: their weights are {type(up).__name__}s, expected plain parameters")
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_A[adapter_name] = Factors(base, *(like_linear(weight, r, base) for weight in (up, down)))
        self.lora_B[adapter_name] = Factors(base, *(weight.new_zeros(*weight.shape[:2], r) for weight in (up, down)))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, through: Through) -> Any:
        if self.disable_adapters or self.merged:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, through)
        return self.base_layer(x, _Adapted(through, [self._factors(name) for name in self._active()]))

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _factors(self, adapter_name: str) -> tuple[Any, Any, float]:
        return self.lora_A[adapter_name], self.lora_B[adapter_name], self.scaling[adapter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Into the experts' weights, as peft's layers do."""
        for name in adapter_names or self._active():
            if name not in self.lora_A or name in self.merged_adapters:
                continue
            added = self._products(name)
            if safe_merge and not all(bool(values.isfinite().all()) for values in added.values()):
                raise ValueError(f"the adapter {name} holds numbers that are not finite")
            self._add(added, 1)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._add(self._products(self.merged_adapters.pop()), -1)

    @torch.no_grad()
    def _products(self, adapter_name: str) -> dict[str, Tensor]:
        a, b, scale = self._factors(adapter_name)
        return {name: scale * (getattr(b, name) @ getattr(a, name)) for name in ("up_weight", "down_weight")}

    @torch.no_grad()
    def _add(self, products: dict[str, Tensor], sign: int) -> None:
        for name, values in products.items():
            getattr(self.base_layer, name).add_(values, alpha=sign)


class _Adapted:
    """The way of a step's rows through experts with adapters: the stages of a layer, one by one."""

    def __init__(self, through: Through, adapters: list[tuple[Any, Any, float]]) -> None:
        self.layer: MoE = through.layer
        if through.routing is None:
            raise ValueError(
                "LoRA on the experts of a layer that has its own router: target its parameters instead "
                "(target_parameters=['experts.up_weight', …]), or give the layer its routing (router=False)"
            )
        if through.given.may_skip or self.layer.options["latent_size"] or self.layer._own_activation is not None:
            raise ValueError("LoRA on experts takes no ids of −1, no latent_size and no activation of one's own")
        if self.layer.options["placement"] != "blocks":
            raise ValueError("LoRA on experts that are placed otherwise than in blocks")
        self._expert_ids, self._weights = through.routing
        self._adapters = adapters

    def __call__(self, x: Tensor, experts: dict[str, Tensor]) -> MoEOutput:
        options, group = self.layer.options, self.layer._group
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        gate_type = torch.float64 if dtype == torch.float64 else torch.float32
        weights = self._weights.to(gate_type)
        plan = F.plan(self._expert_ids.to(torch.int64), weights, options["num_experts"], group)
        received, values = F.dispatch(rows, plan, weights)
        hidden = self._projected("up", F.permute(received, plan), experts, plan, dtype)
        activation = ACTIVATIONS[options["activation"]]
        limit = options["activation_limit"] or math.inf
        if options["glu"]:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activation(gate.clamp(max=limit)) * (up.clamp(-limit, limit) + options["glu_offset"])
        else:
            hidden = activation(hidden.clamp(max=limit))
        results = self._projected("down", hidden, experts, plan, dtype)
        output, _ = F.combine(F.unpermute(results, plan, values), plan)
        load = torch.bincount(self._expert_ids.flatten(), minlength=options["num_experts"])
        torch.ops.anabranch.all_reduce(load, group)
        return MoEOutput(output.reshape(x.shape), None, None, load)

    def _projected(self, name: str, x: Tensor, experts: dict[str, Tensor], plan: F.Plan, dtype: torch.dtype) -> Tensor:
        """x [P, in] → [P, out]: each expert's own rows, by its weight, its adapters and its bias."""
        counts, engine = plan.expert_counts, self.layer.options["engine"]
        found = F.grouped_gemm(x, experts[f"{name}_weight"].to(dtype), counts, engine)
        for a, b, scale in self._adapters:
            inner = F.grouped_gemm(x, getattr(a, f"{name}_weight").to(dtype), counts, engine)
            found = found + scale * F.grouped_gemm(inner, getattr(b, f"{name}_weight").to(dtype), counts, engine)
        bias = experts.get(f"{name}_bias")
        if bias is not None:
            of_rows = torch.repeat_interleave(counts.to(bias.device), output_size=x.shape[0])
            found = found + nnF.embedding(of_rows, bias.to(dtype))
        return found
