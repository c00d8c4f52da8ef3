"""README's lines for Python, run as they stand there in a fresh virtual environment that sees the torch of .venv."""

import json
import os
import pathlib
import re
import subprocess
import sys
import sysconfig

import pytest

PROJECT = pathlib.Path(__file__).resolve().parents[2]
DEFINES = os.environ.get("ANABRANCH_WHEEL_DEFINES", "").split()
PINNED = re.search(r'"(scikit-build-core==[^"]+)"', (PROJECT / "pyproject.toml").read_text()).group(1)


def run(*command, path=(), **more):
    """`path` comes first in PATH; the project's own environment is in it only if named there."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PATH")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    ours = str(PROJECT / ".venv")
    others = [part for part in os.environ["PATH"].split(os.pathsep) if not part.startswith(ours)]
    environment["PATH"] = os.pathsep.join([*map(str, path), *others])
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**environment, **more.pop("env", {})}, **more
    )


def checked(*command, **more):
    result = run(*command, **more)
    assert result.returncode == 0, f"{command}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def lines_of_readme():
    """The indented block of README.md that installs the package."""
    blocks = re.findall(r"(?:^    .+\n)+", (PROJECT / "README.md").read_text(), re.MULTILINE)
    (block,) = [block for block in blocks if "pip install ." in block]
    return [line.strip() for line in block.splitlines()]


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """Of an environment that README's lines have been run in. They build in build/wheel, so that a second run has
    little to do, and with the machine's CMake or, where that is missing or too old, one that pip fetches."""
    folder = tmp_path_factory.mktemp("environment")
    if run(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder / "there", PINNED).returncode:
        pytest.skip(f"no package index has {PINNED}")
    checked(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    site = pathlib.Path(checked(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "torch-of-another.pth").write_text(sysconfig.get_path("purelib") + "\n")
    arguments = " ".join(f"-D{define}" for define in DEFINES)
    script = "\n".join(["set -eu", *lines_of_readme()])
    checked("bash", "-c", script, path=[folder / "bin"], cwd=PROJECT, env={"CMAKE_ARGS": arguments})
    return python


def test_readme_installs_by_two_lines_and_looks():
    assert [line.split("#")[0].strip() for line in lines_of_readme()] == [
        "pip install torch",
        "pip install .",
        "anabranch doctor",
    ]


def test_what_is_in_it(python):
    listed = checked(python, "-m", "pip", "show", "--files", "anabranch")
    names = {line.strip() for line in listed.split("Files:")[1].splitlines() if line.strip()}
    for name in ("__init__.py", "_build.py", "py.typed", "libanabranch.so", "libanabranch_operators.so"):
        assert f"anabranch/{name}" in names, sorted(names)
    for name in ("main.py", "programs/tools/plan/plan.py", "programs/tools/tokenize/main.py", "programs/examples/train_lm.py"):
        assert f"anabranch_cli/{name}" in names, sorted(names)
    ours = ("anabranch/", "anabranch_cli/", "anabranch-", "../../../bin/anabranch")
    assert all(name.startswith(ours) for name in names), sorted(names)
    program = "import importlib.metadata as m; print(m.distribution('anabranch').read_text('WHEEL'))"
    assert "Tag: py3-none-" in checked(python, "-c", program)


@pytest.mark.parametrize("cmake", ["3.25.1", None])
def test_an_old_cmake_or_none_is_made_up_for(cmake, tmp_path):
    """Debian 12's is 3.25.1, which cannot compile C++20 by nvcc."""
    if cmake:
        (tmp_path / "cmake").write_text(f"#!/bin/sh\necho '{{\"version\": {{\"string\": \"{cmake}\"}}}}'\n")
        (tmp_path / "cmake").chmod(0o755)
    program = "import json; from scikit_build_core.build import get_requires_for_build_wheel as g; print(json.dumps(g({})))"
    asked = json.loads(checked(sys.executable, "-c", program, cwd=PROJECT, env={"PATH": str(tmp_path)}))
    assert any(name.startswith("cmake>=3.25.2") for name in asked) and any(name.startswith("ninja") for name in asked)


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
    told = checked(python.with_name("anabranch"), "info", cwd=tmp_path)
    assert "transports: self" in told and ("built with CUDA kernels" in told or "no kernels for GPUs: " in told)


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


def configured(*flags, path=()):
    """CMake's exit code and words, line breaks taken out."""
    without = ["-D", "ANABRANCH_TESTS=OFF", "-D", "ANABRANCH_EXAMPLES=OFF", "-D", "ANABRANCH_MPI=OFF"]
    path = [*path, pathlib.Path(sys.executable).parent]
    result = run("cmake", "-S", PROJECT, "-G", "Ninja", *without, *flags, path=path)
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def test_building_without_torch(tmp_path):
    checked(sys.executable, "-m", "venv", "--without-pip", tmp_path / "empty")
    python = f"Python_EXECUTABLE={tmp_path / 'empty' / 'bin' / 'python'}"
    returncode, words = configured("-B", tmp_path / "build", "-D", "SKBUILD=2", "-D", python)
    assert returncode != 0 and "pip install torch first" in words


def test_an_nvcc_that_cannot_compile(tmp_path):
    """AUTO builds for the CPU, and says so loudly; ON does not build."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    build = ["-B", tmp_path / "build", "-D", f"LibTorch_PYTHON={sys.executable}", "-D", "ANABRANCH_PYTHON=ON"]
    returncode, words = configured(*build, "-D", "ANABRANCH_CUDA=AUTO", path=[tmp_path])
    assert returncode == 0 and "WITHOUT CUDA, for the CPU alone: " in words and "cannot compile a program" in words, words
    assert "cannot compile a program" in (tmp_path / "build/python/anabranch/_build.py").read_text()
    returncode, words = configured(*build, "-D", "ANABRANCH_CUDA=ON", path=[tmp_path])
    assert returncode != 0 and "ANABRANCH_CUDA is ON, but" in words


def test_without_mpi(tmp_path):
    """AUTO, which pip builds with, goes on without one, and says so."""
    build = ["-B", tmp_path / "build", "-D", f"LibTorch_PYTHON={sys.executable}", "-D", "CMAKE_DISABLE_FIND_PACKAGE_MPI=ON"]
    returncode, words = configured(*build, "-D", "ANABRANCH_MPI=AUTO")
    assert returncode == 0 and "WITHOUT MPI: there is none" in words and "anabranch: MPI OFF" in words, words
    assert 'ANABRANCH_MPI = "AUTO"' in (PROJECT / "pyproject.toml").read_text()


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
    return configured(
        *("-B", folder / "build", "-D", f"LibTorch_ROOT={torch}", "-D", "ANABRANCH_CUDA=OFF", "-D", "ANABRANCH_PYTHON=OFF")
    )


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
        result = run("cmake", "-D", f"CMAKE_CXX_COMPILER={name}", "-P", script, cwd=folder, path=[pathlib.Path(sys.executable).parent])
        assert result.returncode == returncode, result.stderr
    assert "Take another compiler" in " ".join(result.stderr.split())
