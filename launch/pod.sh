#!/usr/bin/env bash
# What each pod of launch/gke.py runs: HOSTS PYTHON -m launch.train FLAGS..., HOSTS being the pods of a slice.
# Leaves with 0 at the end of training, with 75 where it was stopped and saved and is to go on.
set -u
# shellcheck source=launch/child.sh
. "$(dirname "$0")/child.sh"
JAX_PROCESS_ID=$((JOB_INDEX * $1 + JOB_COMPLETION_INDEX))
export JAX_PROCESS_ID
shift

begin "$@" # bash is process 1 here, and would pass no signal on by itself
await
[ "$code" -eq 0 ] || exit "$code"
exec "$1" -m launch.finished "${@:4}"
