#!/usr/bin/env bash
# One training job per path, and, when all have ended, a job that compares them.
#   bash slurm/compare.sh configs/NAME.yaml [key=value ...]
# From the environment:
#   DRY_RUN=1                                     print what would be submitted
#   SBATCH_OPTIONS="--nodes 2 --gpus-per-node 8"  of the training jobs; what all jobs need, such as
#                                                 an account, sbatch takes from SBATCH_ACCOUNT
#   MOE_PATHS="bf16 fp8_compact"                  instead of all
#   RUNS=runs/folder                              instead of one by today's name; given again, the
#                                                 runs in it resume
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# -eq 0 ]; then
  echo "error: no config; bash slurm/compare.sh configs/NAME.yaml [key=value ...]" >&2
  exit 2
fi
config=$1
shift
for key in "$@"; do
  case $key in
    moe.path=* | run.name=* | run.dir=*)
      echo "error: $key is set here for each run; MOE_PATHS chooses paths, RUNS the folder" >&2
      exit 2
      ;;
  esac
done
if [ ! -f "$config" ]; then
  echo "error: $config: no such file" >&2
  exit 2
fi
folder=${RUNS:-runs/$(basename "$config" .yaml)-$(date +%Y%m%d-%H%M%S)}
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
names=${MOE_PATHS:-$(python -c 'from models.config import PATH_NAMES; print(*PATH_NAMES)' 2>/dev/null)} || {
  echo "error: cannot list the paths; install requirements.txt, or set MOE_PATHS" >&2
  exit 2
}
read -ra paths <<<"$names"
if [ ${#paths[@]} -eq 0 ]; then
  echo "error: MOE_PATHS='$names' names no path" >&2
  exit 2
fi
read -ra options <<<"${SBATCH_OPTIONS:-}"

submit() { # sbatch's arguments; prints the job's number
  if [ "${DRY_RUN:-0}" != 0 ]; then
    printf '%q ' sbatch "$@" >&2
    echo >&2
    echo JOB
  else
    sbatch --parsable "$@" | cut -d';' -f1
  fi
}

if [ "${DRY_RUN:-0}" = 0 ]; then mkdir -p "$folder"; fi
jobs=() runs=()
for path in "${paths[@]}"; do
  job=$(submit "${options[@]}" --job-name="moe-$path" --output="$folder/$path.out" \
    slurm/train.sbatch "$config" "$@" moe.path="$path" run.name="$path" run.dir="$folder")
  echo "$path: job $job, output in $folder/$path.out"
  jobs+=("$job") runs+=("$folder/$path")
done

# Whether they succeed or not: a failed path is named there, and the others are compared.
after=$(IFS=:; echo "${jobs[*]}")
job=$(submit --dependency="afterany:$after" --output="$folder/compare.out" \
  slurm/compare.sbatch "$folder/compare" "${runs[@]}")
echo "comparison: job $job, in $folder/compare when the others have ended"
