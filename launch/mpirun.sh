#!/usr/bin/env bash
# Usage: launch/mpirun.sh -n RANKS [OPTIONS] [--] PROGRAM [ARGUMENTS]
#
# Runs PROGRAM on MPI ranks, each bound to a GPU, to a share of the cores of that GPU's NUMA node and
# to the nearest network adapter (anabranch-bind). Sets up and builds nothing.
#
#   -n RANKS                ranks, over all hosts
#   --hosts A:4,B:4         hosts and their slots (default: this machine)
#   --hostfile FILE         the same from a file, in mpirun's format
#   --no-bind               leave the ranks to the operating system
#   --mpirun-flags "FLAGS"  further flags of mpirun
#   --help                  this text
#
# INT and TERM reach the ranks, which may save and leave; the exit code is mpirun's. Hosts need this
# folder at the same path, and ssh without a password. OMP_NUM_THREADS, unless it is set, becomes the
# number of cores a rank is bound to. launch/README.md has the rest.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

ranks=
bind=true
extra_mpirun_flags=()
while (($#)); do
  case $1 in
    --hosts=* | --hostfile=* | --mpirun-flags=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    -n | --hosts | --hostfile | --mpirun-flags)
      (($# > 1)) || die "$1 needs a value (try --help)"
      case $1 in
        -n) ranks=$2 ;;
        --hosts) extra_mpirun_flags+=(--host "$2") ;;
        --hostfile) extra_mpirun_flags+=(--hostfile "$2") ;;
        --mpirun-flags)
          read -ra words <<<"$2"
          extra_mpirun_flags+=("${words[@]}")
          ;;
      esac
      shift
      ;;
    --no-bind) bind=false ;;
    -h | --help)
      print_header_of "$0"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    -*) die "unknown option '$1' (try --help; options of the program go after it)" ;;
    *) break ;;
  esac
  shift
done
[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "-n must be a number of ranks, got '$ranks'"
(($#)) || die "no program (try --help)"
command -v mpirun >/dev/null || die "there is no mpirun: load a module, or run launch/setup.sh"

prepare_mpirun "$ranks" "$(cores)"
rank_command=("${rank_prefix[@]}")
if $bind; then prepare_rank_command release; fi
exit_code=0
run_ranks -n "$ranks" "${mpirun_flags[@]}" "${extra_mpirun_flags[@]}" "${rank_command[@]}" "$@"
exit "$exit_code"
