"""A checkpoint's files, looked at and written anew without a model, and without torch: bytes and checksums."""

from __future__ import annotations

import json
import re
import secrets
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .problem import Problem

INDEX = "checkpoint.index.json"
CHUNK = 1 << 24
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class Stored(NamedTuple):
    """Where a tensor's bytes lie."""

    file: Path
    offset: int
    bytes: int
    dtype: str
    shape: list[int]
    crc32: int


class Checkpoint(NamedTuple):
    folder: Path
    contents: dict[str, Any]
    """Of its index."""
    tensors: dict[str, Stored]


def read(folder: Path) -> Checkpoint:
    """The index and all files' headers, compared with each other."""
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise Problem(f"{folder / INDEX}: {error}") from error
    if not isinstance(index, dict) or index.get("format") != "anabranch checkpoint" or index.get("version") != 1:
        raise Problem(f"{folder / INDEX} is no index of an anabranch checkpoint of version 1")
    if index.get("index_crc32") != _index_checksum(index):
        raise Problem(f"{folder / INDEX} is damaged: its checksum does not match")
    headers = {name: _header(folder / name, stored) for name, stored in index["files"].items()}
    tensors = {}
    for name, file in index["weight_map"].items():
        start, entries = headers[file]
        if name not in entries:
            raise Problem(f"{folder / file} does not hold {name}")
        begin, end = entries[name]["data_offsets"]
        entry = entries[name]
        tensors[name] = Stored(folder / file, start + begin, end - begin, entry["dtype"], entry["shape"], index["crc32"][name])
    return Checkpoint(folder, index, tensors)


def inspect(folder: Path, verify: bool) -> dict[str, Any]:
    checkpoint = read(folder)
    index, tensors = checkpoint.contents, checkpoint.tensors
    of_model = {name: stored for name, stored in tensors.items() if not name.startswith("optimizer.")}
    found: dict[str, Any] = {
        "folder": str(folder),
        "files": {name: file["bytes"] for name, file in index["files"].items()},
        "optimizer": index["optimizer"],
        "metadata": index["metadata"],
        "parameters": sum(_elements(stored) for stored in of_model.values()),
        "experts": max((number + 1 for _, number in map(_expert_of, of_model) if number is not None), default=0),
        "bytes": sum(stored.bytes for stored in tensors.values()),
        "tensors": {name: {"dtype": stored.dtype, "shape": stored.shape} for name, stored in tensors.items()},
    }
    if verify:
        found["damaged"] = [name for name, stored in tensors.items() if _checksum(stored) != stored.crc32]
    return found


def table(found: dict[str, Any], with_tensors: bool) -> str:
    lines = [
        f"{found['folder']}: {found['parameters']:,} parameters and buffers, {len(found['tensors'])} tensors, "
        f"{found['bytes']:,} bytes in {len(found['files'])} files",
        f"experts a layer: {found['experts'] or 'none'}",
        f"optimizer: {found['optimizer'] or 'none'}",
        *(f"{name}: {value}" for name, value in found["metadata"].items()),
    ]
    if with_tensors:
        lines += [f"  {name}  {each['dtype']} {each['shape']}" for name, each in found["tensors"].items()]
    if "damaged" in found:
        lines += [f"DAMAGED: {name}" for name in found["damaged"]] or ["every byte is as it was written"]
    return "\n".join(lines)


