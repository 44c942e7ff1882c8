#!/bin/bash
# The ublk door, inside a guest: ublk.sh PREFIX KERNEL-SERIES
# /dev/vda is an image filled through the vhost-user door before, /dev/vdb one
# that will be checked through it later. No module but virtio_blk is loaded yet.
prefix=$1 series=$2
. /suite/check.sh
. /suite/disk.sh
. /suite/ublk-parts.sh
. /suite/ublk-ends.sh
. /suite/ublk-recovery.sh
. /suite/ublk-use.sh
. /suite/ublk-udev.sh
. /suite/ublk-memory.sh

check "$prefix/without-driver" without_driver
modprobe -a ublk_drv loop zram xfs
check "$prefix/features" features
prepare

disk "$prefix/q1-copy" q1copy "file:/tmp/q1copy.img" "queues=1,zero-copy=off" false 1 /tmp/q1copy.img
disk "$prefix/q2-copy-direct" q2copy "file:/mnt/scratch/q2copy.img,direct=on" "queues=2,zero-copy=off" false 2 /mnt/scratch/q2copy.img
check "$prefix/zero-copy-auto-buffered" zero_copy_auto /tmp/zc.img "" false
if [ "$series" = 6.12 ]; then
    check "$prefix/zero-copy-auto-direct" zero_copy_auto /mnt/scratch/zc.img ,direct=on false
    check "$prefix/zero-copy-refused" zero_copy_refused
    echo "skip $prefix/q1-zero-copy: kernel 6.12 has none"
    echo "skip $prefix/q2-zero-copy-direct: kernel 6.12 has none"
else
    check "$prefix/zero-copy-auto-direct" zero_copy_auto /mnt/scratch/zc.img ,direct=on true
    disk "$prefix/q1-zero-copy" q1zc "file:/tmp/q1zc.img" "queues=1,zero-copy=on" true 1 /tmp/q1zc.img
    disk "$prefix/q2-zero-copy-direct" q2zc "file:/mnt/scratch/q2zc.img,direct=on" "queues=2,zero-copy=on" true 2 /mnt/scratch/q2zc.img
fi

many_volumes "$prefix"
check "$prefix/both-doors" both_doors
check "$prefix/filled-by-vhost-user" filled_by_vhost_user
check "$prefix/fill-for-vhost-user" fill_for_vhost_user
check "$prefix/stop-under-load" stop_under_load
check "$prefix/stop-command" stop_command
check "$prefix/second-signal" second_signal
check "$prefix/nbd-server-lost" nbd_server_lost
check "$prefix/nbd-reconnect" nbd_reconnect
recovery "$prefix" "$series"
in_use "$prefix" "$series"
udev "$prefix"
memory "$prefix" "$series"
echo "end of ublk"
