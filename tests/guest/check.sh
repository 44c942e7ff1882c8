# shellcheck shell=bash
# How a check is run and reported, in the guest and on the host alike. Sourced.
#
# check NAME FUNCTION [ARG...] runs FUNCTION in a subshell under `set -e` and
# prints one line: "ok NAME", "not ok NAME: why" or "skip NAME: why". A failure
# shows the end of what the check printed, indented. `check` itself always
# succeeds ($CHECKED is the check's own status), so nothing here ends the script: the runner counts the lines, and "end of PART" as the last of them.
#
# There is one ringblk service at a time, as files: $SERVICE.pid, .status, .log.

set -uo pipefail

CHECK_TIMEOUT=${CHECK_TIMEOUT:-300}
CHECK_LOG=${CHECK_LOG:-$(mktemp)}
SERVICE=${SERVICE:-/run/service}

# Called by a check: leave with a reason.
skip() { printf '%s\n' "$*"; exit 77; }
fail() { printf '%s\n' "$*"; exit 1; }

# equal WHAT GOT WANTED
equal() { [ "$2" = "$3" ] || fail "$1: got '$2', wanted '$3'"; }
# at_least WHAT GOT WANTED
at_least() { [ "$2" -ge "$3" ] || fail "$1: got $2, wanted at least $3"; }
# fails COMMAND...: passes if the command does not.
fails() { if "$@"; then fail "succeeded, and should not have: $*"; fi; }
# fails_within SECONDS COMMAND...: the same, and it must have ended by itself: a
# hang is no refusal.
fails_within() {
    local rc=0
    timeout "$@" || rc=$?
    [ $rc != 0 ] || fail "succeeded, and should not have: $*"
    [ $rc != 124 ] || fail "hung: $*"
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { echo "waited in vain for: $*"; return 1; }
        sleep 0.1
    done
}
gone() { ! kill -0 "$1" 2>/dev/null; }
absent() { [ ! -e "$1" ] && [ ! -L "$1" ]; }

check() {
    local name=$1 rc=0 pid dog
    shift
    # A process group of its own, so that a time-out ends all of it.
    set -m
    (trap - ERR; set -euo pipefail; "$@") >"$CHECK_LOG" 2>&1 </dev/null &
    pid=$!
    (
        sleep "$CHECK_TIMEOUT"
        echo "no end after $CHECK_TIMEOUT s" >>"$CHECK_LOG"
        kill -TERM -- -$pid
        sleep 2
        # What cannot be killed waits for a disk; without its server it gets an error.
        [ ! -s "$SERVICE.pid" ] || kill -KILL "$(<"$SERVICE.pid")"
        kill -KILL -- -$pid
    ) >/dev/null 2>&1 &
    dog=$!
    set +m
    wait $pid || rc=$?
    kill -KILL -- -$dog 2>/dev/null || :
    wait $dog 2>/dev/null || :
    CHECKED=$rc
    # One write for all of it: other checks may be printing to the same place.
    case $rc in
        0) echo "ok $name" ;;
        77) echo "skip $name: $(tail -n 1 "$CHECK_LOG")" ;;
        *) printf '%s\n' "not ok $name: $(grep -v '^$' "$CHECK_LOG" | tail -n 1 | cut -c 1-200) (status $rc)
$(tail -n 25 "$CHECK_LOG" | sed 's/^/    | /')" ;;
    esac
    return 0
}

# service_start ARG...: ringblk serve ARG... in the background, ready when it
# answers on its control socket.
service_start() {
    service_kill
    rm -f "$SERVICE".{pid,status}
    (
        set +e
        ringblk serve --control "$SERVICE.control" "$@" &
        echo $! >"$SERVICE.pid"
        wait $!
        echo $? >"$SERVICE.status"
    ) >"$SERVICE.log" 2>&1 &
    wait_for 20 eval "[ -s $SERVICE.status ] || service_json >/dev/null" || { cat "$SERVICE.log"; fail "not up after 20 s"; }
    [ ! -s "$SERVICE.status" ] || { cat "$SERVICE.log"; fail "it ended at once, status $(<"$SERVICE.status")"; }
}
service_json() { ringblk list --json --control "$SERVICE.control"; }
service_pid() { cat "$SERVICE.pid"; }
service_ended() { [ -s "$SERVICE.status" ]; }
service_kill() { [ ! -s "$SERVICE.pid" ] || service_ended || { kill -KILL "$(service_pid)" 2>/dev/null || :; wait_for 10 service_ended; }; }

# service_stop PATH...: a clean end, with none of these paths left behind.
service_stop() {
    local path
    kill -TERM "$(service_pid)"
    wait_for 20 service_ended || { tail -n 20 "$SERVICE.log"; fail "still there 20 s after SIGTERM"; }
    tail -n 20 "$SERVICE.log"
    equal "exit status" "$(<"$SERVICE.status")" 0
    for path; do
        absent "$path" || fail "$path is still there"
    done
}
