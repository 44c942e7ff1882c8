#!/bin/bash
# measure.sh ROUNDS JOBS PEER...: counts guest instructions per I/O, under
# scripts/guest --icount, where a nanosecond is an instruction. A PEER is DISK@STORE:
# peers.sh's peer_DISK on that store's file. JOBS is a list of
# NAME:RW:BLOCK:DEPTH:IOS:STORE+STORE..., separated by commas. Prints, one line each:
#   boot ID                                 of this boot
#   up PEER DEVICE                          or: down PEER REASON
#   cell PEER JOB ROUND IOS MICROSECONDS    of virtual time, for the IOS together
#   lost PEER JOB ROUND REASON              fio failed; the peer is left out from here on
#   end
#
# How they are counted: the virtual time of two fio runs that differ only in
# their number of I/Os, the shorter one's taken from the longer one's. So fio's
# start and end, the same in both, are not in it, and neither is the millisecond
# that fio rounds its own runtimes to. The client's part of each I/O (system calls,
# block layer) is in it, as all else that this machine did: the same for every
# peer. What a first use touches (a server's buffers, huge pages at that) has been
# used before: each disk is read at full depth once, which is not counted.
set -uo pipefail

size=$((256 << 20))
# The file behind a disk. Writes past the page cache drop it: they get a file of their own.
declare -A images=([ext4]=/mnt/cached.img [direct]=/mnt/direct.img [tmpfs]=/tmp/disk.img)
# shellcheck source=scripts/comparison/guest/peers.sh
. /compare/peers.sh

# I/Os of the shorter run: enough to reach the depth.
short=256
# shellcheck disable=SC2016 # for the shell that fio starts
clock='bash -c '\''echo ${EPOCHREALTIME/./}'\'''

# fio_run DEVICE RW BLOCK DEPTH IOS: virtual microseconds in $took, or why not in $why.
fio_run() {
    local rc=0 fields
    # fio looks for the end of its jobs every 10 ms only, so the job tells the time itself.
    timeout 60 fio --name=x --filename="$1" --direct=1 --ioengine=io_uring --thread --norandommap --disk_util=0 \
        --randseed=20260101 --rw="$2" --bs="$3" --iodepth="$4" --number_ios="$5" \
        --exec_prerun="$clock" --exec_postrun="$clock" --output-format=terse --output=/run/fio 2>/run/fio.err || rc=$?
    why="fio: status $rc $(tail -n 1 /run/fio.err)"
    [ $rc = 0 ] || return 1
    # Of terse output, 6 and 47 are the KiB read and written. fio's own messages come before it.
    IFS=';' read -ra fields < <(grep '^3;' /run/fio)
    why="fio did ${fields[5]} + ${fields[46]} KiB, not $5 I/Os"
    [ $((fields[5] + fields[46])) = $(($3 * $5 >> 10)) ] || return 1
    took=$(($(<x.postrun.txt) - $(<x.prerun.txt)))
}

# cell PEER NAME RW BLOCK DEPTH IOS ROUND
cell() {
    local peer=$1 short_took why took
    if fio_run "${devices[$peer]}" "$3" "$4" "$5" $short && short_took=$took &&
        fio_run "${devices[$peer]}" "$3" "$4" "$5" $((short + $6)); then
        echo "cell $peer $2 $7 $6 $((took - short_took))"
    else
        echo "lost $peer $2 $7 $why"
        unset "devices[$peer]"
    fi
}

# The files, on an ext4 of memory and on a tmpfs, with all blocks written.
make_files() {
    local mib=$((size >> 20))
    # ram1, as the peer brd has ram0. What each takes is taken page by page, when written.
    modprobe brd rd_nr=2 rd_size=$((2 * size + (64 << 20) >> 10))
    mkfs.ext4 -q -F /dev/ram1
    # No writeback and no journal commit while something is measured, but when somebody asks for it.
    echo 0 >/proc/sys/vm/dirty_writeback_centisecs
    echo 90 >/proc/sys/vm/dirty_background_ratio
    echo 95 >/proc/sys/vm/dirty_ratio
    mount -t ext4 -o commit=36000 /dev/ram1 /mnt
    # Not one page in the page cache: a write past it would have to drop that, which it cannot without waiting.
    dd if=/dev/zero of="${images[direct]}" bs=1M count=$mib oflag=direct status=none
    # Larger writes would make larger folios in the page cache.
    dd if=/dev/zero of="${images[ext4]}" bs=4k count=$((size >> 12)) status=none
    sync
    # Every page dirty, so that no write is the first one to its page.
    dd if=/dev/zero of="${images[ext4]}" bs=1M count=$mib conv=notrunc status=none
    dd if=/dev/zero of="${images[tmpfs]}" bs=1M count=$mib status=none
}

rounds=$1
IFS=, read -ra jobs <<<"$2"
shift 2
echo "boot $(</proc/sys/kernel/random/boot_id)"
make_files

declare -A devices=()
number=0
for peer; do
    disk=${peer%@*} store=${peer#*@} image=${images[${peer#*@}]:-} number=$((number + 1))
    # A process for its `set -e`. It stays: nbdkit ends when the shell that started it does.
    rm -f /run/device
    (set -e; "peer_${disk//-/_}"; echo "$device" >/run/device; exec sleep infinity) 2>/run/why &
    end=$((SECONDS + 60))
    while kill -0 $! 2>/dev/null && [ ! -s /run/device ] && [ $SECONDS -lt $end ]; do sleep 0.01; done
    if [ -s /run/device ]; then
        devices[$peer]=$(</run/device)
        # The same for all, whatever each driver's default is; some have none to choose.
        scheduler=/sys/block/${devices[$peer]#/dev/}/queue/scheduler
        [ ! -w "$scheduler" ] || echo none >"$scheduler" 2>/dev/null
        if fio_run "${devices[$peer]}" randread 131072 128 256; then
            echo "up $peer ${devices[$peer]}"
        else
            echo "down $peer $why"
            unset "devices[$peer]"
        fi
    else
        why=$(tr '\n' ' ' </run/why)
        echo "down $peer ${why:-no disk after 60 s}"
    fi
done

for ((round = 1; round <= rounds; round++)); do
    for job in "${jobs[@]}"; do
        IFS=: read -r name rw block depth ios stores <<<"$job"
        for peer; do
            [[ -z ${devices[$peer]:-} || +$stores+ != *"+${peer#*@}+"* ]] ||
                cell "$peer" "$name" "$rw" "$block" "$depth" "$ios" "$round"
        done
    done
done
echo end
