#!/usr/bin/env bash
# The whole story in one script: data, training, evaluation, one streamed conversation, export.
# Usage: launch/quickstart.sh CONFIG WORKDIR     Safe to interrupt and run again: data and training go on where they were.
set -euo pipefail
config=configs/$1.py workdir=$2
python=${PYTHON:-python3}
[ -f "$config" ] || { echo "quickstart: no config $config; see configs/" >&2; exit 2; }
step() { printf '\n== %s\n' "$1"; shift; "$@"; }

step "data" "$python" -m launch.data --config="$config"
step "training" "$python" -m launch.train --config="$config" --workdir="$workdir"
step "evaluation" "$python" -m launch.evaluate --workdir="$workdir"
example=$(find "$workdir/fdb" -name input.wav -path '*turn_taking*' | sort | head -n 1)
step "one streamed conversation" "$python" -m launch.stream --workdir="$workdir" --input="$example" \
  --output="$workdir/example.wav" --json="$workdir/example.json"
step "export" "$python" -m launch.export --workdir="$workdir" --output="$workdir/export"

printf '\nDone. Open the report: %s/report.html\n' "$workdir"
