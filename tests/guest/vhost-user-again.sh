#!/bin/bash
# The second guest, after the first was killed: vhost-user-again.sh PREFIX SUM
# /dev/vda and /dev/vdb as before, /dev/vdc what a ublk disk was filled with.
prefix=$1 sum=$2
. /suite/check.sh
. /suite/disk.sh

flushed_before_kill() {
    equal "checksum" "$(region /dev/vdb 0 $((16 * MiB)) | sha256sum | cut -d' ' -f1)" "$sum"
}

check "$prefix/flushed-blocks" flushed_before_kill
check "$prefix/flushed-files" disk_filled /dev/vda
check "$prefix/fio-verify" disk_fio /dev/vdb
check "$prefix/filled-by-ublk" disk_filled /dev/vdc

fio --name=busy --filename=/dev/vdb --direct=1 --ioengine=io_uring --rw=randrw --bs=16k --iodepth=32 \
    --size=64m --time_based --runtime=120 >/tmp/busy.log 2>&1 &
before=$(stat_of /dev/vdb 5)
wait_for 30 eval "[ \$(stat_of /dev/vdb 5) -gt $((before + 50)) ]" || { cat /tmp/busy.log; exit 1; }
echo "stop the service now"
sleep 120
