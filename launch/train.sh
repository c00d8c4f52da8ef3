#!/usr/bin/env bash
# Usage: launch/train.sh [-n RANKS] [--data FILE] [--output DIR] [the example's options]
#
# Sets up, builds, and trains the language model of examples/train_lm on MPI ranks of this machine,
# each rank owning a part of the experts. Ends with plots, a checkpoint and a sample of its text.
#
#   -n RANKS                MPI ranks (default: 2)
#   --data FILE             text to train on, any file (default: the King James Bible, as Debian's
#                           command `bible` prints it)
#   --output DIR            where everything goes (default: runs/train_lm)
#   --device cuda           on this machine's GPUs, one for each rank (several ranks on one need NCCL
#                           2.30.3 and NCCL_MULTI_RANK_GPU_ENABLE=1); builds with CUDA, needs nvcc. Where no GPU
#                           is to be seen, and nothing is built yet, nothing of CUDA is built
#   --resume                continue the run in DIR, on any number of ranks
#   --steps N               optimizer steps
#   --batch-size N          sequences a step, over all ranks
#   --seed N                of parameters, batches and sample
#   --experts N, --top-k N  experts in every block, and how many of them a token goes to
#   --mpirun-flags "FLAGS"  further flags of mpirun, such as "--hostfile hosts"
#   --help                  this text, and all of the example's options
#
# DIR then holds metrics.jsonl, TensorBoard's events, report.html, loss.png, load.png, speed.png, sample.txt
# and checkpoint/ (safetensors).
# Ctrl-C, SIGINT and SIGTERM end the run after the current step with a checkpoint, for --resume.
# OMP_NUM_THREADS, unless it is set, becomes the cores that each rank can have.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

preset=
ranks=2
data=
output=$project_root/runs/train_lm
extra_mpirun_flags=()
show_help=false
program_arguments=()

while (($#)); do
  case $1 in
    --data=* | --output=* | --mpirun-flags=* | --device=*)
      set -- "${1%%=*}" "${1#*=}" "${@:2}"
      continue
      ;;
    -n | --data | --output | --mpirun-flags | --device)
      (($# > 1)) || die "$1 needs a value (try --help)"
      case $1 in
        -n) ranks=$2 ;;
        --data) data=$2 ;;
        --output) output=$2 ;;
        --mpirun-flags) read -ra extra_mpirun_flags <<<"$2" ;;
        --device)
          program_arguments+=(--device "$2")
          if [[ $2 == cuda ]]; then preset=cuda; fi
          ;;
      esac
      shift
      ;;
    -h | --help) show_help=true ;;
    *) program_arguments+=("$1") ;;
  esac
  shift
done

preset=${preset:-$(training_preset)}
readonly program=$project_root/build/$preset/examples/train_lm

if $show_help; then
  print_header_of "$0"
  printf '\nThe example, %s:\n\n' "${program#"$project_root"/}"
  if [[ -x $program ]]; then
    "$program" --help
  else
    printf 'not built yet; launch/train.sh builds it, and then shows its options here.\n'
  fi
  exit 0
fi

[[ $ranks =~ ^[1-9][0-9]*$ ]] || die "-n must be a number of ranks, got '$ranks'"
if [[ -n $data && ! -r $data ]]; then die "--data: cannot read '$data'"; fi

# Prints the King James text, once, into build/data, and makes it the data.
use_king_james() {
  data=$project_root/build/data/king_james.txt
  if [[ -s $data ]]; then return; fi
  command -v bible >/dev/null ||
    die "no text: give one with --data FILE, or install Debian's package bible-kjv"
  mkdir -p "$(dirname "$data")"
  bible -f gen1:1-rev22:21 >"$data.partial"
  mv "$data.partial" "$data"
}

"$project_root/launch/setup.sh"
build "$preset" train_lm

if [[ -z $data ]]; then use_king_james; fi
mkdir -p "$output"

threads=${OMP_NUM_THREADS:-$(($(cores) / ranks))}
if ((threads < 1)); then threads=1; fi
export OMP_NUM_THREADS=$threads
prepare_mpirun "$ranks" "$(cores)"
# The ranks write to mpirun and cannot see where it goes: a terminal gets a bar, a file gets lines.
style=lines
if [[ -t 1 ]]; then style=bar; fi

say "Training on $ranks ranks with $threads threads each"
exit_code=0
run_ranks -n "$ranks" "${mpirun_flags[@]}" "${extra_mpirun_flags[@]}" \
  "${rank_prefix[@]}" "$program" --progress "$style" --data "$data" --output "$output" "${program_arguments[@]}"

if [[ $exit_code =~ ^(0|130|143)$ && -s $output/metrics.jsonl ]]; then
  say "Plotting"
  "$venv/bin/python" "$project_root/launch/plot.py" "$output" || exit_code=$((exit_code ? exit_code : 1))
fi
case $exit_code in
  0) say "Done" ;;
  130 | 143) say "Interrupted; the same command with --resume continues" ;;
  *)
    warn "training ended with exit code $exit_code"
    exit "$exit_code"
    ;;
esac
for name in report.html metrics.jsonl loss.png load.png speed.png sample.txt checkpoint; do
  if [[ -e $output/$name ]]; then note "$output/$name"; fi
done
exit "$exit_code"
