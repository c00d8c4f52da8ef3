#!/usr/bin/env bash
# Usage: launch/benchmark.sh [options] [NAME...]
#
# Measures the library beside what one would use instead, on this machine's GPUs, or on its CPU where
# there is none. Sets up, builds, measures; ends with tables. A few minutes on a GPU.
#
#   NAME            what to measure; default: all that can be measured here, of
#                     gpu_layer gpu_layer_python (as Python calls it, beside other libraries that are installed)
#                     gpu_grouped_gemm gpu_kernels gpu_exchange gpu_expert_parallel (from 2 GPUs on)
#                   and, if it is named: gpu_training (train_lm beside transformers: a GPU with 141 GB)
#                     gpu_learning_curves (train_lm in fp32, bf16, resumed, with Muon)
#                     gpu_training_ranks (train_lm on 1, 2, 4, ... GPUs) gpu_balance (skewed load; from 2 GPUs on)
#                     cpu_layer cpu_grouped_gemm (where there is no GPU)
#   --output DIR    where NAME.json, or NAME_RANKS.json, and performance.md go (default: runs/benchmark)
#   --quick         a few cases of each, to see whether it runs
#   --no-build      with what is built in build/
#   --commit HASH   what to note as the commit of the sources (default: what git says)
#   --publish       benchmarks/results and docs/performance.md, too, from what was measured
#   --help          this text
#
# What fails is said at the end, and nothing else is lost by it.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

output=$project_root/runs/benchmark
commit=
build_first=true publish=false
flags=()
names=()
while (($#)); do
  case $1 in
    -h | --help)
      print_header_of "$0"
      exit 0
      ;;
    --output | --commit)
      (($# > 1)) || die "$1 needs a value (try --help)"
      if [[ $1 == --output ]]; then output=$2; else commit=$2; fi
      shift
      ;;
    --quick) flags=(--quick) ;;
    --no-build) build_first=false ;;
    --publish) publish=true ;;
    gpu_layer | gpu_layer_python | gpu_grouped_gemm | gpu_kernels | gpu_exchange | gpu_expert_parallel | \
      gpu_training | gpu_learning_curves | gpu_training_ranks | gpu_balance | cpu_layer | cpu_grouped_gemm)
      names+=("$1")
      ;;
    *) die "unknown argument '$1' (try --help)" ;;
  esac
  shift
