#!/usr/bin/env bash
# Usage: launch/setup.sh [--check] [--help]
#
# Gives this machine what anabranch builds and runs with, says what it does, and does nothing twice:
#
#   system   a C++20 compiler, OpenMPI, GoogleTest and some headers: Debian's packages, installed as
#            root or through a sudo that asks no password
#   python   .venv in the project's folder, with the packages pinned in launch/requirements.txt:
#            torch (its wheel is LibTorch), CMake, Ninja, and what plots and tests
#
# --check    installs nothing: says what is there and what is missing; fails when something is
#
# Without root it names what is missing and how to provide it on a cluster.
#
# Environment:
#   ANABRANCH_PYTHON   the Python to build .venv on (default: python3). When it already has a torch
#                      of at least version 2.6, that torch is used and none is downloaded.
#   CXX                the C++ compiler (default: c++)
#   CMAKE_PREFIX_PATH  further places of libraries, separated by colons
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

readonly minimal_torch=2.6
readonly stamp=$venv/anabranch-setup.txt
readonly requirements=$project_root/launch/requirements.txt

check_only=false
for argument in "$@"; do
  case $argument in
    --check) check_only=true ;;
    -h | --help)
      print_header_of "$0"
      exit 0
      ;;
    *) die "setup.sh: unknown argument '$argument' (try --help)" ;;
  esac
done

# --- system -------------------------------------------------------------------------------------

has_command() { command -v "$1" >/dev/null; }

# Whether the C++ compiler finds HEADER, in its own paths or under CMAKE_PREFIX_PATH.
has_header() {
  local include_flags=() prefixes prefix
  IFS=: read -ra prefixes <<<"${CMAKE_PREFIX_PATH:-}"
  for prefix in "${prefixes[@]}"; do include_flags+=("-I$prefix/include"); done
  printf '#if !__has_include(<%s>)\n#error missing\n#endif\n' "$1" |
    "${CXX:-c++}" "${include_flags[@]}" -E -x c++ - >/dev/null 2>&1
}

has_cxx20() {
  printf '#include <version>\n#if !defined(__cpp_lib_span) || !defined(__cpp_concepts)\n#error old\n#endif\n' |
    "${CXX:-c++}" -std=c++20 -E -x c++ - >/dev/null 2>&1
}

has_mpi() { has_command mpirun && has_command mpicxx; }

# One line each: what | is it there? | Debian's packages | required or optional | without root
readonly system_needs=(
  "C++20 compiler (g++ 12 or newer)|has_cxx20|g++|required|module load gcc, or CXX=/path/to/g++"
  "MPI (mpicxx, mpirun)|has_mpi|openmpi-bin libopenmpi-dev|required|module load openmpi"
  "GoogleTest|has_header gtest/gtest.h|libgtest-dev libgmock-dev|required|install it under a prefix, and name that in CMAKE_PREFIX_PATH"
  "JSON for Modern C++|has_header nlohmann/json.hpp|nlohmann-json3-dev|required|a header: put nlohmann/json.hpp under a prefix in CMAKE_PREFIX_PATH"
  "zlib|has_header zlib.h|zlib1g-dev|required|a header and a library: put them under a prefix in CMAKE_PREFIX_PATH"
  "CLI11|has_header CLI/CLI.hpp|libcli11-dev|required|headers: put CLI/*.hpp under a prefix in CMAKE_PREFIX_PATH"
  "Google Benchmark|has_header benchmark/benchmark.h|libbenchmark-dev|optional|without it no benchmarks are built"
  "ccache|has_command ccache|ccache|optional|without it a second clean build takes as long as the first"
  "King James text (bible)|has_command bible|bible-kjv|optional|without it launch/train.sh needs --data FILE"
)

packages=()
missing_lines=()
required_missing=false
find_missing() {
  packages=()
  missing_lines=()
  required_missing=false
  local need what probe debian kind remedy
  for need in "${system_needs[@]}"; do
    IFS='|' read -r what probe debian kind remedy <<<"$need"
    # The probe is a function of this file and its argument.
    # shellcheck disable=SC2086
    if $probe; then continue; fi
    local names
    read -ra names <<<"$debian"
    packages+=("${names[@]}")
    missing_lines+=("$(printf '%-34s %s; Debian: %s; or: %s' "$what" "$kind" "$debian" "$remedy")")
    if [[ $kind == required ]]; then required_missing=true; fi
  done
}

