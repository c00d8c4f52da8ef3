"""A wheel of the project, installed into a fresh virtual environment that sees the torch of .venv."""

import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import zipfile

import pytest

PROJECT = pathlib.Path(__file__).resolve().parents[2]
DEFINES = os.environ.get("ANABRANCH_WHEEL_DEFINES", "").split()


def run(*command, **more):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), environment["PATH"]])
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**environment, **more.pop("env", {})}, **more
    )


def checked(*command, **more):
    result = run(*command, **more)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Built in a folder that stays, so that a second run has little to do."""
    folder = tmp_path_factory.mktemp("wheel")
    settings = [f"--config-settings=cmake.define.{define}" for define in DEFINES]
    checked(
        *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
        *("--wheel-dir", folder, *settings, PROJECT),
        cwd=folder,
    )
    (built,) = folder.glob("anabranch-*.whl")
    return built


@pytest.fixture(scope="session")
def python(wheel, tmp_path_factory):
    """Of an environment that has the wheel, and nothing else of its own."""
    folder = tmp_path_factory.mktemp("environment")
    checked(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = pathlib.Path(checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch-of-another.pth").write_text(sysconfig.get_path("purelib") + "\n")
    checked(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("__init__.py", "_build.py", "py.typed", "libanabranch.so", "libanabranch_operators.so"):
        assert f"anabranch/{name}" in names, names
    assert all(name.startswith(("anabranch/", "anabranch-")) for name in names), names
    assert wheel.name.split("-")[2:4] == ["py3", "none"]


def test_it_works(python, tmp_path):
    program = """
import anabranch, torch, sys
assert anabranch.__file__.startswith(sys.prefix), anabranch.__file__
layer = anabranch.MoE(8, 12, 4, 2, glu=True)
x = torch.randn(5, 8, requires_grad=True)
layer(x).output.sum().backward()
assert x.grad.abs().sum() > 0
print("works")
"""
    assert checked(python, "-c", program, cwd=tmp_path).strip() == "works"
    assert "transports: self" in checked(python, "-m", "anabranch.info", cwd=tmp_path)


@pytest.mark.parametrize(
    "torch, shown",
    [
        ("raise ImportError('no torch')", "pip install torch"),
        ("__version__ = '1.13.1'", "torch 1.13.1 is installed"),
        ("import importlib.metadata as m; __version__ = m.version('torch'); compiled_with_cxx11_abi = lambda: None", "C++ ABI"),
    ],
)
def test_a_torch_that_does_not_fit(torch, shown, python, tmp_path):
    (tmp_path / "torch.py").write_text(torch)
    result = run(python, "-c", "import anabranch", cwd=tmp_path)
    assert result.returncode == 1 and "ImportError" in result.stderr and shown in result.stderr, result.stderr


def test_building_without_torch(tmp_path):
    checked(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty")
    result = run(
        *("cmake", "-S", PROJECT, "-B", tmp_path / "build", "-G", "Ninja", "-D", "SKBUILD=2", "-D", "ANABRANCH_CUDA=OFF"),
        *("-D", f"Python_EXECUTABLE={tmp_path / 'empty' / 'bin' / 'python'}"),
    )
    assert result.returncode != 0 and "pip install torch scikit-build-core" in " ".join(result.stderr.split())


def configured_with(version, folder):
    """CMake's words about a LibTorch of that version, of which there is no more than what tells it."""
    torch = folder / "torch"
    header = torch / "include/torch/csrc/api/include/torch"
    header.mkdir(parents=True)
    (torch / "lib").mkdir()
    for name in ("libtorch_cpu.so", "libc10.so"):
        (torch / "lib" / name).touch()
    (header / "torch.h").touch()
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    (header / "version.h").write_text("".join(f"#define TORCH_VERSION_{name} {part}\n" for name, part in parts))
    result = run(
        *("cmake", "-S", PROJECT, "-B", folder / "build", "-G", "Ninja", "-D", f"LibTorch_ROOT={torch}"),
        *("-D", "ANABRANCH_MPI=OFF", "-D", "ANABRANCH_CUDA=OFF", "-D", "ANABRANCH_PYTHON=OFF"),
        *("-D", "ANABRANCH_TESTS=OFF", "-D", "ANABRANCH_EXAMPLES=OFF"),
    )
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def test_the_oldest_torch_is_the_same_everywhere_and_an_older_one_is_refused(tmp_path):
    named = {
        re.search(pattern, (PROJECT / path).read_text()).group(1)
        for path, pattern in {
            "cmake/dependencies.cmake": r"ANABRANCH_MINIMAL_LIBTORCH ([0-9.]+)\)",
            "pyproject.toml": r'"torch>=([0-9.]+)"',
            "launch/setup.sh": r"minimal_torch=([0-9.]+)",
        }.items()
    }
    (oldest,) = named
    major, minor = map(int, oldest.split("."))
    returncode, words = configured_with(f"{oldest}.0", tmp_path / "oldest")
    assert returncode == 0 and f"LibTorch {oldest}.0" in words, words
    returncode, words = configured_with(f"{major}.{minor - 1}.1", tmp_path / "older")
    assert returncode != 0 and f'required is at least "{oldest}"' in words, words


def test_a_compiler_that_links_a_c_plus_plus_library_of_its_own(tmp_path):
    compiler = tmp_path / "own-library"
    compiler.write_text('#!/bin/sh\nexec c++ -static-libstdc++ "$@"\n')
    compiler.chmod(0o755)
    for name, returncode in (("c++", 0), (compiler, 1)):
        folder = tmp_path / str(returncode)
        folder.mkdir()
        script = PROJECT / "cmake" / "standard_library.cmake"
        result = run("cmake", "-D", f"CMAKE_CXX_COMPILER={name}", "-P", script, cwd=folder)
        assert result.returncode == returncode, result.stderr
    assert "Take another compiler" in " ".join(result.stderr.split())
