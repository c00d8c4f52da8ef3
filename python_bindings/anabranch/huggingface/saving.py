"""save_pretrained of converted models: what plain transformers writes, one expert at a time."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layer.held import first_expert
from ..layer.spread import rows_of
from .shards import Shards, dtypes, weight_files

if TYPE_CHECKING:
    from . import ConvertedExperts


class CollectiveSaving:
    """`save_pretrained` of a converted model: what it writes is the family's checkpoint."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # which has this in turn
        self.deferred = False
        """Calls do nothing: for a program that makes them on one rank alone. Who sets it saves the model on all."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CollectiveSaving:
        return CollectiveSaving(memo.get(id(self._model()), self._model()))

    def __reduce__(self) -> Any:
        return CollectiveSaving, (self._model(),)

    def __call__(
        self, save_directory: Any, is_main_process: bool = True, state_dict: Any = None, **options: Any
    ) -> None:
        """As transformers' own. Collective over the layers' group: every rank makes the call, and rank 0 writes, unless
        `is_main_process` is False there, as with replicas of the experts, of which one suffices. It has
        one expert at a time in host memory, besides what is replicated; all return when the files are there;
        RuntimeError on all if it failed."""
        if self.deferred:
            return
        model: Any = self._model()
        if options.get("push_to_hub") or options.get("variant") or options.get("distributed_checkpoint"):
            raise ValueError("push_to_hub, variant and distributed_checkpoint are not for a converted model's save_pretrained")
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError("the model has adapters by add_adapter, which are saved alone: take peft.get_peft_model")
        given = model.state_dict() if state_dict is None else state_dict
        parts = [_Part(model, name, module, given, options) for name, module in _converted(model)]
        group = parts[0].group
        if group.size > 1 and sys._getframe(1).f_globals.get("__name__") == "transformers.trainer":
            raise RuntimeError(
                "transformers' Trainer saves on one rank alone, where this model, which has experts on all of them, would wait "
                "for the others. While it trains, MoECallback has all ranks save; after that call model.save_pretrained(folder) "
                "on every rank, not trainer.save_model()"
            )
        own = {key for part in parts for key in part.keys}
        rest = {name: value for name, value in given.items() if name not in own}
        error: Exception | None = None
        files: Shards | None = None
        if group.rank == 0 and is_main_process:
            try:
                files = _files(model, Path(save_directory), rest, parts, options)
            except Exception as raised:  # the other ranks are waiting to hear of it
                error = raised
        error = _write_experts(parts, files) or error
        if files is not None:
            try:
                files.discard() if error else files.finish()
            except Exception as raised:
                error = raised
        group.raise_together(error, model.device, f"rank 0 could not save the model in {save_directory}")


def _converted(model: Any) -> list[tuple[str, ConvertedExperts]]:
    from . import ConvertedExperts

    return [(name, module) for name, module in model.named_modules() if isinstance(module, ConvertedExperts)]


class _Part:
    """One layer's experts, and their tensors in the family's files: one each, or [num_experts, …] for all."""

    def __init__(self, model: Any, name: str, module: ConvertedExperts, state: dict[str, Tensor], options: dict[str, Any]):
        self._model, self._name, self._layout = model, name, module.layout
        self._as_written = options.get("save_original_format", True)
        self.group = module.moe.group
        self.num_experts = module.moe.options["num_experts"]
        self.keys = {f"{name}.{key}" for key in module.state_dict()}
        self._rows: dict[str, Tensor] = {}
        for theirs, ours in self._layout.names.items():
            key = f"{name}.moe.experts.{ours}"
            if key not in state:
                raise ValueError(f"state_dict has no {key}, expected model.state_dict() of the converted model")
            self._rows[theirs] = rows_of(state[key])
        self._first = first_expert(self.num_experts, self.group)
        self.whole = self._in_files(self._of_shape(self.num_experts))
        """What the files get, without values."""
        self._one = self._in_files(self._of_shape(1))
        self._number = self._place_of_number()
        stacked = {name: (self.num_experts, *tensor.shape[1:]) for name, tensor in self._one.items()}
        is_stacked = stacked == {name: tuple(tensor.shape) for name, tensor in self.whole.items()}
        self._at_once = 1 if self._number is not None or is_stacked else self.num_experts

    def _of_shape(self, experts: int) -> dict[str, Tensor]:
        return {
            theirs: torch.empty(experts, *rows.shape[1:], dtype=rows.dtype, device="meta") for theirs, rows in self._rows.items()
        }

    def _in_files(self, experts: dict[str, Tensor]) -> dict[str, Tensor]:
        """By the names that they have there."""
        from transformers.core_model_loading import revert_weight_conversion

        family = {f"{self._name}.{theirs}": self._layout.to_family(theirs, rows) for theirs, rows in experts.items()}
        return revert_weight_conversion(self._model, family) if self._as_written else family

    def _place_of_number(self) -> int | None:
        """Where a name has the expert's number, as one of the parts between its dots; None: it has none."""
        last = str(self.num_experts - 1)
        name = next(iter(self._one)).split(".")
        for i in reversed(range(len(name))):
            if name[i] == "0" and ".".join([*name[:i], last, *name[i + 1 :]]) in self.whole:
                return i
        return None

    def _name_of(self, name: str, expert: int) -> str:
        """In the files, of what `_one` has for expert 0."""
        if self._number is None:
            return name
        parts = name.split(".")
        return ".".join([*parts[: self._number], str(expert), *parts[self._number + 1 :]])

    def write(self, files: Shards | None) -> Exception | None:
        """Expert by expert through host memory on rank 0, where `files` are; what went wrong there. Collective, whatever
        goes wrong. Families whose files mix the experts have them all at once."""
        error: Exception | None = None
        for expert in range(0, self.num_experts, self._at_once):
            gathered = {theirs: self._gathered(rows, expert) for theirs, rows in self._rows.items()}
            if files is None or error is not None:
                continue
            try:
                for name, values in self._in_files(gathered).items():
                    stacked = self._number is None and self._at_once == 1
                    files.write(self._name_of(name, expert), values, skip=expert * values.nbytes if stacked else 0)
            except Exception as raised:
                error = raised
        return error

    def _gathered(self, rows: Tensor, expert: int) -> Tensor:
        """Those of `_at_once` experts, on rank 0; none elsewhere. Collective."""
        begin = max(0, expert - self._first)
        end = max(begin, min(rows.shape[0], expert + self._at_once - self._first))
        mine = rows.detach()[begin:end]
        return mine.cpu() if self.group.size == 1 else torch.ops.anabranch.gather_rows(mine, self.group.on(rows.device).name)


