# shellcheck shell=bash
# Memory: a machine that swaps to a disk of ours. Sourced in the guest, after ublk-recovery.sh. It needs a disk of its
# own for the swap file, /dev/vdc, and comes last: what goes wrong here may hang the machine.

field() { awk -v f="$1:" '$1 == f { print $2 }' "$2"; }
noise() { local n; for n in $(seq "$1"); do cat /run/noise; done; }

# squeeze MIB: leaves so much memory to be had, and the rest to huge pages that nobody uses.
squeeze() {
    local spare
    echo 3 >/proc/sys/vm/drop_caches
    spare=$(($(field MemAvailable /proc/meminfo) / 1024 - $1))
    [ $spare -le 0 ] || echo $((spare / 2)) >/proc/sys/vm/nr_hugepages
    spare=$(($(field MemAvailable /proc/meminfo) / 1024))
    echo "left: $spare MiB"
    at_least "MiB more than is left" $(($1 + 64)) $spare
}
relax() { echo 0 >/proc/sys/vm/nr_hugepages; }

# Where the buffers are is seen, and that they are all there before the first request.
locked() {
    local status
    rm -f /tmp/p.img
    truncate -s "$small" /tmp/p.img
    serve --volume p=file:/tmp/p.img --ublk p,queues=2,zero-copy=off
    up p
    status=/proc/$(service_pid)/status
    equal "bytes of buffers" "$(export_field p buffer_bytes)" $((32 * MiB))
    equal "locked" "$(export_field p buffers_locked)" true
    at_least "KiB locked" "$(field VmLck $status)" $((32 * 1024))
    at_least "KiB resident" "$(field VmRSS $status)" $((32 * 1024))
    ringblk list --control "$SERVICE.control" | grep '32.0 MiB locked'
    service_stop /dev/ringblk/p
    # A machine's memory is not given away.
    SERVED=(--volume p=file:/tmp/p.img --ublk p,queues=2,zero-copy=off,depth=4096,max-io=1M)
    refused 20 max-io 'quarter of this machine'
}
# Without the right to lock it serves all the same, and says what that means.
not_locked() {
    rm -f /tmp/p.img
    truncate -s "$small" /tmp/p.img
    (
        ulimit -l 64
        serve --sandbox=off --volume p=file:/tmp/p.img --ublk p,queues=1,zero-copy=off
    )
    up p
    service_stop /dev/ringblk/p
}

swapped() { awk '$1 == "pswpout" { print $2 }' /proc/vmstat; }
# swap_ends: runs when a check of swap ends, also one that failed, so that the next finds the machine as it was.
swap_ends() {
    relax
    ! grep -q "^/dev/ublk" /proc/swaps || busybox swapoff /dev/ringblk/s
    service_kill
    ! grep -q ' /mnt/swap ' /proc/mounts || umount /mnt/swap
}
# swap FILE OPTIONS UBLK-OPTIONS: more is used than there is, and what comes back is what was put there. FILE is on a file
# system of /dev/vdc, or that itself.
swap() {
    local file=$1 before used
    trap swap_ends EXIT
    head -c $MiB /dev/urandom >/run/noise
    if [ "$file" != /dev/vdc ]; then
        mkdir -p /mnt/swap
        mkfs.ext4 -q -F /dev/vdc
        mount /dev/vdc /mnt/swap
        # Written, not sparse: no block has to be found for it later.
        noise 192 | dd of="$file" bs=1M iflag=fullblock conv=fsync status=none
    fi
    serve --volume "s=file:$file$2" --ublk "s,queues=1$3"
    up s
    busybox mkswap /dev/ringblk/s
    busybox swapon /dev/ringblk/s
    squeeze 128
    # Anonymous memory: all of it is kept until the last byte has come. Far more than is left, since the kernel can do
    # with less than it says (watermarks, caches).
    used=$(($(field MemAvailable /proc/meminfo) / 1024 + 96))
    before=$(swapped)
    noise $used | busybox tail -c $((used * MiB)) | cmp - <(noise $used)
    at_least "pages written to swap" $(($(swapped) - before)) 4096
    equal "KiB of the service in swap" "$(field VmSwap "/proc/$(service_pid)/status")" 0
    relax
    busybox swapoff /dev/ringblk/s
    service_stop /dev/ringblk/s
}

# memory PREFIX KERNEL-SERIES
memory() {
    local p=$1/memory CHECK_TIMEOUT=240
    check "$p/locked" locked
    check "$p/not-locked" not_locked
    check "$p/swap/device" swap /dev/vdc ,direct=on ,zero-copy=off
    if [ "$2" = 6.12 ]; then
        echo "skip $p/swap/zero-copy: kernel 6.12 has none"
        echo "skip $p/swap/copy: on a file of ext4, kernel 6.12 did not pass in four minutes of an emulated machine"
        echo "skip $p/swap/buffered: as above"
        return
    fi
    check "$p/swap/zero-copy" swap /mnt/swap/file ,direct=on ,zero-copy=on
    check "$p/swap/copy" swap /mnt/swap/file ,direct=on ,zero-copy=off
    check "$p/swap/buffered" swap /mnt/swap/file "" ,zero-copy=off
}
