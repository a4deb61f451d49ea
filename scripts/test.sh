#!/usr/bin/env bash
# Checks everything that needs no GPU; on a machine with one, the tests marked gpu as well.
#   bash scripts/test.sh [pytest arguments]   for example -k dispatch; -m "not slow" for the quick ones
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
export OMP_NUM_THREADS=1 WANDB_MODE=offline

ruff check .
ruff format --check .
mypy
# Two at a time, a file to each: many tests wait for processes of their own.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
