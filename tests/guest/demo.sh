#!/bin/bash
# The guest's half of scripts/demo: a file system on the vhost-user disk that
# QEMU gave us and on a ublk disk that ringblk makes in here, and how fast each
# is compared with the kernel's own loop device. Prints the table's rows.
. /suite/check.sh
. /suite/disk.sh
set -e

modprobe -a ublk_drv loop
size=$((256 * MiB))
truncate -s $size /tmp/ublk.img /tmp/loop.img
losetup /dev/loop0 /tmp/loop.img
service_start --volume demo=file:/tmp/ublk.img --ublk demo,queues=2
wait_for 20 test -b /dev/ringblk/demo
declare -A disk=([vhost-user]=/dev/vda [ublk]=/dev/ringblk/demo [loop]=/dev/loop0)

for frontend in vhost-user ublk; do
    CHECK_LOG=/tmp/$frontend.log
    check "$frontend: fio writes and verifies 16 MiB in mixed block sizes" disk_fio "${disk[$frontend]}"
    check "$frontend: discarded blocks" disk_discard "${disk[$frontend]}" zero
    check "$frontend: zeroed blocks" disk_zeroout "${disk[$frontend]}"
    check "$frontend: ext4, filled, checked, read back" disk_fs "${disk[$frontend]}" ext4
    disk_fill "${disk[$frontend]}" /mnt
    echo "row $frontend ${disk[$frontend]} $(wc -l </mnt/sums) $(du -sm /mnt | cut -f1)"
    umount /mnt
done

# Three rounds, the disks in turn, the middle of three: a busy host slows all of them alike.
echo "measuring"
for round in 1 2 3; do
    for frontend in loop vhost-user ublk; do
        for depth in 1 32; do
            fio_run "${disk[$frontend]}" --rw=randread --bs=4k --iodepth=$depth --size=64m --number_ios=$((1000 * (1 + depth / 8)))
            echo "iops $frontend $depth $(jq '.jobs[0].read.iops | floor' <<<"$FIO")" >>/tmp/iops
        done
    done
done
median() { awk -v d="$1" -v q="$2" '$2 == d && $3 == q { print $4 }' /tmp/iops | sort -n | sed -n 2p; }
for frontend in vhost-user ublk; do
    for depth in 1 32; do
        echo "ratio $frontend $depth $(awk -v a="$(median $frontend $depth)" -v b="$(median loop $depth)" 'BEGIN { printf "%.2f", a / b }')"
    done
done
check "ublk: clean stop" service_stop /dev/ringblk/demo
echo "end of demo"
