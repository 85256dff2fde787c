# shellcheck shell=bash
# Sourced by what stands between a machine and the training on it: the training gets SIGTERM, and its exit code goes on.

set +o posix # in which bash forgets the code of a child that it has waited for

begin() { # COMMAND...; sets `child`; a signal that comes while it starts is handed on once it has
  child='' signalled=''
  trap 'signalled=1; [ -z "$child" ] || kill -TERM "$child"' TERM
  "$@" </dev/null &
  child=$!
  [ -z "$signalled" ] || kill -TERM "$child"
}

# shellcheck disable=SC2034 # `code` is for the caller
await() { # sets `code`; a signal ends `wait` with a code of its own, and bash keeps that of a child that has ended
  while
    signalled=''
    wait "$child"
    code=$?
    [ -n "$signalled" ]
  do :; done
}
