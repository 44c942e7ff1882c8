# shellcheck shell=bash
# Disks that outlive their server: killed, handed over, resized, removed.
# Sourced in the guest, after ublk-parts.sh.

# load DEV: writes to all of a disk, reads back what they wrote, and end with an
# error at the first byte that is not what it was, or the first request that
# fails. In the background; its process is $LOAD.
load() {
    local before
    before=$(stat_of "$1" 5)
    fio --name=load --filename="$1" --direct=1 --ioengine=io_uring --rw=randwrite --bsrange=4k-16k --bs_unaligned=0 \
        --iodepth=16 --size="$small" --io_size=1g --time_based --runtime="$2" --serialize_overlap=1 \
        --verify=crc32c --verify_backlog=64 --verify_fatal=1 >/tmp/load.log 2>&1 &
    LOAD=$!
    wait_for 20 eval "[ \$(stat_of $1 5) -gt $((before + 50)) ]"
}
load_ended_well() { wait "$LOAD" || { cat /tmp/load.log; fail "the load saw an error"; }; }

# serve ARG...: with the same arguments as the last time where there are none.
serve() {
    [ $# = 0 ] || SERVED=("$@")
    service_start "${SERVED[@]}"
}
crash() {
    kill -KILL "$(service_pid)"
    wait_for 10 service_ended
}
said() { grep -q "$1" "$SERVICE.log" || { cat "$SERVICE.log"; fail "the service did not say: $1"; }; }
# refused SECONDS WORD...: a service with the last arguments and these does not start, and says all the words.
refused() {
    local word
    fails_within "$1" ringblk serve --control /run/refused.control "${SERVED[@]}" 2>/tmp/said
    cat /tmp/said
    shift
    for word; do grep -q -e "$word" /tmp/said || fail "the error does not say: $word"; done
}

# survive ROUNDS HOW IMAGE OPTIONS UBLK-OPTIONS: no request fails or is lost.
survive() {
    local rounds=$1 how=$2 image=$3 device
    rm -f "$image"
    truncate -s "$small" "$image"
    serve --workers 2 --volume "r=file:$image$4" --ublk "r,queues=2$5"
    up r
    device=$(readlink -f /dev/ringblk/r)
    load "$device" $((6 + 3 * rounds))
    for _ in $(seq "$rounds"); do
        sleep 1
        "$how"
        equal "the link" "$(readlink -f /dev/ringblk/r)" "$device"
        serve
        up r
        said "$device: recovered"
        equal "the device" "$(export_field r device)" "$device"
    done
    load_ended_well
    disk_same_as /dev/ringblk/r "$image"
    service_stop /dev/ringblk/r "$device"
    rm "$image"
}
hand_over() {
    ringblk stop --hand-over --control "$SERVICE.control"
    wait_for 20 service_ended
    equal "exit status" "$(<"$SERVICE.status")" 0
}

# A file system that is written to while its disk's server dies.
mounted() {
    local writer
    truncate -s "$small" /tmp/r.img
    serve --volume r=file:/tmp/r.img --ublk r,queues=2
    up r
    mkfs.ext4 -q /dev/ringblk/r
    mkdir -p /tmp/fs
    mount /dev/ringblk/r /tmp/fs
    head -c $((8 * MiB)) /dev/urandom >/tmp/data
    for n in 1 2 3; do
        cp /tmp/data "/tmp/fs/$n" &
        writer=$!
        crash
        serve
        wait $writer
        up r
    done
    sync
    umount /tmp/fs
    e2fsck -fn /dev/ringblk/r
    mount -o ro /dev/ringblk/r /tmp/fs
    for n in 1 2 3; do cmp /tmp/data "/tmp/fs/$n"; done
    umount /tmp/fs
    service_stop /dev/ringblk/r
    rm /tmp/r.img
}

# A server that dies while it recovers leaves the disk to the next.
killed_early() {
    local n
    start_plain ""
    crash
    for n in 0 1 2 3 4 5 6 7; do
        ringblk serve --control /run/early.control "${SERVED[@]}" &
        sleep "0.$((n * 6 + 2))"
        kill -KILL $!
        wait $! || :
    done
    serve
    up p
    read_block
    service_stop /dev/ringblk/p
}

# start_plain UBLK-OPTIONS [VOLUME-OPTIONS]
start_plain() {
    rm -f /tmp/p.img
    truncate -s "$small" /tmp/p.img
    serve --volume "p=file:/tmp/p.img${2-}" --ublk "p,queues=1$1"
    up p
}
read_block() { dd if=/dev/ringblk/p of=/dev/null bs=4k count=1 iflag=direct status=none; }

# New requests wait; nothing was in flight, so nothing fails.
plain_recovery() {
    local reader
    start_plain ,recovery=queue
    crash
    read_block &
    reader=$!
    sleep 2
    fails gone $reader
    serve
    wait $reader
    service_stop /dev/ringblk/p
}

fail_io() {
    start_plain ,recovery=fail-io
    crash
    wait_for 10 fails_within 5 read_block
    serve
    up p
    read_block
    service_stop /dev/ringblk/p
}
fail_io_refused() {
    truncate -s "$small" /tmp/p.img
    SERVED=(--volume p=file:/tmp/p.img --ublk "p,queues=1,recovery=fail-io")
    refused 20 'recovery=fail-io is not possible' 6.13 "$(uname -r)"
}

# Without recovery the disk goes with its server, and what is left does not stand in the next one's way.
no_recovery() {
    local device
    start_plain ,recovery=off
    device=$(readlink -f /dev/ringblk/p)
    crash
    wait_for 10 absent "$device"
    serve
    up p
    fails ringblk stop --hand-over --control "$SERVICE.control" 2>/tmp/said
    grep -q recovery=off /tmp/said || { cat /tmp/said; fail "it does not say why not"; }
    read_block
    service_stop /dev/ringblk/p
    # A memory volume's data is gone, so its disk must be too.
    serve --volume m=memory:64M --ublk m
    up m
    device=$(readlink -f /dev/ringblk/m)
    crash
    wait_for 10 absent "$device"
    serve
    up m
    service_stop /dev/ringblk/m
}

# What cannot be recovered is named, and left as it was; with its own configuration it is recovered after all.
mismatch() {
    local device
    # Without the image's lock, which would keep a second service away first.
    start_plain "" ,lock=off
    device=$(readlink -f /dev/ringblk/p)
    refused 20 "$device" "process $(service_pid) serves it"
    crash
    SERVED+=(--volume q=null:64M --ublk q)
    SERVED[3]=p,queues=1,depth=64,max-io=64K
    refused 20 "$device" 'depth: it has 128, the configuration asks for 64' max-io 'ringblk remove p'
    SERVED[3]=p,queues=1
    truncate -s 32M /tmp/p.img
    refused 20 'size: it has'
    truncate -s "$small" /tmp/p.img
    # One export that cannot be started does not take the others' disks with it.
    touch /dev/ringblk/q
    refused 30 /dev/ringblk/q
    rm /dev/ringblk/q
    test -b "$device"
    serve
    up p
    said "$device: recovered"
    read_block
    service_stop /dev/ringblk/p /dev/ringblk/q "$device"
}

# A disk waits for its store: no other gets its requests, whatever its name or its volume's is.
identity() {
    local device sum
    start_plain "" ,lock=off
    device=$(readlink -f /dev/ringblk/p)
    head -c $MiB /dev/urandom | dd of="$device" bs=64k conv=fsync status=none
    crash
    truncate -s "$small" /tmp/other.img
    sum=$(sha256sum </tmp/other.img)
    SERVED[1]=p=file:/tmp/other.img
    refused 20 "$device" 'store: it is of /tmp/p.img' /tmp/other.img 'ringblk remove p'
    # The same store under another name, and beside it a volume whose name has the same hash in 32 bits.
    SERVED=(--volume q=file:/tmp/p.img --ublk q,queues=1)
    refused 20 "$device" 'volume p' 'ringblk remove p'
    # Another file where it was: its inode may well be the same.
    mv /tmp/p.img /tmp/moved.img
    cp /tmp/moved.img /tmp/p.img
    SERVED=(--volume p=file:/tmp/p.img --ublk p,queues=1)
    refused 20 "$device" '/tmp/p.img is not what it was'
    # It is what it was made of, not where.
    ln -s /tmp/moved.img /tmp/link.img
    serve --volume p=file:/tmp/link.img --ublk p,queues=1
    up p
    said "$device: recovered"
    disk_same_as "$device" /tmp/moved.img
    equal "the other file" "$(sha256sum </tmp/other.img)" "$sum"
    # A loop device that is attached to another file is another disk.
    service_stop /dev/ringblk/p
    losetup /dev/loop7 /tmp/moved.img
    serve --volume p=file:/dev/loop7 --ublk p,queues=1
    up p
    crash
    losetup -d /dev/loop7
    losetup /dev/loop7 /tmp/other.img
    refused 20 diskseq
    ringblk remove p
    losetup -d /dev/loop7
    rm /tmp/{p,moved,other,link}.img
}

# Two volumes whose names have the same hash in 32 bits (FNV-1a): each gets its own disk back.
same_hash() {
    local a=/dev/ringblk/costarring b=/dev/ringblk/liquid
    truncate -s "$small" /tmp/a.img /tmp/b.img
    serve --volume costarring=file:/tmp/a.img --ublk costarring --volume liquid=file:/tmp/b.img --ublk liquid
    up costarring
    up liquid
    fails test "$(readlink -f $a)" = "$(readlink -f $b)"
    echo one | dd of=$a conv=sync status=none
    crash
    serve
    up costarring
    up liquid
    echo two | dd of=$b conv=sync status=none
    service_stop $a $b
    grep -q one /tmp/a.img && grep -q two /tmp/b.img
    # One alone, while the other one's disk waits.
    serve
    up liquid
    crash
    serve --volume costarring=file:/tmp/a.img --ublk costarring
    up costarring
    said 'costarring.*recovered\|recovered'
    service_stop $a
    listed liquid --json
    ringblk remove liquid
    rm /tmp/{a,b}.img
}

# What the disk is of is written in /dev/ringblk, and in part in the kernel: without the one the other must do.
no_record() {
    local device
    start_plain ""
    device=$(readlink -f /dev/ringblk/p)
    crash
    rm -r /dev/ringblk
    truncate -s "$small" /tmp/other.img
    SERVED[1]=p=file:/tmp/other.img
    serve
    up p
    fails test "$(readlink -f /dev/ringblk/p)" = "$device"
    service_stop /dev/ringblk/p
    serve --volume p=file:/tmp/p.img --ublk p,queues=1
    said "$device: has no record"
    up p
    equal "the device" "$(readlink -f /dev/ringblk/p)" "$device"
    service_stop /dev/ringblk/p
    rm /tmp/{p,other}.img
}

# listed REGEX [OPTION...]: by `ringblk list`, whose status says that no service runs.
listed() {
    local regex=$1
    shift
    { ringblk list --control "$SERVICE.control" "$@" || :; } | tee /dev/stderr | grep -q "$regex"
}
fails_to_remove() { ! ringblk remove "$1" 2>/tmp/said && grep "$2.*--force" /tmp/said; }
removal() {
    local device reader
    start_plain ""
    device=$(readlink -f /dev/ringblk/p)
    fails ringblk remove p 2>/tmp/said
    grep -q "process $(service_pid)" /tmp/said || { cat /tmp/said; fail "it does not say who serves it"; }
    crash
    wait_for 10 listed '"state": *"waiting"' --json
    listed "^/dev/ringblk/p  *$device  *waiting.*ringblk remove"
    read_block &
    reader=$!
    wait_for 10 fails_to_remove p 'open in process'
    ringblk remove --force p
    absent /dev/ringblk/p
    absent "$device"
    # What waited for it is told.
    wait_for 10 gone $reader
    fails wait $reader
    fails ringblk remove p
    start_plain ""
    crash
    ringblk remove "$(readlink -f /dev/ringblk/p)"
    absent /dev/ringblk/p
    start_plain ""
    crash
    ringblk remove --all-dead
    absent /dev/ringblk/p
    fails ls -d /sys/class/ublk-char/*
}

sectors() { cat "/sys/block/${1##*/}/size"; }
resize() {
    local device reader
    start_plain ""
    device=$(readlink -f /dev/ringblk/p)
    ringblk resize --control "$SERVICE.control" p 96M
    equal "sectors" "$(sectors "$device")" $((96 * MiB / 512))
    dd if=/dev/urandom of="$device" bs=1M seek=80 count=4 oflag=direct conv=fsync status=none
    disk_same_as "$device" /tmp/p.img $((96 * MiB))
    fails ringblk resize --control "$SERVICE.control" p 32M
    equal "sectors" "$(sectors "$device")" $((96 * MiB / 512))
    # It is as large for the next server, and larger when its volume has grown.
    crash
    truncate -s 128M /tmp/p.img
    serve
    up p
    wait_for 10 eval "[ \$(sectors $device) = $((128 * MiB / 512)) ]"
    service_stop /dev/ringblk/p
}
resize_refused() {
    start_plain ""
    fails ringblk resize --control "$SERVICE.control" p 96M 2>/tmp/said
    cat /tmp/said
    grep -q 6.16 /tmp/said || fail "it does not say which kernel can"
    equal "bytes of the image" "$(stat -c %s /tmp/p.img)" "$small"
    crash
    truncate -s 96M /tmp/p.img
    serve
    up p
    said 'it keeps its'
    equal "sectors" "$(sectors "$(readlink -f /dev/ringblk/p)")" $((small / 512))
    service_stop /dev/ringblk/p
}

# recovery PREFIX KERNEL-SERIES
recovery() {
    # A load that outlives several services takes its time on an emulated machine.
    local p=$1 CHECK_TIMEOUT=180
    check "$p/killed/copy" survive 4 crash /tmp/r.img "" ,zero-copy=off
    check "$p/killed/direct" survive 2 crash /mnt/scratch/r.img ,direct=on ,zero-copy=off
    # More requests than tags: the kernel has no fetch left that the server's death would end.
    check "$p/killed/full-queues" survive 2 crash /mnt/scratch/r.img ,direct=on ,zero-copy=off,depth=8
    check "$p/handed-over/copy" survive 3 hand_over /tmp/r.img "" ,zero-copy=off
    check "$p/killed/mounted" mounted
    if [ "$2" = 6.12 ]; then
        echo "skip $p/killed/while-it-recovers: kernel 6.12 does not forget what such a server had begun"
        echo "skip $p/killed/zero-copy: kernel 6.12 has none"
        echo "skip $p/handed-over/zero-copy: kernel 6.12 has none"
        echo "skip $p/handed-over/queue: kernel 6.12 cannot"
        check "$p/fail-io/refused" fail_io_refused
        check "$p/resize/refused" resize_refused
    else
        check "$p/killed/while-it-recovers" killed_early
        check "$p/killed/zero-copy" survive 3 crash /mnt/scratch/r.img ,direct=on ,zero-copy=on
        check "$p/handed-over/zero-copy" survive 2 hand_over /mnt/scratch/r.img ,direct=on ,zero-copy=on
        check "$p/handed-over/queue" survive 2 hand_over /tmp/r.img "" ,recovery=queue
        check "$p/fail-io" fail_io
        check "$p/resize" resize
    fi
    check "$p/queue" plain_recovery
    check "$p/off" no_recovery
    check "$p/mismatch" mismatch
    check "$p/identity" identity
    check "$p/same-hash" same_hash
    check "$p/no-record" no_record
    check "$p/removal" removal
}
