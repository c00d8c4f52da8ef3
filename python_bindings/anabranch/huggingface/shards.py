"""Files of safetensors whose tensors come one after another: nothing but the one being written is in memory."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "model.safetensors"
INDEX = "model.safetensors.index.json"


def dtypes() -> dict[str, torch.dtype]:
    """By their names in the files."""
    from safetensors import torch as safetensors

    return {name: dtype for name, dtype in safetensors._TYPES.items() if isinstance(dtype, torch.dtype)}


class Shards:
    """A model's files in `folder`: laid out from the tensors' shapes and types, filled in any order. Their names are
    theirs when all is written (`finish`); before that, and without it (`discard`), what was there stands.

    Args:
        tensors: by name; without values, on the meta device.
        max_shard_size: bytes, or as "5GB"; a larger tensor has a file of its own.
    """

    def __init__(self, folder: Path, tensors: dict[str, Tensor], max_shard_size: int | str) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        self._folder = folder
        in_order = {name: tensors[name] for name in sorted(tensors)}  # so every process lays them out alike
        self._split = split_torch_state_dict_into_shards(in_order, max_shard_size=max_shard_size)
        self._offsets: dict[str, tuple[Any, int]] = {}
        self._files = {name: open(self._partial(name), "wb") for name in self._split.filename_to_tensors}
        names = {dtype: name for name, dtype in dtypes().items()}
        for file, inside in self._split.filename_to_tensors.items():
            header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
            end = 0
            for name in inside:
                begin, end = end, end + tensors[name].nbytes
                header[name] = {
                    "dtype": names[tensors[name].dtype],
                    "shape": list(tensors[name].shape),
                    "data_offsets": [begin, end],
                }
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            self._files[file].write(len(text).to_bytes(8, "little") + text)
            self._files[file].truncate(8 + len(text) + end)
            for name in inside:
                self._offsets[name] = (self._files[file], 8 + len(text) + header[name]["data_offsets"][0])

    def _partial(self, name: str) -> Path:
        """A name of this process's: replicas of the experts may write the same files at the same time."""
        return self._folder / f".{name}.{os.getpid()}@{socket.gethostname()}.partial"

    def write(self, name: str, values: Tensor, skip: int = 0) -> None:
        """`values` as that tensor's, behind its first `skip` bytes."""
        file, offset = self._offsets[name]
        file.seek(offset + skip)
        file.write(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """In the place of what files the folder has."""
        for file in self._files.values():
            file.close()
        if self._split.is_sharded:
            (self._folder / INDEX).unlink(missing_ok=True)  # while it would lead to files of both
        for name in self._files:
            os.replace(self._partial(name), self._folder / name)
        ours = set(self._files)
        if self._split.is_sharded:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            self._partial(INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            os.replace(self._partial(INDEX), self._folder / INDEX)
            ours.add(INDEX)
        for old in weight_files(self._folder):
            if old.name not in ours:
                old.unlink(missing_ok=True)

    def discard(self) -> None:
        for name, file in self._files.items():
            file.close()
            self._partial(name).unlink(missing_ok=True)


def weight_files(folder: Path) -> list[Path]:
    """A model's, and the index of several."""
    whole = [path for path in (folder / NAME, folder / INDEX) if path.exists()]
    return whole + sorted(folder.glob("model-*-of-*.safetensors"))
