#!/usr/bin/env bash
# Train on Slurm, on one Ray over the nodes of the job. cluster/README.md tells what to change. In the checkout:
#   sbatch cluster/slurm/train.sh
#   scancel --batch --signal=TERM JOB_ID      # the run commits, the job ends and is not requeued
# Some minutes before its time limit the run commits and the job is requeued, and so it is when its driver dies.
#SBATCH --job-name=ray-pipeline
#SBATCH --output=ray-pipeline-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=48
#SBATCH --gpus-per-node=4
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --exclusive
# exclusive, since `ray symmetric-run` ends with `ray stop`, which ends every Ray of yours on a node
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}"
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

train=(
  python -m ray_pipeline train --config configs/microscopy.yaml --resume=auto
  --set data.root=/shared/data --set output_dir=/shared/runs/first
  --set ray.use_gpu=true --set ray.num_workers="$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))"
)
most_deaths=20 # of the driver since the last time limit; requeues at the time limit, and Slurm's own, are free

export RAY_AUTH_MODE=token                            # ~/.ray/auth_token, the same file on every node
export RAY_TMPDIR="${RAY_TMPDIR:-/tmp/ray_$(id -un)}" # on each node; /tmp/ray may be another user's
export RAY_TRAIN_ENABLE_STATE_TRACKING=1
export RAY_USAGE_STATS_ENABLED=0
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # seconds for all nodes to come
(umask 077 && ray get-auth-token --generate >/dev/null)

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # where this script runs, too
address="$head:$((20000 + SLURM_JOB_ID % 10000))"
state=$(mktemp -d)
trap 'rm -rf "$state"' EXIT

stopped=no
# SIGTERM for the driver alone, which asks its workers to commit; it may not have begun yet
# shellcheck disable=SC2329 # the traps call it
stop() {
  stopped=$1
  touch "$state/stop"
  if [[ -s $state/pid ]]; then kill -TERM "$(<"$state/pid")" || true; fi
}
trap 'stop limit' USR1
trap 'stop asked' TERM

(
  code=0
  # shellcheck disable=SC2016 # the inner shell expands these
  srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus "$SLURM_GPUS_ON_NODE" -- \
    env RAY_ADDRESS="$address" bash -c 'echo $$ >"$0/pid" && test ! -e "$0/stop" && exec "$@"' "$state" "${train[@]}" ||
    code=$?
  echo "$code" >"$state/code"
) &
while kill -0 $! 2>/dev/null; do wait $! || true; done # a signal ends a wait
code=$(<"$state/code")
if [[ ! -s $state/pid && $code == 0 ]]; then code=1; fi # symmetric-run hides that Ray did not start

requeue() {
  echo "$1: requeued"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
deaths_file="ray-pipeline-$SLURM_JOB_ID.deaths" # beside the log; there while the job is to go on
case "$stopped $code" in
  *" 0")
    rm -f "$deaths_file"
    exit 0
    ;;
  limit*)
    rm -f "$deaths_file"
    requeue "stopped before the time limit"
    ;;
  asked*) code=143 ;;
  *" 2") echo "wrong input, which no restart mends: see above" >&2 ;;
  *)
    deaths=0
    if [[ -s $deaths_file ]]; then deaths=$(<"$deaths_file"); fi
    deaths=$((deaths + 1))
    if ((deaths <= most_deaths)); then
      echo "$deaths" >"$deaths_file"
      requeue "the driver ended with status $code, $deaths of at most $most_deaths times"
    fi
    ;;
esac
rm -f "$deaths_file"
exit "$code"