def convert(folder: Path, output: Path) -> dict[str, Any]:
    """The model's tensors alone, by their names, an expert's with its number."""
    checkpoint = read(folder)
    tensors = {name: stored for name, stored in checkpoint.tensors.items() if not name.startswith("optimizer.")}
    if output.suffix == ".safetensors":
        _write(output, tensors)
    elif output.suffix == ".pt":
        import torch

        kinds = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64", "I32": "int32"}
        kinds |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
        loaded = {}
        for name, stored in tensors.items():
            data = bytearray(b"".join(_checked_bytes(name, stored)))
            dtype = getattr(torch, kinds[stored.dtype])
            loaded[name] = (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(stored.shape)
        torch.save(loaded, output)
    else:
        raise Problem(f"{output}: expected a name that ends in .safetensors or .pt")
    return {"output": str(output), "tensors": len(tensors), "bytes": output.stat().st_size}


def reshard(folder: Path, output: Path, ranks: int) -> dict[str, Any]:
    """A checkpoint loads on any number of ranks; here each of `ranks` then finds its experts in one file."""
    if ranks < 1:
        raise Problem(f"--ranks {ranks}: expected at least 1")
    if output.exists() and any(output.iterdir()):
        raise Problem(f"{output} is not empty")
    checkpoint = read(folder)
    output.mkdir(parents=True, exist_ok=True)
    tag = secrets.token_hex(8)
    index = {**checkpoint.contents, "files": {}, "weight_map": {}}
    for rank, share in enumerate(_shares(checkpoint.tensors, ranks)):
        if share:
            name = f"model-{tag}-rank{rank:05d}-of-{ranks:05d}.safetensors"
            index["files"][name] = _write(output / name, share)
            index["weight_map"] |= dict.fromkeys(share, name)
    index["index_crc32"] = _index_checksum(index)
    (output / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return {"output": str(output), "tensors": len(checkpoint.tensors), "files": len(index["files"])}


def _index_checksum(index: dict[str, Any]) -> int:
    """As the library takes it: of the index without it, keys sorted, without spaces."""
    rest = {name: value for name, value in index.items() if name != "index_crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def _header(path: Path, stored: dict[str, int]) -> tuple[int, dict[str, Any]]:
    """Where tensors begin, and what the safetensors header says of them."""
    try:
        if path.stat().st_size != stored["bytes"]:
            raise Problem(f"{path} has {path.stat().st_size} bytes, its index says {stored['bytes']}")
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            text = file.read(min(size, stored["bytes"]))
    except OSError as error:
        raise Problem(f"{path}: {error.strerror}") from error
    if zlib.crc32(text) != stored["header_crc32"]:
        raise Problem(f"{path} is damaged: the checksum of its header does not match")
    return 8 + size, json.loads(text)


def _bytes(stored: Stored) -> Iterator[bytes]:
    with stored.file.open("rb") as file:
        file.seek(stored.offset)
        left = stored.bytes
        while left:
            chunk = file.read(min(left, CHUNK))
            if not chunk:
                raise Problem(f"{stored.file} ends too early")
            left -= len(chunk)
            yield chunk


def _checksum(stored: Stored) -> int:
    value = 0
    for chunk in _bytes(stored):
        value = zlib.crc32(chunk, value)
    return value


def _checked_bytes(name: str, stored: Stored) -> Iterator[bytes]:
    value = 0
    for chunk in _bytes(stored):
        value = zlib.crc32(chunk, value)
        yield chunk
    if value != stored.crc32:
        raise Problem(f"{stored.file} is damaged: the checksum of {name} does not match")


def _write(path: Path, tensors: dict[str, Stored]) -> dict[str, int]:
    """A safetensors file, wide types first, so that each tensor is aligned to its type; its entry in an index."""
    ordered = sorted(tensors.items(), key=lambda item: -WIDTHS[item[1].dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, stored in ordered:
        header[name] = {"dtype": stored.dtype, "shape": stored.shape, "data_offsets": [offset, offset + stored.bytes]}
        offset += stored.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, stored in ordered:
            _copy(name, stored, file)
    return {"bytes": path.stat().st_size, "header_crc32": zlib.crc32(text)}


def _copy(name: str, stored: Stored, file: BinaryIO) -> None:
    for chunk in _checked_bytes(name, stored):
        file.write(chunk)


def _elements(stored: Stored) -> int:
    return stored.bytes // WIDTHS[stored.dtype]


def _expert_of(name: str) -> tuple[str, int | None]:
    """What all experts of a layer have in common, and which one the tensor is of."""
    parts = re.split(r"(?<=experts\.)(\d+)(?=\.)", name, maxsplit=1)
    return (parts[0] + "*" + parts[2], int(parts[1])) if len(parts) == 3 else (name, None)


def _shares(tensors: dict[str, Stored], ranks: int) -> list[dict[str, Stored]]:
    """Experts in blocks, as a layer has them; every other tensor with whom has least so far."""
    counts: dict[str, int] = {}
    for name in tensors:
        layer, number = _expert_of(name)
        if number is not None:
            counts[layer] = max(counts.get(layer, 0), number + 1)
    shares: list[dict[str, Stored]] = [{} for _ in range(ranks)]
    sizes = [0] * ranks
    for is_expert in (True, False):
        for name, stored in tensors.items():
            layer, number = _expert_of(name)
            if (number is not None) != is_expert:
                continue
            rank = number * ranks // counts[layer] if number is not None else sizes.index(min(sizes))
            shares[rank][name] = stored
            sizes[rank] += stored.bytes
    return shares