as_root() {
  if [[ $(id -u) -eq 0 ]]; then "$@"; else sudo -n -- "$@"; fi
}

can_install() {
  has_command apt-get && { [[ $(id -u) -eq 0 ]] || sudo -n true 2>/dev/null; }
}

say "System"
find_missing
if ((${#packages[@]})) && ! $check_only && can_install; then
  note "installing ${packages[*]}"
  as_root apt-get -qq update || warn "apt-get update failed; trying with the package lists there are"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
    -o Dpkg::Use-Pty=0 "${packages[@]}" >/dev/null || warn "apt-get could not install everything"
  hash -r
  find_missing
fi
if ((${#missing_lines[@]})); then
  note "missing, and not installed here (installing needs Debian, and root or sudo):"
  for line in "${missing_lines[@]}"; do note "  $line"; done
  note "as root:  apt-get install ${packages[*]}"
else
  note "everything is there"
fi
if $required_missing && ! $check_only; then
  die "required parts of the system are missing (see above)"
fi

# --- python -------------------------------------------------------------------------------------

# Prints PYTHON's torch version without importing it (an import takes seconds); fails if none.
torch_version_of() {
  "$1" - 2>/dev/null <<'PYTHON'
import importlib.metadata
print(importlib.metadata.version("torch").split("+")[0])
PYTHON
}

# Whether version $1 is at least version $2.
at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

# What the environment was made from. A change of any of it makes it anew.
describe_environment() {
  printf 'python %s\ntorch %s\n' "$1" "$2"
  cat "$requirements"
}

environment_is_ready() {
  [[ -f $stamp ]] && [[ $(<"$stamp") == "$1" ]] &&
    "$venv/bin/cmake" --version >/dev/null 2>&1 &&
    "$venv/bin/ninja" --version >/dev/null 2>&1 &&
    torch_version_of "$venv/bin/python" >/dev/null
}

say "Python environment"
base_python=$(command -v "${ANABRANCH_PYTHON:-python3}") ||
  die "no Python at '${ANABRANCH_PYTHON:-python3}': load a module, or set ANABRANCH_PYTHON"
# An activated .venv must not be built upon itself.
base_python=$("$base_python" -c 'import os, sys; print(os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix or os.environ.get("ANABRANCH_PYTHON") else os.path.join(sys.base_prefix, "bin", "python3"))')

torch_source=wheel
if [[ -n ${ANABRANCH_PYTHON:-} ]] && existing_torch=$(torch_version_of "$base_python"); then
  if at_least "$existing_torch" "$minimal_torch"; then
    torch_source="existing $existing_torch"
  else
    warn "$base_python has torch $existing_torch; at least $minimal_torch is needed: installing another"
  fi
fi
environment=$(describe_environment "$base_python" "$torch_source")

if environment_is_ready "$environment"; then
  note "ready: torch $(torch_version_of "$venv/bin/python"), $("$venv/bin/cmake" --version | head -n 1)"
elif $check_only; then
  note "missing or not up to date: launch/setup.sh makes it (torch: $torch_source)"
  required_missing=true
else
  venv_flags=()
  wanted=$requirements
  note "making .venv on $base_python (torch: $torch_source)"
  rm -f "$stamp"
  if [[ $torch_source != wheel ]]; then
    venv_flags+=(--system-site-packages)
    wanted=$(mktemp)
    trap 'rm -f "$wanted"' EXIT
    grep -v '^torch==' "$requirements" >"$wanted"
  fi
  "$base_python" -m venv --clear "${venv_flags[@]}" "$venv" ||
    die "$base_python cannot make a virtual environment (Debian: apt-get install python3-venv)"
  note "installing launch/requirements.txt (the first time: about 5 GB, a minute or more)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
    --requirement "$wanted" ||
    die "pip could not install launch/requirements.txt. Without a network: set ANABRANCH_PYTHON to a" \
      "Python that has torch, and pip's PIP_FIND_LINKS and PIP_NO_INDEX to a folder of the other wheels."
  printf '%s\n' "$environment" >"$stamp"
  note "ready: torch $(torch_version_of "$venv/bin/python"), $("$venv/bin/cmake" --version | head -n 1)"
fi

if $check_only && $required_missing; then
  die "something required is missing (see above)"
fi