done
if $publish && ((${#flags[@]})); then die "a few cases are not for publishing: --quick or --publish"; fi

preset=$(measuring_preset benchmarks)
gpus=0
if [[ $preset == cuda ]]; then gpus=$(gpus); fi
if ((${#names[@]} == 0)); then
  if ((gpus > 1)); then
    names=(gpu_layer gpu_layer_python gpu_grouped_gemm gpu_kernels gpu_exchange gpu_expert_parallel)
  elif ((gpus == 1)); then
    names=(gpu_layer gpu_layer_python gpu_grouped_gemm gpu_kernels)
  else
    names=(cpu_layer cpu_grouped_gemm)
  fi
fi
for name in "${names[@]}"; do
  if [[ $name == gpu_* ]] && ((gpus == 0)); then
    die "$name needs a GPU, and nvcc or a build with CUDA, which are not here"
  fi
done

if [[ -z $commit ]]; then
  commit=$(git -C "$project_root" rev-parse HEAD 2>/dev/null || echo unknown)
  if [[ -n $(git -C "$project_root" status --porcelain 2>/dev/null || true) ]]; then
    if $publish; then die "the sources have changed since commit $commit: commit, then measure"; fi
    commit+=-changed
  fi
fi

if $build_first; then
  "$project_root/launch/setup.sh"
  targets=()
  for name in "${names[@]}"; do
    case $name in
      gpu_layer_python | gpu_expert_parallel) targets+=(anabranch_operators) ;;
      gpu_training | gpu_learning_curves | gpu_training_ranks) targets+=(anabranch_operators train_lm) ;;
      gpu_balance) targets+=(benchmark_step) ;;
      *) targets+=("benchmark_$name") ;;
    esac
  done
  build "$preset" "${targets[@]}"
fi

mkdir -p "$output"
prepare_mpirun "$gpus" "$(cores)"
failed=()
results=()

python=$venv/bin/python
if [[ ! -x $python ]]; then python=${ANABRANCH_PYTHON:-python3}; fi

# measure NAME FILE COMMAND...: runs benchmark_NAME, or what Python measures by that name, by the command, which leaves
# FILE.json
measure() {
  local name=$1 file=$2
  local package=(env "PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$project_root/build/$preset/python")
  local program=("$project_root/build/$preset/benchmarks/benchmark_$name")
  case $name in
    gpu_layer_python) program=("${package[@]}" "$python" "$project_root/benchmarks/gpu/layer.py") ;;
    gpu_expert_parallel) program=("${package[@]}" "${@:3}" "$project_root/benchmarks/ranks/expert_parallel.py") ;;
    gpu_training | gpu_learning_curves)
      program=("${package[@]}" "$python" "$project_root/benchmarks/gpu/${name#gpu_}.py"
        --program "$project_root/build/$preset/examples/train_lm" "${@:3}")
      ;;
    gpu_training_ranks)
      program=("${package[@]}" "$python" "$project_root/benchmarks/ranks/training.py"
        --program "$project_root/build/$preset/examples/train_lm" "${@:3}")
      ;;
    gpu_balance)
      program=("$python" "$project_root/benchmarks/ranks/balance.py" --device cuda
        --program "$project_root/build/$preset/benchmarks/benchmark_step" "${@:3}")
      ;;
    *) program=("${@:3}" "${program[@]}") ;;
  esac
  local command=("${program[@]}" --commit "$commit" --json "$output/$file.json.new")
  if [[ $name == gpu_grouped_gemm ]]; then command+=(--engine all); fi
  command+=("${flags[@]}")
  say "Measuring $file"
  if "${command[@]}"; then
    mv "$output/$file.json.new" "$output/$file.json"
    results+=("$output/$file.json")
  else
    failed+=("$file")
  fi
}

# Prints the numbers of GPUs to measure on: 2, 4, 8, ... and all.
numbers_of_gpus() {
  local ranks
  for ((ranks = 2; ranks < 2 * gpus; ranks *= 2)); do echo $((ranks < gpus ? ranks : gpus)); done
}

for name in "${names[@]}"; do
  case $name in
    gpu_exchange)
      for ranks in $(numbers_of_gpus); do
        measure "$name" "${name}_$ranks" mpirun "${mpirun_flags[@]}" -n "$ranks"
      done
      ;;
    gpu_expert_parallel)
      for ranks in $(numbers_of_gpus); do
        measure "$name" "${name}_$ranks" "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks"
      done
      ;;
    gpu_learning_curves)
      find "$project_root"/{docs,src,include,tests} -type f -name '*.[mchp]*' | sort | xargs cat >"$output/text.txt"
      measure "$name" "$name" --data "$output/text.txt"
      ;;
    gpu_training_ranks) mapfile -t ranks < <(numbers_of_gpus) && measure "$name" "$name" --ranks 1 "${ranks[@]}" ;;
    gpu_balance)
      for ranks in $(numbers_of_gpus); do measure "$name" "${name}_$ranks" --ranks "$ranks"; done
      ;;
    *) measure "$name" "$name" ;;
  esac
done

"$python" "$project_root/benchmarks/report.py" --results "$output" --output "$output/performance.md"
note "$output/performance.md"
if ((${#failed[@]})); then die "failed: ${failed[*]}"; fi
if $publish; then
  cp "${results[@]}" "$project_root/benchmarks/results/"
  "$python" "$project_root/benchmarks/report.py"
  if [[ -e $project_root/benchmarks/results/gpu_layer.json ]]; then
    "$python" "$project_root/benchmarks/picture.py"
  fi
  note "$project_root/docs/performance.md"
fi
