"""launch/setup.sh: that a second run changes nothing, and what it says where it cannot install."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, executable

# What the script itself calls; the rest of the machine is hidden from it.
TOOLS = "bash sh env cat cut dirname head tail sort awk grep sed nproc rm tee chmod true pwd c++".split()

# Asks no password.
SUDO = '#!/bin/bash\nshift\nif [ "$1" = -- ]; then shift; fi\nexec "$@"\n'


@pytest.fixture
def bare(tmp_path):
    """A folder with the script and a PATH on which neither MPI nor apt-get is, for a user not root."""
    folder = tmp_path / "project"
    (folder / "launch").mkdir(parents=True)
    for name in ("setup.sh", "common.sh", "requirements.txt", "requirements_peers.txt"):
        shutil.copy(ROOT / "launch" / name, folder / "launch" / name)
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in TOOLS:
        if shutil.which(name):
            (commands / name).symlink_to(shutil.which(name))
    executable(commands / "id", "#!/bin/bash\necho 1000\n")
    executable(commands / "python3", f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
    return folder, commands


def run(folder, *arguments, path=None, expect=0, **environment):
    environment = {**os.environ, **environment}
    environment.pop("CMAKE_PREFIX_PATH", None)
    if path:
        environment["PATH"] = str(path)
    result = subprocess.run(
        [str(folder / "launch/setup.sh"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == expect, result.stdout
    return result.stdout


@pytest.mark.skipif(not (ROOT / ".venv/anabranch-setup.txt").exists(), reason="not set up here")
def test_a_second_run_is_quick_and_changes_nothing():
    stamp = ROOT / ".venv/anabranch-setup.txt"
    before = stamp.stat().st_mtime_ns
    start = time.monotonic()
    output = run(ROOT)
    assert time.monotonic() - start < 30  # seconds; a new environment takes minutes
    assert "everything is there" in output or "optional" in output
    assert "ready: torch 2." in output
    assert "installing" not in output
    assert stamp.stat().st_mtime_ns == before


@pytest.mark.skipif(not (ROOT / ".venv/anabranch-setup.txt").exists(), reason="not set up here")
def test_an_active_environment_is_not_built_on_itself():
    output = run(ROOT, "--check", ANABRANCH_PYTHON=str(ROOT / ".venv/bin/python"))
    assert "ready: torch" in output


def test_check_names_what_is_missing_and_how_to_get_it(bare):
    folder, commands = bare
    output = run(folder, "--check", path=commands, expect=1)
    (mpi,) = [line for line in output.splitlines() if line.strip().startswith("MPI (")]
    assert "required" in mpi and "libopenmpi-dev" in mpi and "module load openmpi" in mpi
    assert "apt-get install" in output
    assert "something required is missing" in output
    assert not (folder / ".venv").exists()


def test_without_root_it_stops_before_the_download(bare):
    folder, commands = bare
    output = run(folder, path=commands, expect=1)
    assert "required parts of the system are missing" in output
    assert "pip" not in output and not (folder / ".venv").exists()


def test_a_sudo_that_asks_for_a_password_is_no_root(bare):
    folder, commands = bare
    executable(commands / "apt-get", f"#!/bin/bash\ntouch {folder}/installed\n")
    executable(commands / "sudo", "#!/bin/bash\necho 'sudo: a password is required' >&2\nexit 1\n")
    run(folder, path=commands, expect=1)
    assert not (folder / "installed").exists()


def test_sudo_installs_what_is_missing_and_nothing_else(bare):
    folder, commands = bare
    executable(commands / "apt-get", f'#!/bin/bash\necho "$*" >> {folder}/installed\n')
    executable(commands / "sudo", SUDO)
    run(folder, path=commands, expect=1)  # this apt-get installs nothing
    update, install = (folder / "installed").read_text().splitlines()
    assert update.endswith("update")
    assert "openmpi-bin" in install and "libopenmpi-dev" in install
    assert "g++" not in install.split()  # the compiler is there


@pytest.mark.parametrize("flag, package", [("--slurm", "slurm-wlm munge"), ("--tests", "chromium")])
def test_what_tests_alone_use_is_installed_only_when_asked_for(bare, flag, package):
    folder, commands = bare
    executable(commands / "apt-get", f'#!/bin/bash\necho "$*" >> {folder}/installed\n')
    executable(commands / "sudo", SUDO)
    run(folder, path=commands, expect=1)
    assert package not in (folder / "installed").read_text()
    run(folder, flag, path=commands, expect=1)
    assert package in (folder / "installed").read_text()


POLICY = Path("/usr/sbin/policy-rc.d")


@pytest.mark.skipif(not POLICY.exists() and os.geteuid() != 0, reason="needs root to say that no service starts")
def test_no_service_starts_while_packages_are_installed(bare):
    folder, commands = bare
    executable(commands / "apt-get", f"#!/bin/bash\n{POLICY} munge start\necho $? >> {folder}/answers\n")
    executable(commands / "sudo", SUDO)
    before = POLICY.read_text() if POLICY.exists() else None
    run(folder, path=commands, expect=1)
    _, during_installation = (folder / "answers").read_text().split()
    assert during_installation == "101"
    assert (POLICY.read_text() if POLICY.exists() else None) == before


@pytest.fixture
def whole(bare):
    """`bare` with MPI, and with an environment that an earlier version of the project made."""
    folder, commands = bare
    for name in ("mpirun", "mpicxx"):
        executable(commands / name, "#!/bin/bash\n")
    for name in ("cmake", "ninja"):
        executable(folder / ".venv/bin" / name, "#!/bin/bash\necho version 1\n")
    executable(
        folder / ".venv/bin/python",
        "#!/bin/bash\n"
        'case "$*" in\n'
        '  "-m pip config list") echo "$PIP_CONFIG" ;;\n'
        f'  "-m pip install"*) echo "$*" >> "{folder}/pip"; [[ "$*" == *uv==* ]] || cat > "{folder}/installed"\n'
        '    exit "${PIP_EXIT:-0}" ;;\n'
        f'  "-m uv pip"*) cat > "{folder}/installed"; {{ echo "$*"; env | grep ^UV_; }} > "{folder}/uv"\n'
        '    echo "Downloading torch-2.11.0.whl (530.7 MB)"\n'
        '    exit "${UV_EXIT:-0}" ;;\n'
        "  *torch*) echo 2.11.0 ;;\n"
        "esac\n",
    )
    old = (folder / "launch/requirements.txt").read_text().replace("ninja==", "ninja==0.")
    (folder / ".venv/anabranch-setup.txt").write_text(f"/some/python\n{old}")
    return folder, commands


def test_another_pin_updates_the_environment_in_place(whole):
    folder, commands = whole
    output = run(folder, path=commands)
    assert "updating .venv" in output and "Downloading torch-2.11.0.whl (530.7 MB)" in output
    requirements = (folder / "launch/requirements.txt").read_text()
    assert (folder / "installed").read_text() == requirements
    assert (folder / ".venv/anabranch-setup.txt").read_text() == f"/some/python\n{requirements}"
    (folder / "installed").unlink()
    assert "ready: torch 2.11.0" in run(folder, path=commands)
    assert not (folder / "installed").exists()


def test_an_environment_that_could_not_be_updated_is_kept(whole):
    folder, commands = whole
    before = (folder / ".venv/anabranch-setup.txt").read_text()
    assert "could not install launch/requirements.txt" in run(folder, path=commands, expect=1, UV_EXIT="1")
    assert (folder / ".venv/anabranch-setup.txt").read_text() == before


def test_an_existing_torch_is_not_replaced_by_an_update(whole):
    folder, commands = whole
    packages = folder / ".venv/lib/python3/site-packages"
    packages.mkdir(parents=True)
    (packages / "existing-torch.pth").touch()
    run(folder, path=commands)
    assert "numpy==" in (folder / "installed").read_text()
    assert "torch==" not in (folder / "installed").read_text()
    assert f"--excludes {folder}/.venv/existing-torch.txt" in (folder / "uv").read_text()
    assert (folder / ".venv/existing-torch.txt").read_text() == "torch\n"


def test_uv_hears_what_pip_has_been_told(whole):
    folder, commands = whole
    config = "global.index-url='https://a/simple'\n:env:.find-links='/one /two'\ninstall.no-index='true'"
    run(folder, path=commands, PIP_CONFIG=config, UV_INDEX="https://own/simple")
    told = (folder / "uv").read_text()
    assert "--no-index" in told and "UV_DEFAULT_INDEX=https://a/simple\n" in told
    assert "UV_FIND_LINKS=/one,/two\n" in told and "UV_INDEX=https://own/simple\n" in told


def test_libraries_of_tests_are_installed_once_and_without_what_they_ask_for(whole):
    folder, commands = whole
    run(folder, path=commands)
    assert "--compile-bytecode" in (folder / "uv").read_text() and "--no-deps" not in (folder / "uv").read_text()
    run(folder, "--tests", path=commands)
    assert "--no-deps" in (folder / "uv").read_text() and "launch/requirements_peers.txt" in (folder / "uv").read_text()
    (folder / "uv").unlink()
    run(folder, "--tests", path=commands)
    assert not (folder / "uv").exists()
    (folder / ".venv/anabranch-peers.txt").unlink()
    assert "tests that take those libraries are skipped" in run(folder, "--tests", path=commands, UV_EXIT="1")


def test_without_uv_pip_installs_and_says_so(whole):
    folder, commands = whole
    output = run(folder, path=commands, expect=1, PIP_EXIT="1")
    assert "pip cannot install uv==" in output and not (folder / "uv").exists()
    installed = (folder / "installed").read_text()
    assert "torch==" in installed and "uv==" not in installed


@pytest.mark.parametrize(
    ("version", "message"),
    [("2.8.1+cpu", "torch: existing 2.8.1"), ("2.7.1", "at least 2.8 is needed"), (None, "torch: wheel")],
)
def test_an_existing_python_with_torch(bare, tmp_path, version, message):
    folder, commands = bare
    packages = tmp_path / "site-packages"
    packages.mkdir()
    if version:
        (packages / "torch-0.dist-info").mkdir()
        (packages / "torch-0.dist-info/METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    # -S: no packages but these.
    python = executable(tmp_path / "python", f'#!/bin/bash\nPYTHONPATH={packages} exec {sys.executable} -S "$@"\n')
    assert message in run(folder, "--check", path=commands, expect=1, ANABRANCH_PYTHON=str(python))


def test_a_python_that_is_not_there(bare):
    folder, _ = bare
    output = run(folder, "--check", expect=1, ANABRANCH_PYTHON="/nowhere/python")
    assert "there is no '/nowhere/python'" in output


def test_help_and_unknown_arguments():
    assert "ANABRANCH_PYTHON" in run(ROOT, "--help")
    assert "unknown argument '--froce'" in run(ROOT, "--froce", expect=1)
