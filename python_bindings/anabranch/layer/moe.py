"""The layer as a torch.nn.Module."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..dialects import options_from
from ..groups import alone, as_group
from ..steps import watch
from . import fakes  # noqa: F401
from .held import check_held, held, held_experts, warn_of_unnamed
from .parts import Experts, Part
from .spread import mesh_of, spread
from .stats import LayerStats, Probe
from .through import Given, MoEOutput, Through, checked_routing
from .wrappers import SpreadExperts

_SEEDS = 2**63 - 1

Result = TypeVar("Result")


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer whose experts are spread over a group's ranks.

    Every rank of the group makes it with the same options (ValueError or RuntimeError naming what
    differs), and every rank takes part in each forward and backward, whatever it holds: with zero tokens
    too. Gradients of expert parameters hold every rank's tokens: `finish_gradients` makes them, and the
    replicated ones, those of the mean of the ranks' losses.

    Shapes, with E experts over W ranks, h = hidden_size, n = expert_hidden_size:

    ======================  ============================  =================
    parameter               shape                         on the ranks
    ======================  ============================  =================
    router.weight           [E, h], fp32 (fp64)           replicated
    router.noise_weight     [E, h], fp32 (fp64)           replicated
    router.expert_bias      [E], fp32 (fp64), a buffer    replicated
    experts.up_weight       [E / W, n (glu: 2n), h]       each its experts
    experts.down_weight     [E / W, h, n]                 each its experts
    experts.up_bias         [E / W, n (glu: 2n)]          each its experts
    experts.down_bias       [E / W, h]                    each its experts
    shared_expert. …        as experts., of one expert    replicated
    shared_expert_gate      [1, h]                        replicated
    latent_down, latent_up  [latent_size, h], [h, …]      replicated
    ======================  ============================  =================

    Args:
        hidden_size: h, width of a token.
        expert_hidden_size: n, inner width of an expert.
        num_experts: E, over all ranks.
        top_k: experts a token goes to.
        activation: "gelu_tanh", "gelu", "relu", "silu", "relu_squared" or "quick_gelu" (x · sigmoid(1.702 x)); or a
            function of a tensor, element by element, which PyTorch differentiates.
        glu: activation(gate) · up instead of activation(up); rows 0..n−1 of up_weight are the gate.
        activation_limit: what is activated is at most this, and the up part within ± this (gpt-oss: 7,
            DeepSeek-V4: 10); 0: no limit.
        glu_offset: added to the up part, activation(gate) · (up + offset) (gpt-oss: 1).
        bias: biases in both projections of every expert.
        shared_expert_hidden_size: inner width of an expert that sees every token; 0: none.
        shared_expert_gate: the shared expert's output times sigmoid(x · shared_expert_gate).
        latent_size: tokens go to the experts as rows of this width, projected down before the exchange and up
            after it (LatentMoE, arXiv:2601.18089); router and shared expert see them whole. 0: as they are.
        gate: "top_k"; "noisy_top_k" (arXiv:1701.06538); "gshard", the second expert by chance
            (arXiv:2006.16668); "sinkhorn", in training the best after Sinkhorn's scaling to equal loads, by which a token's
            experts depend on the other tokens of its rank (S-BASE, arXiv:2202.01169); "expert_choice", in training every
            expert takes its share of each sequence's tokens, those that score it highest, in evaluation a token its own
            top_k best (arXiv:2202.09368): by mean top_k experts a token, and `out.expert_ids` [T, num_experts].
        router_score: "softmax", "sigmoid" or "sqrt_softplus" of the logits.
        renormalize: the weights of a token's top_k experts sum to 1; not with top_k = 1, whose router
            would have no gradient.
        routing_scale: the weights are multiplied by it in the end.
        expert_bias: a bias of each expert is added to its score where experts are chosen, not in the
            weights: `update_expert_bias` balances the load by it (arXiv:2408.15664).
        expert_bias_update: "sign", a step of one size towards the mean load; or "quantile", the bias that would have given
            each expert its share of the step's tokens (quantile balancing, Kimi K3), of `out.bias_histogram`.
        expert_groups: the experts lie in this many groups of equal size, at most 32.
        top_groups: a token goes to experts of its best `top_groups` groups only.
        group_score: of a group: "top_two_sum" of its experts' scores (DeepSeek-V3), "maximum", "top_share_sum", the
            sum of the best top_k / top_groups (Megatron-Core), or "top_share_logit_sum", the same of logits.
        forced_routing: for benchmarks: "balanced", one expert after another, or "random"; the weights are still
            the router's scores.
        router_fp64: logits, scores and weights are computed in fp64.
        jitter: training only: noise on the router's input, uniform in [1 − jitter, 1 + jitter].
        cross_node_limit: training only: of a rank's choices the share that may leave its node; 0: any. Those of the
            highest weights do, the others' tokens choose again among the node's experts (FasterMoE's topology-aware
            gate). It changes the model.
        balance_coefficient, sequence_balance_coefficient, global_balance_coefficient, z_coefficient: of the losses in
            `out.auxiliary_loss`. A sequence is the tokens along the last dimension of x before hidden_size. The global one
            is of a whole step, over micro-batches and, with `set_expert_replicas`, replicas of the experts:
            `finish_gradients` ends the step.
        attach_losses: in training the gradient of the auxiliary loss is added where that of the output passes,
            so that a model that does not hand the loss on still trains balanced; see `attached_loss_scale`.
        recompute: keep only the received rows for backward, and compute the up-projection again.
        engine: grouped GEMM engine: "auto", which measures once; "deterministic", auto's choice by shape alone; or
            one of `grouped_gemm_engines(device)`.
        errors: when a routing that is refused (NaN in a gate, expert ids out of range or twice) is an error: "late", on a
            GPU that only this process uses, for which nothing is waited: its tokens' outputs are NaN, and the error
            comes from the layer's next forward, `check` or `finish_gradients`; or "at_call", which waits once a step.
            On CPUs, and on several ranks without a `receive_capacity`, always at the call.
        overlap: how rows travel between ranks: "off", while a step waits for them; or beside its products, all at
            once ("1") or in chunks ("2", "4", "8") of whole experts or, where a rank has few, of some ranks' tokens.
            Results and gradients are the same. "auto": the first steps, and some of every 2,000, take off, 1, 2 and 4 in
            turn, the others what was the quickest.
        receive_capacity: on several ranks, CPUs or GPUs that map each other's memory: what a rank has room to receive in
            a step, in multiples of its own tokens' assignments, which is the balanced load where all ranks have as
            many tokens; the number of ranks is enough for any routing then. Counts stay on the device, for which nothing
            waits; rows travel in one chunk. A step that needs more is computed nowhere: its output is NaN, and a
            RuntimeError is heard late; `run` does it again. 0: as much as arrives, for which the host waits. (Tested on
            CPUs; on GPUs it has not been run yet.)
        receive_rows_limit: the most rows that a rank receives at a time, at least one a rank; 0: any number. A step
            in which a rank is sent more goes in rounds on all ranks, forward and backward: slower, in bounded memory,
            with the same results but for the rounding of the experts' gradients.
        balance: what travels where some experts have more than their share of a step's tokens: "off", always tokens; or
            the weights of the fullest experts to other ranks, and their gradients back. "shadow": to all ranks, where a
            step is foreseen to be shorter for it by nominal rates of products and links; "replicas": to as few as leave
            no rank more than 1.05 times the mean of assignments, whatever it costs; "gather", "gather:G": among all ranks, or
            groups of G of them, in which no token travels then (Tutel's parallelism between experts and data); "auto":
            whichever of these is foreseen to be the shortest, by rates that the first step measures; the others choose
            alike in all runs. Results are the same within rounding; `explain()` says what was done.
        placement: which rank holds which experts. "blocks": as many as they go, in rank order; "sliced": with more ranks
            than experts each rank a slice of one expert's hidden dimension, otherwise blocks; or rank by rank the experts
            it holds, and of those in slices which: in "0,3;2/0:2;2/1:2,1" rank 0 holds experts 0 and 3, rank 1 the first of
            two slices of expert 2, rank 2 the second and expert 1. Slices make results differ by rounding, and go
            without `balance` and Muon.
        seed: of the parameters; the same seed gives the same layer at any number of ranks, and that of
            the C++ library. None: drawn from torch's generator, which is then to be the same on all ranks.
        router: False: the layer has no router, and every forward is given its routing, of any top_k.
        dtensor: the experts' parameters are DTensors [E, …] over the group's ranks, of which each has its experts: so
            torch.distributed.checkpoint, state_dict helpers, torch's `clip_grad_norm_` and FSDP2 see all of them. The
            group is a DeviceMesh or a process group, the device the one that the layer stays on.
        experts: this rank's experts in the place of the layer's own: a module that is called with rows [P, hidden_size
            (latent_size)], expert by expert, and counts [this rank's experts] int64 in host memory, and returns results
            of the rows' shape; P may be 0. Its parameters are `expert_parameters`, each rank's own; initial values,
            type and device are its own affair. expert_hidden_size is not used.
        group: the expert-parallel group, see `as_group`.
        device: of the parameters; "meta": none yet (`to_empty`, then `reset_parameters`).
        dtype: fp32, fp64, bf16 or fp16.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        activation: str | Callable[[Tensor], Tensor] = "gelu_tanh",
        glu: bool = False,
        activation_limit: float = 0.0,
        glu_offset: float = 0.0,
        bias: bool = False,
        shared_expert_hidden_size: int = 0,
        shared_expert_gate: bool = False,
        latent_size: int = 0,
        gate: str = "top_k",
        router_score: str = "softmax",
        renormalize: bool = True,
        routing_scale: float = 1.0,
        expert_bias: bool = False,
        expert_bias_update: str = "sign",
        expert_groups: int = 1,
        top_groups: int = 1,
        group_score: str = "top_two_sum",
        forced_routing: str = "none",
        router_fp64: bool = False,
        jitter: float = 0.0,
        cross_node_limit: float = 0.0,
        balance_coefficient: float = 0.0,
        sequence_balance_coefficient: float = 0.0,
        global_balance_coefficient: float = 0.0,
        z_coefficient: float = 0.0,
        attach_losses: bool = False,
        recompute: bool = False,
        engine: str = "auto",
        errors: str = "late",
        overlap: str = "off",
        receive_capacity: float = 0.0,
        receive_rows_limit: int = 0,
        balance: str = "off",
        placement: str = "blocks",
        seed: int | None = None,
        router: bool = True,
        dtensor: bool = False,
        experts: nn.Module | None = None,
        group: object = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(activation, str) and not callable(activation):
            raise TypeError(f"activation is a {type(activation).__name__}, expected a name or a function")
        self._own_activation = None if isinstance(activation, str) else activation
        self._own_experts = experts is not None
        options: dict[str, Any] = {
            "hidden_size": hidden_size,
            "expert_hidden_size": expert_hidden_size,
            "num_experts": num_experts,
            "top_k": top_k,
            "activation": activation if isinstance(activation, str) else "relu",  # the core computes none
            "glu": glu,
            "activation_limit": activation_limit,
            "glu_offset": glu_offset,
            "bias": bias,
            "shared_expert_hidden_size": shared_expert_hidden_size,
            "shared_expert_gate": shared_expert_gate,
            "latent_size": latent_size,
            "gate": gate,
            "router_score": router_score,
            "renormalize": renormalize and router,
            "routing_scale": routing_scale,
            "expert_bias": expert_bias,
            "expert_bias_update": expert_bias_update,
            "expert_groups": expert_groups,
            "top_groups": top_groups,
            "group_score": group_score,
            "forced_routing": forced_routing,
            "router_fp64": router_fp64,
            "jitter": jitter,
            "cross_node_limit": cross_node_limit,
            "balance_coefficient": balance_coefficient,
            "sequence_balance_coefficient": sequence_balance_coefficient,
            "global_balance_coefficient": global_balance_coefficient,
            "z_coefficient": z_coefficient,
            "attach_losses": attach_losses,
            "recompute": recompute,
            "engine": engine,
            "errors": errors,
            "overlap": overlap,
            "receive_capacity": receive_capacity,
            "receive_rows_limit": receive_rows_limit,
            "balance": balance,
            "placement": placement,
        }
        of_router = {"gate", "expert_bias", "expert_bias_update", "forced_routing", "router_fp64", "jitter", "cross_node_limit"}
        of_router |= {"attach_losses"}
        of_router |= {name for name in options if name.endswith("_coefficient")}
        defaults = inspect.signature(MoE).parameters
        given = sorted(name for name in of_router if options[name] != defaults[name].default)
        if not router and given:
            raise ValueError(f"router=False with {', '.join(given)}: a router's")
        of_core = shared_expert_hidden_size or recompute or activation_limit or glu_offset or receive_rows_limit
        of_core = of_core or balance != "off" or placement != "blocks"
        if (self._own_experts or self._own_activation) and of_core:
            raise ValueError(
                "experts or an activation of one's own with shared_expert_hidden_size, recompute, activation_limit, "
                "glu_offset, receive_rows_limit, balance or placement, which are the core's experts'"
            )
        if dtensor and placement != "blocks":
            raise ValueError(f"dtensor=True with placement = {placement!r}, expected blocks, as a DTensor's rows lie")
        self.options = options
        self.attached_loss_scale: Tensor | None = None
        """[] or None, which is 1: what attached losses are multiplied by, that is a loss scaler's number over the
        number of micro-batches that a step adds up."""
        self.evaluation_losses = False
        """Whether a forward in eval mode computes losses and sums the load over the ranks, which takes a collective more.
        The same on all ranks: else each says that they differ. With a `receive_capacity` they are summed in any mode."""
        self.has_router = router
        self.seed = int(torch.randint(_SEEDS, ())) if seed is None else seed
        self._seed_was_given = seed is not None
        self.group = as_group(group)
        self._options = _to_json(options)
        self._other_options = _to_json({name: value for name, value in options.items() if name != "top_k"})
        self._group = self.group.name
        self._probe = Probe()
        self._step_load: Tensor | None = None  # [num_experts], of the forwards in training since the step began
        self._replicas = alone()
        device = torch.device(device or torch.get_default_device())
        if dtensor and self._own_experts:
            raise ValueError("dtensor=True with experts of one's own, whose parameters the layer does not know")
        self.dtensor = dtensor and self.group.size > 1
        self._make_parameters(dtype or torch.get_default_dtype(), device, group, experts)

    @classmethod
    def from_config(cls, config: Any, dialect: str, **more: Any) -> MoE:
        """A layer by another library's configuration.

        Args:
            config: a mapping, or the library's own class; a whole model's will do.
            dialect: "megatron" (TransformerConfig), "megablocks" (Arguments), "torchtitan" (MoE.Config, MoEArgs), or
                "hf" (transformers); docs/python.md has the tables.
            more: arguments of this class, which hold against those of `config`: group, device, dtype, engine, …

        ValueError with the key and the reason for what no layer here computes.
        """
        return cls(**{**options_from(config, dialect), **more})

    def _make_parameters(
        self, dtype: torch.dtype, device: torch.device, source: object, own_experts: nn.Module | None
    ) -> None:
        operators = torch.ops.anabranch
        mesh = mesh_of(source, self.group, device) if self.dtensor else None
        options = _to_json({**self.options, "seed": self.seed})
        names = operators.parameter_names(options)
        values = operators.initial_parameters(options, self.group.rank, self.group.size, dtype, device)
        self._agree(options, dtype, device)
        self._places: list[tuple[str, str]] = []
        for each, value in zip(names, values):
            path, _, name = each.rpartition(".")
            if (path == "router" and not self.has_router) or (path == "experts" and own_experts is not None):
                continue
            self._places.append((path, name))
            if path and path not in self._modules:
                self.add_module(path, self._new_part(path))
            if path == "experts" and mesh is not None:
                value = spread(value, self.options["num_experts"], mesh)
            part = self.get_submodule(path)
            if name == "expert_bias":
                part.register_buffer(name, value)
            else:
                part.register_parameter(name, nn.Parameter(value))
            if isinstance(part, Part):
                part.names.append(name)
        if own_experts is not None:
            self.add_module("experts", own_experts)
        self._join_device()
        self._join_watched()

    def _agree(self, options: str, dtype: torch.dtype, device: torch.device) -> None:
        try:
            torch.ops.anabranch.agree(options, dtype, device, self.group.name)
        except RuntimeError as error:
            if self._seed_was_given or " has seed = " not in str(error):
                raise
            raise RuntimeError(
                f"{error}: it was not given, and each rank has drawn its own. Give seed=…, or call torch.manual_seed with "
                "one number on all ranks before"
            ) from None

    def _new_part(self, path: str) -> Part:
        if path != "experts":
            return Part()
        kind = SpreadExperts if self.group.size > 1 and not self.dtensor else Experts
        return kind(self.options["num_experts"], self.group)

    def reset_parameters(self) -> None:
        """Fills the parameters as at first: what `to_empty` leaves empty, or training has changed."""
        options = _to_json({**self.options, "seed": self.seed})
        weight = self._any_weight()
        values = torch.ops.anabranch.initial_parameters(
            options, self.group.rank, self.group.size, weight.dtype, weight.device
        )
        of_name = dict(zip(torch.ops.anabranch.parameter_names(options), values))
        with torch.no_grad():
            experts = self._modules["experts"](None, lambda _, tensors: tensors)  # type: ignore[misc]
            parts = {**self._parts_but_experts(None), "experts": experts}
            for path, name in self._places:
                parts[path][name].copy_(of_name[f"{path}.{name}".lstrip(".")])

    def forward(
        self,
        x: Tensor,
        routing: tuple[Tensor, Tensor] | None = None,
        *,
        may_skip: bool = False,
        expert_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> MoEOutput:
        """Sends every token through its experts. Collective.

        Args:
            x: [..., hidden_size] of the parameters' type (under autocast, of any floating type); leading
                sizes may differ between ranks and be 0.
            routing: None, or where the tokens go, in row-major order: expert ids [T, top_k], distinct
                within a token, and weights [T, top_k], differentiable.
            may_skip: some of routing's ids may be −1: no assignment. The same on all ranks.
            expert_ids: None, or the router's choice, which it then only weighs, with its losses and gradients: ids
                [T, top_k] as of an earlier `out.expert_ids`, −1 for none; −2 in the first place: the router's own.
            padding_mask: None, or bool of x's leading sizes: true is padding, which goes nowhere, counts for nothing
                and gets zeros. With a routing from outside its ids say so.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}, expected a Tensor [..., {self.options['hidden_size']}]")
        if padding_mask is not None and padding_mask.shape != x.shape[:-1]:
            raise ValueError(f"padding_mask is {tuple(padding_mask.shape)}, expected {tuple(x.shape[:-1])}, as x is")
        weights = None
        if routing is not None:
            if expert_ids is not None or padding_mask is not None:
                raise ValueError("routing with expert_ids or padding_mask, which are for the layer's router")
            expert_ids, weights = checked_routing(routing)
        elif not self.has_router:
            raise ValueError("routing is None, expected expert ids and weights: the layer has no router")
        through = Through(self, self._parts_but_experts(x), Given(expert_ids, weights, padding_mask, may_skip))
        return through(x, {}) if self._own_experts else self._modules["experts"](x, through)  # type: ignore[misc]

    def update_expert_bias(self, expert_load: Tensor, rate: float) -> None:
        """Balances without a loss: after each step, adds `rate` (DeepSeek-V3: 0.001) to the biases of experts
        with less than the mean of `expert_load` [E], takes it from those with more. In data parallelism the
        load is to be summed over the replicas of the experts. No communication.

        With `expert_bias_update="quantile"` it is `out.bias_histogram` that is summed, over all ranks, and `rate`, at most
        1, how much of the new biases is taken."""
        if not self.options["expert_bias"]:
            raise ValueError("update_expert_bias: the layer has no bias of its experts (expert_bias=True)")
        bias = self._parts_but_experts(None)["router"]["expert_bias"]
        if self.options["expert_bias_update"] == "quantile":
            torch.ops.anabranch.update_expert_bias_by_quantile(bias, expert_load, self.options["top_k"], rate)
        else:
            torch.ops.anabranch.update_expert_bias(bias, expert_load, rate)

    def _place(self, placement: str) -> None:
        """Experts lie so from the next forward on; the rows of their parameters are the caller's to move."""
        self.options["placement"] = placement
        self._options = _to_json(self.options)
        self._other_options = _to_json({name: value for name, value in self.options.items() if name != "top_k"})

    def explain(self) -> str:
        """What travelled in the last step, tokens or weights, in how many rounds, and why.

        Layers of the same options and group share it: the last step is that of any of them."""
        weight = self._any_weight()
        return torch.ops.anabranch.explain(self._options, self._group, weight.dtype, weight.device)

    def stats(self) -> LayerStats:
        """What this rank's layer has done since `reset_stats`. Waits for the device; no communication."""
        return self._probe.stats()

    def reset_stats(self, timed: bool = False) -> None:
        """Begins to count anew; `timed`: stages are measured too, which costs a few microseconds each."""
        self._probe.reset(timed)

    def _any_weight(self) -> Tensor:
        """Where the parameters are, and of which type those beside the router."""
        of_experts = list(self.get_submodule("experts").parameters())
        return next((p for p in of_experts if p.dim() == 3), of_experts[0] if of_experts else next(self.parameters()))

    def _parts_but_experts(self, x: Tensor | None) -> dict[str, dict[str, Tensor]]:
        """The layer's tensors, by part and name; those of no part under ""."""
        parts: dict[str, dict[str, Tensor]] = {"": {}}
        for path, name in self._places:
            if not path:
                parts[path][name] = getattr(self, name)
            elif path not in parts and path != "experts":
                parts[path] = self._modules[path](x)  # type: ignore[misc]
        return parts

    def _parameter_list(self, parts: dict[str, dict[str, Tensor]], x: Tensor) -> list[Tensor]:
        """In the order of the operators, the router's where there is one. Beside rows of 16 bits, experts of 32 are cast for
        the step, as a wrapper's mixed precision has it: their gradients have their own type."""
        found = [parts[path][name] for path, name in self._places]
        if x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(x.device.type):
            for i, (path, _) in enumerate(self._places):
                if path != "router" and found[i].dtype == torch.float32:
                    found[i] = found[i].to(x.dtype)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        super()._apply(fn, recurse)
        self._join_device()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join_watched()  # a copy

    def _join_watched(self) -> None:
        if self.group.size > 1:
            watch(self)

    def get_extra_state(self) -> Tensor:
        """Which experts the state holds, int64: [3], see `held`; [experts, 3], see `held_experts`, where they are placed
        otherwise; as DTensors all of them."""
        if self.options["placement"] != "blocks":
            own = held_experts(self._options, self.group)[1]
            return torch.tensor(own, dtype=torch.int64, device="cpu").view(-1, 3)
        return held(self.options["num_experts"], alone() if self.dtensor else self.group)

    def set_extra_state(self, state: Tensor) -> None:
        """ValueError for the state of other experts, before any of them is copied."""
        check_held(state, self.get_extra_state())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *more: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *more)
        key = f"{prefix}_extra_state"
        if key in missing:
            missing.remove(key)
        of_experts = [name for name in state_dict if name.startswith(f"{prefix}experts.")]
        says = key in state_dict or any(name.endswith("._extra_state") for name in of_experts)  # which they are
        if of_experts and not says and self.group.size > 1 and not self.dtensor:
            warn_of_unnamed(self.group, prefix.rstrip(".") or "the layer")

    def _join_device(self) -> None:
        """The group is one for tensors where the parameters are."""
        device = self._any_weight().device
        self._group = self.group.on(device).name
        self._replicas_group = self._replicas.on(device).name

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items()) + f", group={self.group}"


