# shellcheck shell=bash
# Sourced by the scripts of this folder: paths, messages, cores, and mpirun's flags.

project_root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$project_root/.venv
readonly project_root venv

# What this cluster needs, where its user has said so (launch/README.md).
# shellcheck disable=SC2034
rank_prefix=() site_mpirun_flags=() site_srun_flags=()
if [[ -r $project_root/launch/site.sh ]]; then
  # shellcheck source=/dev/null
  source "$project_root/launch/site.sh"
fi

say() { printf '\n==> %s\n' "$*"; }
note() { printf '    %s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# The comment block at the top of a script, without the #: its help text.
print_header_of() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

# Cores this process may use (a scheduler may have given fewer than the machine has).
cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

# GPUs that this process sees.
gpus() { nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true; }

# The preset to measure with: cuda where there is a GPU, and its compiler or FOLDER of a build with CUDA.
measuring_preset() {
  if (($(gpus) > 0)) && { command -v nvcc >/dev/null || [[ -d $project_root/build/cuda/$1 ]]; }; then
    echo cuda
  else
    echo release
  fi
}

# The preset to train with: of the build that is there, or cpu, which builds what training needs alone and without
# CUDA, where no GPU is to be seen.
training_preset() {
  if (($(gpus) > 0)) || [[ -x $project_root/build/release/examples/train_lm ]]; then echo release; else echo cpu; fi
}

# Jobs for a build: one per core, but no more than memory allows at about 2 GB a compiler.
build_jobs() {
  local jobs memory_kb by_memory
  jobs=$(cores)
  memory_kb=$(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo 2>/dev/null || true)
  if [[ -n $memory_kb ]]; then
    by_memory=$((memory_kb / 2000000))
    if ((by_memory < 1)); then by_memory=1; fi
    if ((by_memory < jobs)); then jobs=$by_memory; fi
  fi
  echo "$jobs"
}

# Configures PRESET and builds TARGETS of it (all when none is named). Configuring again is cheap
# and picks up a new source list; the build is quiet when there is nothing to do.
build() {
  local preset=$1
  shift
  local target_arguments=()
  if (($#)); then target_arguments=(--target "$@"); fi
  say "Building (preset $preset)"
  (
    cd "$project_root" || exit
    "$venv/bin/cmake" --preset "$preset" | sed 's/^/    /'
    "$venv/bin/cmake" --build --preset "$preset" --parallel "$(build_jobs)" "${target_arguments[@]}"
  )
}

# Prepares the environment for mpirun with RANKS ranks on CORES cores, and sets mpirun_flags.
# shellcheck disable=SC2034  # for who sources this
prepare_mpirun() {
  mpirun_flags=()
  local version
  version=$(mpirun --version 2>/dev/null || true)
  if [[ $version != *'Open MPI'* && $version != *OpenRTE* ]]; then return; fi
  # Ranks have threads, so they are not bound to one core each.
  mpirun_flags=(--oversubscribe --bind-to none)
  if [[ -n ${OMP_NUM_THREADS:-} ]]; then mpirun_flags+=(-x OMP_NUM_THREADS); fi
  mpirun_flags+=("${site_mpirun_flags[@]}")
  # As root, OpenMPI wants to be told twice; in a container root is the only user there is.
  if [[ $(id -u) -eq 0 ]]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
  # Reading each other's memory needs a right that containers withhold; copying through shared
  # memory does not.
  export OMPI_MCA_btl_vader_single_copy_mechanism=${OMPI_MCA_btl_vader_single_copy_mechanism:-none}
  # With more ranks than cores, who waits makes way.
  if (($1 > $2)); then export OMPI_MCA_mpi_yield_when_idle=1; fi
}

# Sets rank_command to what goes between a launcher and the program: the site's prefix, such as a
# container, and anabranch-bind where it is built.
# shellcheck disable=SC2034
prepare_rank_command() {
  local bind=$project_root/build/$1/tools/anabranch-bind
  rank_command=("${rank_prefix[@]}")
  if [[ -x $bind ]]; then
    rank_command+=("$bind")
  else
    warn "ranks are not bound: ${bind#"$project_root"/} is not built"
  fi
}

# Runs mpirun with ARGUMENTS, waits for it, and leaves its exit code in `exit_code`.
#
# mpirun answers a signal by killing its ranks within a second, too soon to save a checkpoint. So it
# gets none: it is in a session of its own, out of reach of the terminal's Ctrl-C, and the signal goes
# to the ranks on this machine, who agree to stop with all the others. A second signal is for mpirun.
# shellcheck disable=SC2034
run_ranks() {
  setsid mpirun "$@" </dev/null &
  mpirun_pid=$!
  interrupted=false
  trap 'interrupt INT' INT
  trap 'interrupt TERM' TERM HUP
  wait_for "$mpirun_pid"
  trap - INT TERM HUP
}

# Waits for PID, also through signals that are trapped, and leaves its exit code in `exit_code`.
# shellcheck disable=SC2034
wait_for() {
  local running=true
  while $running; do
    # A signal ends `wait` too, with a code of its own. Of a process that has ended, bash keeps the code.
    kill -0 "$1" 2>/dev/null || running=false
    exit_code=0
    wait "$1" || exit_code=$?
  done
}

# shellcheck disable=SC2317  # traps call it
interrupt() {
  if $interrupted; then
    kill -s TERM "$mpirun_pid" 2>/dev/null || true
    return
  fi
  interrupted=true
  local child started=()
  while read -r child; do
    # The others are ssh or srun, which hold the ranks of other machines.
    if grep -qz '^OMPI_COMM_WORLD_RANK=' "/proc/$child/environ" 2>/dev/null; then
      started+=("$child")
    fi
  done < <(cat /proc/"$mpirun_pid"/task/*/children 2>/dev/null | tr ' ' '\n')
  if ((${#started[@]})); then
    kill -s "$1" "${started[@]}" 2>/dev/null || true
  else
    # All ranks are elsewhere: mpirun passes this one signal on.
    kill -s USR1 "$mpirun_pid" 2>/dev/null || true
  fi
}
