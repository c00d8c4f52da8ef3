#!/usr/bin/env bash
# Usage: launch/setup.sh [--check] [--tests] [--slurm] [--help]
#
# Gives this machine what anabranch builds and runs with, says what it does, and does nothing twice:
#
#   system   a C++20 compiler, OpenMPI, GoogleTest and some headers: Debian's packages, installed as
#            root or through a sudo that asks no password
#   python   .venv in the project's folder, with the packages pinned in launch/requirements.txt:
#            torch (its wheel is LibTorch), CMake, Ninja, and what plots and tests
#
# --check    installs nothing: says what is there and what is missing; fails when something is
# --tests    also what tests alone use: a browser, doxygen, abidiff, tc, and the libraries that tests run ours in
#            (launch/requirements_peers.txt)
# --slurm    also Slurm and munge, for the tests of jobs; their services stay off, now and after a reboot
#
# Without root it names what is missing and how to provide it on a cluster.
#
# Environment:
#   ANABRANCH_PYTHON   the Python to build .venv on (default: python3). When it already has a torch
#                      of at least version 2.8, that torch is used and none is downloaded.
#   CXX                the C++ compiler (default: c++)
#   CMAKE_PREFIX_PATH  further places of libraries, separated by colons
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

readonly minimal_torch=2.8
readonly stamp=$venv/anabranch-setup.txt
readonly requirements=$project_root/launch/requirements.txt
readonly peers=$project_root/launch/requirements_peers.txt
readonly peers_stamp=$venv/anabranch-peers.txt

check_only=false
with_tests=false
with_slurm=false
for argument in "$@"; do
  case $argument in
    --check) check_only=true ;;
    --tests) with_tests=true ;;
    --slurm) with_slurm=true ;;
    -h | --help)
      print_header_of "$0"
      exit 0
      ;;
    *) die "setup.sh: unknown argument '$argument' (try --help)" ;;
  esac
done

if [[ -n ${ANABRANCH_PYTHON:-} ]] && ! command -v -- "$ANABRANCH_PYTHON" >/dev/null; then
  die "ANABRANCH_PYTHON: there is no '$ANABRANCH_PYTHON'"
fi

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

