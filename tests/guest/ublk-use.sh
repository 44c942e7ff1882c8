# shellcheck shell=bash
# Disks that somebody uses: they are not taken away unless that is asked for.
# Sourced in the guest, after ublk-recovery.sh.

# stays DEV: the service has ended well and left the disk, which waits.
stays() {
    wait_for 20 service_ended || { tail -n 20 "$SERVICE.log"; fail "still there"; }
    tail -n 5 "$SERVICE.log"
    equal "exit status" "$(<"$SERVICE.status")" 0
    equal "the link" "$(readlink -f /dev/ringblk/p)" "$1"
    wait_for 10 listed '"state": *"waiting"' --json
}
on_fs() {
    start_plain "$1"
    mkfs.ext4 -q /dev/ringblk/p
    mkdir -p /tmp/fs
    mount /dev/ringblk/p /tmp/fs
}

# used_by WORDS: whoever asks is told who uses the disk, and it stays: for a signal, a stop, a removal.
used_by() {
    local device
    device=$(readlink -f /dev/ringblk/p)
    kill -TERM "$(service_pid)"
    stays "$device"
    said "/dev/ringblk/p stays, since it is.*$1"
    fails ringblk remove p 2>/tmp/said
    grep -q "$1.*--force" /tmp/said || { cat /tmp/said; fail "remove does not say: $1"; }
    serve
    up p
    ringblk stop --control "$SERVICE.control" >/tmp/said
    grep "$1" /tmp/said
    stays "$device"
    serve
    up p
    equal "the device" "$(readlink -f /dev/ringblk/p)" "$device"
}
mounted_stays() {
    local sum
    on_fs ""
    head -c $((4 * MiB)) /dev/urandom >/tmp/fs/data
    sum=$(sha256sum </tmp/fs/data)
    used_by "mounted on /tmp/fs"
    sync -f /tmp/fs
    umount /tmp/fs
    mount /dev/ringblk/p /tmp/fs
    equal "checksum" "$(sha256sum </tmp/fs/data)" "$sum"
    umount /tmp/fs
    service_stop /dev/ringblk/p
}
swap_stays() {
    start_plain ""
    busybox mkswap /dev/ringblk/p
    busybox swapon /dev/ringblk/p
    used_by "swap on"
    busybox swapoff /dev/ringblk/p
    service_stop /dev/ringblk/p
}
loop_stays() {
    start_plain ""
    losetup /dev/loop7 /dev/ringblk/p
    used_by "behind loop7"
    losetup -d /dev/loop7
    service_stop /dev/ringblk/p
}
# Only the command sees this on every kernel; a signal is answered by the kernel, from 7.0 on.
open_stays() {
    local device opener
    start_plain ""
    device=$(readlink -f /dev/ringblk/p)
    sleep 1000 <"$device" &
    opener=$!
    ringblk stop --control "$SERVICE.control" >/tmp/said
    grep "open in process" /tmp/said
    stays "$device"
    serve
    up p
    if [ "$1" != 6.12 ]; then
        kill -TERM "$(service_pid)"
        stays "$device"
        serve
        up p
    fi
    kill $opener
    wait $opener || :
    service_stop /dev/ringblk/p
}
# What has claimed the disk and leaves no trace that a service in its sandbox sees, here another service: a signal is enough
# on every kernel, since it does not get the claim (before 7.0), or the kernel says so.
claimed_stays() {
    local device other
    start_plain ""
    device=$(readlink -f /dev/ringblk/p)
    ringblk serve --control /run/other.control --volume "q=file:$device,format=raw" --vhost-user q=/run/other.sock &
    other=$!
    wait_for 20 test -S /run/other.sock
    kill -TERM "$(service_pid)"
    stays "$device"
    said "stays, since it is open in another process"
    serve
    up p
    kill -TERM $other
    wait $other || :
    service_stop /dev/ringblk/p
}
# Anybody may mount something that calls itself like the disk, in a namespace of his own or with FUSE.
forged() {
    start_plain ""
    mkdir -p /tmp/forged
    mount -t tmpfs "$(readlink -f /dev/ringblk/p)" /tmp/forged
    service_stop /dev/ringblk/p
    umount /tmp/forged
}
forced() {
    on_fs ""
    fails ringblk stop --force --hand-over --control "$SERVICE.control"
    ringblk stop --force --control "$SERVICE.control"
    wait_for 20 service_ended
    absent /dev/ringblk/p
    fails touch /tmp/fs/x
    umount -l /tmp/fs
    on_fs ""
    crash
    ringblk remove --force p
    absent /dev/ringblk/p
    umount -l /tmp/fs
}
# What cannot stay: a stop is refused, and a signal wants another.
cannot_stay() {
    serve --volume p=memory:64M --ublk p
    up p
    mkfs.ext4 -q /dev/ringblk/p
    mkdir -p /tmp/fs
    mount /dev/ringblk/p /tmp/fs
    fails ringblk stop --control "$SERVICE.control" 2>/tmp/said
    grep -q 'mounted on /tmp/fs.*recovery=off' /tmp/said || { cat /tmp/said; fail "it does not say why"; }
    kill -TERM "$(service_pid)"
    wait_for 20 grep -q "not stopped: /dev/ringblk/p is mounted on /tmp/fs" "$SERVICE.log"
    touch /tmp/fs/x
    sync -f /tmp/fs
    umount /tmp/fs
    # Two signals within a second are one, and that one was refused.
    sleep 1.5
    service_stop /dev/ringblk/p
}
# Only what is used stays.
used_and_unused() {
    truncate -s "$small" /tmp/p.img /tmp/q.img
    serve --volume p=file:/tmp/p.img --ublk p --volume q=file:/tmp/q.img --ublk q
    up p
    up q
    mkfs.ext4 -q /dev/ringblk/p
    mkdir -p /tmp/fs
    mount /dev/ringblk/p /tmp/fs
    ringblk stop --control "$SERVICE.control"
    stays "$(readlink -f /dev/ringblk/p)"
    absent /dev/ringblk/q
    serve
    up p
    up q
    umount /tmp/fs
    service_stop /dev/ringblk/p /dev/ringblk/q
}

