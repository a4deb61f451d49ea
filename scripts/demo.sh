#!/usr/bin/env bash
# Trains a small MoE GPT on two processes of this machine, once for each path, and compares them.
# A GPU is not needed. Takes a few minutes, most of the first time for the installation.
#   bash scripts/demo.sh [key=value ...]      for example train.steps=300
set -euo pipefail
for key in "$@"; do
  case $key in
    moe.path=* | run.name=* | run.dir=*)
      echo "error: $key is set here for each run; leave it out" >&2
      exit 2
      ;;
  esac
done
source "$(dirname "$0")/setup.sh" requirements.txt

# Each process gets its share of the cores; more threads than cores slow each other down.
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=$((cores > 2 ? cores / 2 : 1))

folder=runs/demo-$(date +%Y%m%d-%H%M%S)
paths=$(python -c 'from models.config import PATH_NAMES; print(*PATH_NAMES)')
runs=()
for path in $paths; do
  echo
  echo "=== moe.path=$path"
  torchrun --standalone --nproc-per-node 2 -m train configs/demo_cpu.yaml \
    train.device=cpu moe.path="$path" run.name="$path" run.dir="$folder" "$@"
  runs+=("$folder/$path")
done
echo
python -m scripts.compare "${runs[@]}" --out "$folder/compare"
