"""The safetensors package of PyPI and src/checkpoint/safetensors.cpp read each other's files."""

import os
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

COPY = os.environ["ANABRANCH_SAFETENSORS_COPY"]

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
SHAPES = [(), (0,), (1,), (3, 0, 2), (7,), (3, 5), (2, 1, 3, 2)]


def copy(source, target):
    return subprocess.run([COPY, source, target], capture_output=True, text=True, check=False)


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def test_files_of_python_survive_a_copy_by_cpp(tmp_path):
    tensors = {
        f"{dtype}.{shape}": (torch.randn(shape, dtype=torch.float64) * 3).abs().to(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }
    tensors['ünï"\\\n'] = torch.randn(3)
    save_file(tensors, tmp_path / "python", metadata={"step": "3", "note": "ü"})
    result = copy(tmp_path / "python", tmp_path / "cpp")
    assert result.returncode == 0, result.stderr

    copied = load_file(tmp_path / "cpp")
    assert copied.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert copied[name].dtype == tensor.dtype, name
        assert copied[name].shape == tensor.shape, name
        if tensor.numel():
            assert torch.equal(raw(copied[name]), raw(tensor)), name
    with safe_open(tmp_path / "cpp", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_file_without_tensors(tmp_path):
    save_file({}, tmp_path / "python")
    assert copy(tmp_path / "python", tmp_path / "cpp").returncode == 0
    assert load_file(tmp_path / "cpp") == {}


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"\xff" * 64, bytes(8)])
def test_foreign_files_are_refused_by_both(tmp_path, content):
    (tmp_path / "foreign").write_bytes(content)
    with pytest.raises(SafetensorError):
        load_file(tmp_path / "foreign")
    result = copy(tmp_path / "foreign", tmp_path / "cpp")
    assert result.returncode == 1
    assert "is not a whole safetensors file" in result.stderr
