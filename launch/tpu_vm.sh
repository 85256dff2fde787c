#!/usr/bin/env bash
# On each worker, for launch/tpu_vm.py:
#   idle              leaves with 0 where it does not run, with 79 where it does
#   start COMMAND...  runs it so that it outlives the connection; nothing where it runs already
#   follow            prints what it says, until its end, and leaves with its exit code
#   stop GRACE        asks it to stop, and kills it GRACE seconds on
# train.log is what it says, train.pid who it is, since which boot, train.exit how it ended.
set -u
# shellcheck source=launch/child.sh
. "$(dirname "$0")/child.sh"
boot=$(cat /proc/sys/kernel/random/boot_id) # a pid of before is another's by now
running() { { read -r pid since <train.pid && [ "$since" = "$boot" ] && kill -0 "$pid"; } 2>/dev/null; }

case $1 in
  idle)
    running && exit 79
    exit 0
    ;;
  start)
    running && exit
    rm -f train.exit
    nohup bash "$0" run "${@:2}" >>train.log 2>&1 </dev/null &
    echo "$! $boot" >train.pid
    ;;
  run)
    begin "${@:2}"
    await
    echo "$code" >train.exit
    ;;
  follow)
    running && tail --pid="$pid" --lines=20 --follow=name train.log
    exit "$(cat train.exit 2>/dev/null || echo 1)"
    ;;
  stop)
    running && kill -TERM "$pid"
    for ((waited = 0; waited < $2; waited++)); do
      running || exit 0
      sleep 1
    done
    running && pkill -KILL -P "$pid"
    exit 0
    ;;
esac