def check() -> None:
    """Waits for what the layers of this process have launched on GPUs, and raises the ValueError of a step whose
    routing was refused there (see `MoE`'s `errors`), or the RuntimeError of one that another rank refused or that
    exceeded its `receive_capacity`. `finish_gradients` does so as well. Waits for nothing while a CUDA graph is
    recorded."""
    torch.ops.anabranch.check()


def run(step: Callable[[], Result], again: Callable[[], Result] | None = None) -> Result:
    """What `step()` returns, a CUDA graph's replay for one, or, if a layer's `receive_capacity` was exceeded in it, what
    `again()` returns, in which none is.

    Waits for the step, as `check` does, and raises what it raises. All ranks of a layer do it again together. `again`,
    or `step` where none is given, is to compute all of the step anew, from gradients that it sets to None or zero itself. ::

        def step():
            optimizer.zero_grad()
            out = layer(x)
            out.output.backward(dy)
            return out

        out = anabranch.run(step)
    """
    result = step()
    if not torch.ops.anabranch.take_exceeded_capacity():
        return result
    torch.ops.anabranch.set_unbounded(True)
    try:
        return (again or step)()
    finally:
        torch.ops.anabranch.set_unbounded(False)


def _to_json(options: dict[str, Any]) -> str:
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers
            raise ValueError(f"options: {name} = {value}, expected a finite number")
    try:
        return json.dumps(options, sort_keys=True)
    except TypeError as error:
        wrong = {name: value for name, value in options.items() if not isinstance(value, (int, float, str))}
        raise TypeError(f"options: {wrong} are no numbers, truth values or strings") from error
