"""For transformers' Trainer and those made of it, such as TRL's: what a converted model over several ranks asks for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from .huggingface.saving import CollectiveSaving
from .layer.wrappers import ddp_around
from .training.checkpoint import load_checkpoint, save_checkpoint
from .training.gradients import ParallelGroups, clip_gradient_norm, finish_gradients, ignore_expert_parameters

FOLDER = "anabranch"
"""Within a Trainer's checkpoint: model and optimizer, for any number of ranks."""


class MoECallback(transformers.TrainerCallback):
    """`Trainer(model=anabranch.convert(model), callbacks=[MoECallback()])`, alone and under torchrun.

    Finishes the gradients before each step and clips them by `max_grad_norm`, by one norm of all ranks, in the Trainer's
    place; what is logged as grad_norm is that norm. Trainer saves on rank 0 alone: its call of the model's save_pretrained
    is made on all ranks instead, once it is back, and model and optimizer are kept beside it, from where
    `train(resume_from_checkpoint=…)` and `load_best_model_at_end` have them; adapters on experts (`anabranch.lora`) are all
    ranks' in the checkpoint too. After training, `model.save_pretrained(folder)` or `save_adapters(model, folder)` on every
    rank; `trainer.save_model()`, rank 0's alone, is refused.

    Args:
        resume_from: the checkpoint that `resume_from_checkpoint` says, where it is not in `output_dir`.
        groups: see `make_parallel_groups`; None where the layers' group is the whole world.

    ValueError for DeepSpeed, whose ZeRO takes experts for the same on all ranks.
    """

    def __init__(self, resume_from: str | os.PathLike[str] | None = None, groups: ParallelGroups | None = None) -> None:
        self._resume_from = resume_from
        self._groups = groups
        self._max_norm = 0.0
        self._norm: float | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if args.deepspeed:
            raise ValueError(
                "DeepSpeed averages and partitions parameters as if they were the same on all ranks, and each rank has "
                "experts of its own: leave it out, or shard the other parameters by fully_shard"
            )
        ignore_expert_parameters(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **more: Any) -> None:
        self._max_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        _defer_saving(model, True)
        if state.global_step > 0:
            folder = Path(self._resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}") / FOLDER
            if not folder.is_dir():
                raise FileNotFoundError(f"{folder} is not there: MoECallback(resume_from=…) says where the checkpoint is")
            load_checkpoint(folder, model, optimizer, groups=self._groups)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **more: Any
    ) -> None:
        model, scaler = ddp_around(model), getattr(optimizer, "scaler", None)
        finish_gradients(model, self._groups, scaler=scaler)
        if self._max_norm > 0:
            self._norm = clip_gradient_norm(model, self._max_norm, self._groups, scaler=scaler)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        for log in (logs, *state.log_history[-1:]):
            if self._norm is not None and "grad_norm" in log:
                log["grad_norm"] = self._norm

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **more: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        with _saving(model):
            if isinstance(model.save_pretrained, CollectiveSaving):
                model.save_pretrained(folder, is_main_process=args.process_index == 0)
        if _has_adapted_experts(model):
            from .lora import save_adapters

            save_adapters(model, folder, is_main_process=args.process_index == 0)
        save_checkpoint(folder / FOLDER, model, optimizer, groups=self._groups)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        args.max_grad_norm = self._max_norm
        _defer_saving(model, False)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_checkpoint(Path(state.best_model_checkpoint) / FOLDER, model, groups=self._groups)


def _has_adapted_experts(model: Any) -> bool:
    lora = sys.modules.get("anabranch.lora")  # peft need not be there
    return lora is not None and lora.has_adapted_experts(model)


def _defer_saving(model: Any, deferred: bool) -> None:
    for module in model.modules():
        saving = module.__dict__.get("save_pretrained")
        if isinstance(saving, CollectiveSaving):
            saving.deferred = deferred


@contextlib.contextmanager
def _saving(model: Any) -> Iterator[None]:
    _defer_saving(model, False)
    yield
    _defer_saving(model, True)
