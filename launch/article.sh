#!/usr/bin/env bash
# Usage: launch/article.sh [--no-build] [the experiment's options]
#
# The article's experiment: every engine of the library, the baselines it is compared with, a plain PyTorch
# layer, and peers if asked for, on the article's grid, each right in output and every gradient before it is
# timed. Sets up, builds, measures; ends with tables, plots and a report. Without a GPU it runs a small grid on
# the CPU, and says so.
#
#   --no-build   uses what is built in build/ and .venv, or else the Python in ANABRANCH_PYTHON or python3
#   --help       this text, and all options
#
#   launch/article.sh                                      # everything there is time for; again: the rest
#   launch/article.sh --budget 5 --types bf16              # what fits 5 minutes, cheapest cases first
#   launch/article.sh --cases '16,1024,512,8,*' --peers    # some cases, beside other libraries
#   launch/article.sh --memory-limit 16GiB                 # who survives on the article's GPU
#   launch/article.sh --sanitize                           # the engines under compute-sanitizer
#   launch/article.sh --sanitize --peers --methods 'MegaBlocks sparse'    # another library's kernels
#   launch/article.sh --report-only --publish              # docs/article.md from what has been measured
#   launch/article.sh --continue benchmarks/results/article # what the published report lacks
#
# Everything is kept in DIR (--output, runs/article): rows.jsonl as it comes, article.csv, article.json,
# article.md and its plots. The same command goes on where an earlier one ended; nothing is measured twice.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

build_first=true
arguments=()
for argument in "$@"; do
  case $argument in
    --no-build | --report-only) build_first=false ;;&
    --no-build) ;;
    -h | --help)
      print_header_of "$0"
      printf '\n'
      build_first=false
      arguments+=(--help)
      ;;
    *) arguments+=("$argument") ;;
  esac
done

preset=$(measuring_preset python)

if $build_first; then
  "$project_root/launch/setup.sh"
  build "$preset" anabranch_operators anabranch_baselines_module
  say "Measuring"
fi

python=$venv/bin/python
if [[ ! -x $python ]]; then python=${ANABRANCH_PYTHON:-python3}; fi
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$project_root/experiments:$project_root/build/$preset/python"
exec "$python" -m article "${arguments[@]}"
