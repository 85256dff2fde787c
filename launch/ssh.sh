#!/usr/bin/env bash
# What launch/ssh.py runs on each host: GRACE COMMAND...
# The command is asked to stop when standard input ends, which it does with the connection, and killed GRACE seconds on.
set -u
# shellcheck source=launch/child.sh
. "$(dirname "$0")/child.sh"
grace=$1
shift

begin "$@"
exec 3<&0 # a background job has no standard input of its own
{ cat <&3; kill -TERM "$child"; sleep "$grace"; kill -KILL "$child"; } >/dev/null 2>&1 &
watch=$!
exec 3<&-
trap '' HUP PIPE
await
kill "$watch" 2>/dev/null
exit "$code"
