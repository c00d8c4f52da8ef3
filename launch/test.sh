#!/usr/bin/env bash
# Usage: launch/test.sh [--preset NAME] [--slurm] [CTest's arguments]
#
# Sets up, builds everything, and runs every test on 1, 2, 3 and 4 ranks; prints what a failing test
# printed, and ends with CTest's summary. Fails when a test does.
#
#   --preset NAME   a preset of CMakePresets.json: release (default), debug, asan, tsan, cuda
#   --slurm         set up Slurm and munge as well, for the tests of jobs (setup.sh; the default where no
#                   systemd runs, as in a container)
#   --help          this text
#
# What else is given goes to CTest:
#   launch/test.sh -R exchange        tests whose name matches
#   launch/test.sh -L np2             tests on 2 ranks
#   launch/test.sh -N                 only lists them
#   launch/test.sh --preset asan      under AddressSanitizer and UndefinedBehaviorSanitizer
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

preset=release
setup_arguments=(--tests)
if [[ ! -d /run/systemd/system ]]; then setup_arguments+=(--slurm); fi
ctest_arguments=()
while (($#)); do
  case $1 in
    -h | --help)
      print_header_of "$0"
      exit 0
      ;;
    --preset)
      (($# > 1)) || die "--preset needs a name (try --help)"
      preset=$2
      shift
      ;;
    --preset=*) preset=${1#*=} ;;
    --slurm) setup_arguments=(--tests --slurm) ;;
    *) ctest_arguments+=("$1") ;;
  esac
  shift
done

"$project_root/launch/setup.sh" "${setup_arguments[@]}"
build "$preset"

say "Testing"
cd "$project_root"
# One more than cores: where ranks wait, for each other or for a deadline, another test goes on.
exec "$venv/bin/ctest" --preset "$preset" --parallel "$(($(cores) + 1))" --no-tests=error \
  "${ctest_arguments[@]}"
