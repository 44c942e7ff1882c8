#!/bin/bash
# The vhost-user door, inside the first guest: vhost-user.sh PREFIX
# /dev/vda one queue, /dev/vdb two queues and O_DIRECT, /dev/vdc read-only,
# /dev/vdd an NBD server's. It ends by asking to be killed in the middle of I/O.
prefix=$1
. /suite/check.sh
. /suite/disk.sh

disk() {
    local title=$1 dev=$2 size=$3 queues=$4
    check "$title/geometry" disk_geometry "$dev" "$size" 512 "$queues"
    check "$title/fio-verify" disk_fio "$dev"
    check "$title/flush" disk_flush "$dev"
    check "$title/discard" disk_discard "$dev" zero
    check "$title/write-zeroes" disk_zeroout "$dev"
    check "$title/ext4" disk_fs "$dev" ext4
    check "$title/xfs" disk_fs "$dev" xfs
}

serial() {
    local serial
    serial=$(cat "/sys/block/$1/serial")
    echo "serial: $serial"
    [ -n "$serial" ] || fail "no serial number"
}

# CONFIG_WCE: the guest turns the cache off and on, and keeps reading what it wrote.
cache_mode() {
    local type=/sys/block/vda/cache_type
    equal "cache at first" "$(cat $type)" "write back"
    echo "write through" >$type
    equal "cache turned off" "$(cat $type)" "write through"
    disk_fio /dev/vda
    echo "write back" >$type
    equal "cache turned on" "$(cat $type)" "write back"
}

# The host makes the disk larger once it has read that we wait for it; what is new can be written.
grown() {
    local end=$((340 * MiB))
    wait_for 60 eval "[ \$(blockdev --getsize64 /dev/vdb) = $end ]"
    head -c 65536 /dev/urandom >/tmp/tail
    dd if=/tmp/tail of=/dev/vdb bs=64k seek=$((end - 65536)) oflag=direct,seek_bytes conv=notrunc status=none
    region /dev/vdb $((end - 65536)) 65536 | cmp - /tmp/tail
}

# Tell the host what we read, for it to compare with the file.
tell() { echo "sum $1 $(region "$2" 0 $((16 * MiB)) | sha256sum | cut -d' ' -f1)"; }

disk "$prefix/q1" /dev/vda $((320 * MiB)) 1
disk "$prefix/q2-direct" /dev/vdb $((330 * MiB)) 2
check "$prefix/q1/serial" serial vda
check "$prefix/q1/cache-mode" cache_mode
check "$prefix/read-only" disk_read_only /dev/vdc
echo "make vdb larger now"
check "$prefix/resized" grown
check "$prefix/nbd/fio-verify" disk_fio /dev/vdd
check "$prefix/nbd/discard" disk_discard /dev/vdd any
check "$prefix/nbd/write-zeroes" disk_zeroout /dev/vdd
check "$prefix/fill" disk_fill /dev/vda /mnt
head -c $((16 * MiB)) /dev/urandom | dd of=/dev/vdb bs=1M oflag=direct iflag=fullblock conv=fsync status=none
tell ro /dev/vdc
tell nbd /dev/vdd
tell two /dev/vdb

# Random I/O beyond what is summed up above, and unflushed writes in the file system.
fio --name=busy --filename=/dev/vdb --direct=1 --ioengine=io_uring --rw=randrw --bsrange=512-64k --iodepth=32 \
    --offset=32m --size=64m --time_based --runtime=120 >/tmp/busy.log 2>&1 &
before=$(stat_of /dev/vdb 5)
dd if=/dev/urandom of=/mnt/unflushed bs=64k count=256 status=none &
wait_for 30 eval "[ \$(stat_of /dev/vdb 5) -gt $((before + 50)) ]" || { cat /tmp/busy.log; exit 1; }
echo "kill me now"
sleep 120
