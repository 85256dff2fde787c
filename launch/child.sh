# shellcheck shell=bash
# Sourced by what stands between a machine and the training on it: the training gets SIGTERM, and its exit code goes on.

begin() { # COMMAND...; sets `child`; a signal that comes while it starts is handed on once it has
  child='' stopped=''
  trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child"' TERM
  "$@" </dev/null &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child"
}

# shellcheck disable=SC2034 # `code` is for the caller
await() { # sets `code`; a signal ends `wait` before the child has ended
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
  done
}