# Many disks are stopped, left and taken over at once: in far less than their number of times what one takes.
many() {
    local n start one all
    SERVED=()
    for n in $(seq 32); do
        truncate -s 8M /tmp/many$n.img
        SERVED+=(--volume "m$n=file:/tmp/many$n.img" --ublk "m$n,queues=1,depth=4,max-io=64K")
    done
    serve
    for n in $(seq 32); do wait_for 20 test -b /dev/ringblk/m$n; done
    start=$(date +%s)
    hand_over
    serve
    equal "disks taken over" "$(grep -c ': recovered' "$SERVICE.log")" 32
    echo "handed over and taken over in $(($(date +%s) - start)) s"
    start=$(date +%s)
    ringblk stop --control "$SERVICE.control"
    wait_for 20 service_ended
    grep -e "stopping:" -e "stopped$" "$SERVICE.log"
    echo "stopped in $(($(date +%s) - start)) s"
    fails ls -d /sys/block/ublkb*
    rm /tmp/many*.img
}

# Disks come and go in a running service, on an image of our own, and are found again by what adds them again.
live() {
    local sum
    rm -f /tmp/live.qcow2
    ringblk image create --format qcow2 /tmp/live.qcow2 64M
    serve --allow-path /tmp --allow-ublk --workers 2
    add() {
        ringblk volume add --control "$SERVICE.control" l=qcow2:/tmp/live.qcow2
        ringblk export add --control "$SERVICE.control" --ublk l,queues=1
        up l
        mount /dev/ringblk/l /tmp/fs
        equal "checksum" "$(sha256sum </tmp/fs/data)" "$sum"
        umount /tmp/fs
    }
    remove() { ringblk export remove --control "$SERVICE.control" --ublk "$1"; }
    ringblk volume add --control "$SERVICE.control" l=qcow2:/tmp/live.qcow2
    ringblk export add --control "$SERVICE.control" --ublk l,queues=1
    up l
    mkfs.ext4 -q /dev/ringblk/l
    mkdir -p /tmp/fs
    mount /dev/ringblk/l /tmp/fs
    head -c $((4 * MiB)) /dev/urandom >/tmp/fs/data
    sum=$(sha256sum </tmp/fs/data)
    fails remove l 2>/tmp/said
    grep -q 'mounted on /tmp/fs.*--force' /tmp/said || { cat /tmp/said; fail "it does not say who uses it"; }
    touch /tmp/fs/still-there
    umount /tmp/fs
    remove l
    absent /dev/ringblk/l
    ringblk image check /tmp/live.qcow2
    add
    # Whoever adds it again after a crash finds the disk that waits.
    crash
    serve
    add
    said "recovered"
    remove l
    ringblk volume remove --control "$SERVICE.control" l
    service_stop /dev/ringblk/l
}

# A server that is killed with its whole mount namespace, in which its disk is mounted, as a container's is.
last_in_namespace() {
    local inner device server
    rm -f /tmp/p.img
    truncate -s "$small" /tmp/p.img
    rm -f /tmp/inner.sh
    SERVED=(--volume p=file:/tmp/p.img --ublk p,queues=1)
    cat >/tmp/inner.sh <<'I'
ringblk serve --control /run/inner.control "$@" 2>/tmp/inner.log &
echo $! >/tmp/inner.pid
until [ -b /dev/ringblk/p ]; do sleep 0.2; done
mkfs.ext4 -q /dev/ringblk/p
mkdir -p /tmp/inside
mount /dev/ringblk/p /tmp/inside
dd if=/dev/zero of=/tmp/inside/dirty bs=64k count=16
touch /tmp/inner.up
exec sleep 1000
I
    rm -f /tmp/inner.up
    busybox unshare -m bash /tmp/inner.sh "${SERVED[@]}" &
    inner=$!
    wait_for 40 test -e /tmp/inner.up
    server=$(</tmp/inner.pid)
    device=$(readlink -f /dev/ringblk/p)
    # The server last: it must not have to unmount what it serves.
    kill -KILL $inner
    sleep 1
    kill -KILL "$server"
    wait_for 20 dead "$server" || { cat "/proc/$server/stack"; fail "the server cannot end"; }
    serve
    up p
    equal "the device" "$(readlink -f /dev/ringblk/p)" "$device"
    wait_for 20 unused p
    service_stop /dev/ringblk/p
}
dead() { ! [ -e "/proc/$1" ] || grep -q '^State:.*[ZX]' "/proc/$1/status"; }
unused() { [ -z "$(ls -d /sys/fs/ext4/ublkb* 2>/dev/null)" ]; }

# in_use PREFIX KERNEL-SERIES
in_use() {
    check "$1/used/mounted" mounted_stays
    check "$1/used/swap" swap_stays
    check "$1/used/loop" loop_stays
    check "$1/used/open" open_stays "$2"
    check "$1/used/claimed" claimed_stays
    check "$1/used/forged" forged
    check "$1/used/forced" forced
    check "$1/used/cannot-stay" cannot_stay
    check "$1/used/and-unused" used_and_unused
    check "$1/many-at-once" many
    check "$1/last-in-namespace" last_in_namespace
    check "$1/live" live
}
