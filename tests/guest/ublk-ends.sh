# shellcheck shell=bash
# Ends, clean and otherwise: signals with I/O in flight, servers that go away.
# Sourced in the guest, after ublk-parts.sh.

# busy DEV: fio in the background, and I/O seen in flight. Its process is $BUSY.
busy() {
    local before
    before=$(stat_of "$1" 5)
    fio --name=busy --filename="$1" --direct=1 --ioengine=io_uring --rw=randwrite --bs=64k --iodepth=32 \
        --offset=16m --size=32m --time_based --runtime=60 >/tmp/busy.log 2>&1 &
    BUSY=$!
    wait_for 20 eval "[ \$(stat_of $1 5) -gt $((before + 50)) ]"
}

start_one() {
    truncate -s "$small" /tmp/one.img
    service_start --volume one=file:/tmp/one.img --ublk one,queues=2
    up one
}

# What was flushed is in the file, and whoever was doing I/O is told, not hung.
stop_under_load() {
    start_one
    head -c "$MiB" /dev/urandom >/tmp/marker
    dd if=/tmp/marker of=/dev/ringblk/one bs=64k conv=fsync status=none
    local device
    device=$(readlink -f /dev/ringblk/one)
    busy "$device"
    # It is in use.
    ringblk stop --force --control "$SERVICE.control"
    wait_for 20 service_ended
    equal "exit status" "$(<"$SERVICE.status")" 0
    absent "$device"
    absent "/sys/block/${device##*/}"
    absent /dev/ringblk/one
    wait_for 15 gone $BUSY || fail "fio still waits for a disk that is gone"
    cmp -n "$MiB" /tmp/marker /tmp/one.img
}

stop_command() {
    start_one
    ringblk stop --control "$SERVICE.control"
    wait_for 20 service_ended
    equal "exit status" "$(<"$SERVICE.status")" 0
    absent /dev/ringblk/one
}

# An NBD server that does not answer (stopped, not dead) keeps a request in flight.
# It is in a session of its own: a stopped process in ours would get all of us a SIGHUP.
slow_server() {
    [ ! -s /run/slow.pid ] || kill -KILL "$(</run/slow.pid)" 2>/dev/null || :
    rm -f /run/slow.pid /run/slow.sock
    setsid nbdkit -P /run/slow.pid -U /run/slow.sock file /tmp/slow.img
    wait_for 10 test -s /run/slow.pid
}
start_nbd() {
    truncate -s "$small" /tmp/slow.img
    slow_server
    service_start --volume "slow=nbd:nbd+unix:///?socket=/run/slow.sock,reconnect=$1" --ublk slow,queues=1
    up slow
}

second_signal() {
    local server reader device
    start_nbd 0
    server=$(</run/slow.pid) device=$(readlink -f /dev/ringblk/slow)
    kill -STOP "$server"
    dd if="$device" of=/dev/null bs=4k count=1 iflag=direct status=none &
    reader=$!
    wait_for 10 eval "[ \$(awk '{ print \$9 }' /sys/block/${device##*/}/stat) -gt 0 ]"
    kill -TERM "$(service_pid)"
    sleep 2
    fails service_ended
    kill -TERM "$(service_pid)"
    wait_for 10 service_ended || fail "still there 10 s after the second SIGTERM"
    kill -KILL "$server"
    cat "$SERVICE.log"
    grep -qi 'abandon' "$SERVICE.log" || fail "it did not say what it abandoned"
    wait_for 15 gone $reader || fail "the reader still waits"
}

nbd_server_lost() {
    start_nbd 0
    dd if=/dev/ringblk/slow of=/dev/null bs=4k count=1 iflag=direct
    kill -KILL "$(</run/slow.pid)"
    fails_within 20 dd if=/dev/ringblk/slow of=/dev/null bs=4k count=1 iflag=direct
    service_json >/dev/null
    # Its last flush cannot be made either, and it says so.
    kill -TERM "$(service_pid)"
    wait_for 20 service_ended
    equal "exit status" "$(<"$SERVICE.status")" 1
    grep -q 'volume slow could not be flushed' "$SERVICE.log" || fail "it did not say that the flush failed"
    absent /dev/ringblk/slow
}

nbd_reconnect() {
    local writer
    start_nbd 30
    head -c "$MiB" /dev/urandom >/tmp/marker
    dd if=/tmp/marker of=/dev/ringblk/slow bs=64k conv=fsync status=none
    kill -KILL "$(</run/slow.pid)"
    dd if=/tmp/marker of=/dev/ringblk/slow bs=64k seek=16 oflag=direct conv=fsync status=none &
    writer=$!
    sleep 1
    slow_server
    wait $writer
    cmp -n "$MiB" /tmp/marker /tmp/slow.img
    cmp -n "$MiB" /tmp/marker <(tail -c +$((MiB + 1)) /tmp/slow.img)
    service_stop /dev/ringblk/slow
    kill "$(</run/slow.pid)"
}