def _files(
    model: Any, folder: Path, rest: dict[str, Tensor], parts: list[_Part], options: dict[str, Any]
) -> Shards:
    """The model's files, with all but the experts in them: transformers writes that, and what lies beside it."""
    from safetensors import safe_open

    max_shard_size = options.pop("max_shard_size", "50GB")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        beside = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        with _written_here(model):
            type(model).save_pretrained(model, beside, True, rest, **options)
        replicated: dict[str, Any] = {}
        for path in weight_files(beside):
            if path.suffix == ".safetensors":
                file = opened.enter_context(safe_open(path, "pt"))
                replicated |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            path.unlink()
        if rest and not replicated:
            raise RuntimeError(f"transformers' save_pretrained has written none of the {len(rest)} tensors beside the experts")
        for path in beside.iterdir():
            os.replace(path, folder / path.name)
        tensors = {
            name: torch.empty(values.get_shape(), dtype=dtypes()[values.get_dtype()], device="meta")
            for name, values in replicated.items()
        }
        for part in parts:
            tensors |= part.whole
        files = Shards(folder, tensors, max_shard_size)
        try:
            for name, values in replicated.items():
                files.write(name, values[...])
        except Exception:
            files.discard()
            raise
    return files


@contextlib.contextmanager
def _written_here(model: Any) -> Iterator[None]:
    """transformers writes on rank 0 of all processes alone, which need not be rank 0 of the layers' group."""
    model.__dict__["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.__dict__["should_save_on_this_rank"]


def _write_experts(parts: list[_Part], files: Shards | None) -> Exception | None:
    """Collective: a part is gathered also where another's failed."""
    errors = [part.write(files) for part in parts]
    return next((error for error in errors if error is not None), None)