has_venv() { "${ANABRANCH_PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null; }

has_mpi() { has_command mpirun && has_command mpicxx; }

has_slurm() { has_command slurmctld && has_command slurmd && has_command munged; }

# One line each: what | is it there? | Debian's packages | required or optional | without root
system_needs=(
  "C++20 compiler (g++ 12 or newer)|has_cxx20|g++|required|module load gcc, or CXX=/path/to/g++"
  "MPI (mpicxx, mpirun)|has_mpi|openmpi-bin libopenmpi-dev|required|module load openmpi"
  "GoogleTest|has_header gtest/gtest.h|libgtest-dev libgmock-dev|required|install it under a prefix, and name that in CMAKE_PREFIX_PATH"
  "JSON for Modern C++|has_header nlohmann/json.hpp|nlohmann-json3-dev|required|a header: put nlohmann/json.hpp under a prefix in CMAKE_PREFIX_PATH"
  "zlib|has_header zlib.h|zlib1g-dev|required|a header and a library: put them under a prefix in CMAKE_PREFIX_PATH"
  "CLI11|has_header CLI/CLI.hpp|libcli11-dev|required|headers: put CLI/*.hpp under a prefix in CMAKE_PREFIX_PATH"
  "Python's venv module|has_venv|python3 python3-venv|required|module load python, or ANABRANCH_PYTHON=/path/to/python3"
  "ccache|has_command ccache|ccache|optional|without it a second clean build takes as long as the first"
  "hwloc|has_header hwloc.h|libhwloc-dev|optional|without it ranks are not bound to GPUs and cores"
  "King James text (bible)|has_command bible|bible-kjv|optional|without it launch/train.sh needs --data FILE"
)
# Only where it is asked for: a newcomer's first run does not wait for it.
if $with_tests; then
  system_needs+=(
    "iproute2, for tests|has_command tc|iproute2|optional|without it the tests over several hosts are skipped"
    "doxygen|has_command doxygen|doxygen|optional|without it the documentation site is not built"
    "Chromium, for tests|has_command chromium|chromium fonts-liberation|optional|without it nobody looks at pages as a browser shows them"
    "abidiff, for releases|has_command abidiff|abigail-tools|optional|without it tools/release compares no binary interfaces"
  )
fi
# Only where it is asked for: it brings services and a user.
if $with_slurm; then
  system_needs+=(
    "Slurm's daemons and munge, for tests|has_slurm|slurm-wlm munge|optional|without them the tests of jobs under Slurm are skipped"
  )
fi

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

# Installs PACKAGES and starts no service of theirs: Debian's scripts ask policy-rc.d first. One that is
# there already is the administrator's, and stays.
install_packages() (
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    trap 'as_root rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null && as_root chmod +x "$policy" || exit
  fi
  as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
    -o Dpkg::Use-Pty=0 "$@" >/dev/null
)

say "System"
find_missing
if ((${#packages[@]})) && ! $check_only && can_install; then
  note "installing ${packages[*]}"
  as_root apt-get -qq update || warn "apt-get update failed; trying with the package lists there are"
  install_packages "${packages[@]}" || warn "apt-get could not install everything"
  if [[ ${packages[*]} == *slurm-wlm* && -d /run/systemd/system ]]; then
    as_root systemctl --quiet disable munge slurmctld slurmd || warn "systemctl could not disable Slurm's services"
  fi
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

# Prints PYTHON's version of torch without importing it (an import takes seconds); fails if none.
torch_version_of() {
  "$1" -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null
}

# Whether version $1 is at least version $2.
at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

# Whether .venv is complete and on the Python that was asked for, if one was. The stamp has that
# Python on its first line, and below it the requirements as they were.
environment_is_whole() {
  [[ -f $stamp ]] &&
    { [[ -z ${ANABRANCH_PYTHON:-} ]] || [[ $(head -n 1 "$stamp") == "$python" ]]; } &&
    "$venv/bin/cmake" --version >/dev/null 2>&1 &&
    "$venv/bin/ninja" --version >/dev/null 2>&1 &&
    torch_version_of "$venv/bin/python" >/dev/null
}

environment_is_ready() {
  environment_is_whole && [[ $(tail -n +2 "$stamp") == "$(<"$requirements")" ]]
}

# Lets .venv see the packages of PYTHON behind its own: also when that is a virtual environment.
see_packages_of() {
  local site
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$1" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
    >"$site/existing-torch.pth"
}

# What pip has been told, by its files or variables, under NAME.
pip_setting() {
  "$venv/bin/python" -m pip config list 2>/dev/null | sed -n "s/^.*\.$1='\(.*\)'\$/\1/p" | tail -n 1
}

# uv reads neither: it is told the same, unless it has been told something itself. It compiles what it installs, as pip
# does by itself, so that no rank does it as it starts (torch: seconds, and again each time where none may write it).
tell_uv_what_pip_knows() {
  uv_flags=(--compile-bytecode)
  local variable name value
  while read -r variable name; do
    value=$(pip_setting "$name")
    if [[ $name == find-links ]]; then value=${value// /,}; fi
    if [[ -n $value && -z ${!variable:-} ]]; then export "$variable=$value"; fi
  done <<'END'
UV_DEFAULT_INDEX index-url
UV_INDEX extra-index-url
UV_FIND_LINKS find-links
UV_INSECURE_HOST trusted-host
SSL_CERT_FILE cert
END
  if [[ $(pip_setting no-index) =~ ^(1|true|yes|on)$ ]]; then uv_flags+=(--no-index); fi
}

# Installs what launch/requirements.txt pins; beside an existing torch, all but torch, which nothing then asks for.
# uv does it, which fetches and unpacks packages side by side: half a minute for torch's gigabytes, for which pip
# takes three. Both show bars on a terminal.
install_requirements() {
  local pip=("$venv/bin/python" -m pip install --disable-pip-version-check) uv skip='^$'
  uv=$(grep '^uv==' "$requirements")
  if compgen -G "$venv/lib/python*/site-packages/existing-torch.pth" >/dev/null; then skip='^torch=='; fi
  if "${pip[@]}" --quiet "$uv"; then
    tell_uv_what_pip_knows
    if [[ $skip == '^torch==' ]]; then
      echo torch >"$venv/existing-torch.txt"
      uv_flags+=(--excludes "$venv/existing-torch.txt")
    fi
    grep -v -e "$skip" "$requirements" |
      "$venv/bin/python" -m uv pip install --python "$venv/bin/python" "${uv_flags[@]}" --requirement -
  else
    warn "pip cannot install $uv; it installs the rest by itself, which takes longer"
    grep -v -e "$skip" -e '^uv==' "$requirements" | "${pip[@]}" --requirement /dev/stdin
  fi
}

# What is installed beside all else, whose dependencies are there or not asked for. Tests of what is missing are skipped.
install_peers() {
  tell_uv_what_pip_knows
  if "$venv/bin/python" -m uv pip install --python "$venv/bin/python" "${uv_flags[@]}" --no-deps --requirement "$peers"; then
    cat -- "$peers" >"$peers_stamp"
  else
    warn "could not install launch/requirements_peers.txt: tests that take those libraries are skipped"
  fi
}

describe_result() {
  note "ready: torch $(torch_version_of "$venv/bin/python"), $("$venv/bin/cmake" --version | head -n 1)"
}

say "Python environment"
python=$(command -v -- "${ANABRANCH_PYTHON:-python3}") ||
  die "there is no python3: load a module, or set ANABRANCH_PYTHON"
# .venv cannot be built on itself, where it is the active one: on what it was built on, then.
if [[ $("$python" -c 'import sys; print(sys.prefix)') == "$venv" ]]; then
  unset ANABRANCH_PYTHON
  python=$("$python" -c 'import os, sys; print(os.path.join(sys.base_prefix, "bin", "python3"))')
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "$python is $("$python" --version); 3.10 or newer is needed: load a module, or set ANABRANCH_PYTHON"

torch_source=wheel
if [[ -n ${ANABRANCH_PYTHON:-} ]] && existing=$(torch_version_of "$python"); then
  if at_least "$existing" "$minimal_torch"; then
    torch_source="existing $existing"
  else
    warn "$python has torch $existing; at least $minimal_torch is needed: installing another"
  fi
fi

if environment_is_ready; then
  describe_result
elif $check_only; then
  note "missing or not up to date: launch/setup.sh makes it (python: $python, torch: $torch_source)"
  required_missing=true
else
  if environment_is_whole; then
    note "updating .venv to what is pinned now"
    python=$(head -n 1 "$stamp")
  else
    note "making .venv (python: $python, torch: $torch_source)"
    # Without a stamp until it is complete: what an interruption leaves behind is made anew.
    "$python" -m venv --clear "$venv" ||
      die "$python cannot make a virtual environment (Debian: apt-get install python3-venv)"
    if [[ $torch_source == existing* ]]; then see_packages_of "$python"; fi
  fi
  note "installing launch/requirements.txt (with torch's wheel: about 5 GB)"
  install_requirements ||
    die "could not install launch/requirements.txt. Without a network, set ANABRANCH_PYTHON to a" \
      "Python that has torch, and PIP_NO_INDEX=1 and PIP_FIND_LINKS to a folder of the other wheels."
  printf '%s\n' "$python" "$(<"$requirements")" >"$stamp"
  rm -f -- "$peers_stamp"
  describe_result
fi

if $with_tests && ! $check_only && [[ $(cat -- "$peers_stamp" 2>/dev/null) != "$(<"$peers")" ]]; then
  note "installing launch/requirements_peers.txt (75 MB)"
  install_peers
fi

if $check_only && $required_missing; then
  die "something required is missing (see above)"
fi
