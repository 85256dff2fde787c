#!/usr/bin/env bash
# The batch script of launch/slurm.py: RESTARTS PYTHON -m launch.train FLAGS..., one process on every node of the job.
# A training that was stopped and saved goes back to the queue; one that failed is started again in its place.
set -u
restarts=$1 python=$2
shift

if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then # the process of a node has all of its GPUs; JAX would give it the first
  JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
  export JAX_LOCAL_DEVICE_IDS
fi

# Of many exit codes srun gives the highest, which is that of a task it has killed; so a mistake, 2, is noted here too,
# on the disk that all nodes see.
export TMLJAX_MISTAKE="$PWD/mistake-${SLURM_JOB_ID:-}"

finished() { "$python" -m launch.finished "${@:4}"; } # 0: at its end, 75: not yet, 2: the flags are wrong

for ((failures = 0; ; failures++)); do
  finished "$@"
  code=$?
  [ "$code" -eq 75 ] || exit "$code"
  srun --kill-on-bad-exit=1 "$@"
  code=$?
  if [ -e "$TMLJAX_MISTAKE" ]; then
    rm -f "$TMLJAX_MISTAKE"
    exit 2
  fi
  if [ "$code" -eq 0 ]; then
    finished "$@" && exit
    echo "slurm.sh: stopped before the end of training; back to the queue" >&2
    exec scontrol requeue "$SLURM_JOB_ID"
  fi
  { [ "$code" -ne 2 ] && [ "$failures" -lt "$restarts" ]; } || exit "$code"
  echo "slurm.sh: failed with exit code $code; started again" >&2
done
