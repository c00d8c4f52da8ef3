#!/usr/bin/env bash
# Usage: launch/torchrun.sh -n RANKS [OPTIONS] [--] PROGRAM [ARGUMENTS]
#
# Runs PROGRAM, a Python script or any executable, on RANKS ranks of every node by torchrun, each bound
# to a GPU, to a share of the cores of that GPU's NUMA node and to the nearest network adapter
# (anabranch-bind). Sets up and builds nothing.
#
#   -n RANKS                  ranks on this node
#   --nodes N                 nodes (default: Slurm's in a job, else 1)
#   --master HOST[:PORT]      where the nodes meet (default: the first node of the Slurm job, and a port of
#                             the job's own)
#   --no-bind                 leave the ranks to the operating system
#   --torchrun-flags "FLAGS"  further flags of torchrun, such as "--max-restarts 3"
#   --help                    this text
#
# Several nodes: start it once on each, as `srun --ntasks-per-node=1 launch/torchrun.sh -n 8 train.py`
# does. The program finds its communicator in torch.distributed, not in MPI.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

ranks=
nodes=${SLURM_JOB_NUM_NODES:-1}
master=
bind=true
torchrun_flags=()
while (($#)); do
  case $1 in
    --nodes=* | --master=* | --torchrun-flags=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    -n | --nodes | --master | --torchrun-flags)
      (($# > 1)) || die "$1 needs a value (try --help)"
      case $1 in
        -n) ranks=$2 ;;
        --nodes) nodes=$2 ;;
        --master) master=$2 ;;
        --torchrun-flags) read -ra torchrun_flags <<<"$2" ;;
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
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes must be a number of nodes, got '$nodes'"
(($#)) || die "no program (try --help)"
[[ -x $venv/bin/python ]] || die "there is no .venv: run launch/setup.sh"

if [[ -z $master && -n ${SLURM_JOB_NODELIST:-} ]]; then
  # Not through `head`, which may leave before scontrol has written all: that would end this script.
  master=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  master=${master%%$'\n'*}
fi
if ((nodes > 1)); then
  [[ -n $master ]] || die "--master: where do the $nodes nodes meet?"
  [[ $master == *:* ]] || master=$master:$((20000 + ${SLURM_JOB_ID:-9500} % 10000))
  torchrun_flags+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$master"
    --rdzv-id "${SLURM_JOB_ID:-anabranch}")
else
  torchrun_flags+=(--standalone)
fi

rank_command=("${rank_prefix[@]}")
if $bind; then prepare_rank_command release; fi
if [[ $1 == *.py ]]; then rank_command+=("$venv/bin/python"); fi
exec "$venv/bin/python" -m torch.distributed.run --nproc-per-node "$ranks" "${torchrun_flags[@]}" \
  --no-python "${rank_command[@]}" "$@"
