# shellcheck shell=bash
# The checks of ublk.sh. Sourced in the guest, after check.sh and disk.sh.

size=$((320 * MiB)) # the least that mkfs.xfs takes is 300 MiB
small=$((64 * MiB))

# An error that names what is missing, and nothing created.
without_driver() {
    truncate -s "$small" /tmp/none.img
    fails_within 20 ringblk serve --volume "none=file:/tmp/none.img" --ublk none 2>/tmp/said
    cat /tmp/said
    grep -q ublk_drv /tmp/said || fail "the error does not name the module ublk_drv"
    absent /dev/ringblk/none
}

features() {
    ringblk features
    ringblk features --json | jq -e . >/dev/null
}

# A real file system for O_DIRECT, and block devices: with 512-byte blocks and with 4 KiB.
prepare() {
    truncate -s 900M /tmp/scratch
    truncate -s "$small" /tmp/loop1
    losetup /dev/loop0 /tmp/scratch
    losetup /dev/loop1 /tmp/loop1
    mkfs.ext4 -q -E nodiscard /dev/loop0
    mkdir -p /mnt/scratch
    mount /dev/loop0 /mnt/scratch
    echo $small >/sys/block/zram0/disksize
}

# up NAME: the stable name leads to a ublk disk, and the service says the same.
up() {
    local link=/dev/ringblk/$1 device
    wait_for 20 test -b "$link"
    device=$(readlink -f "$link")
    [[ $device =~ ^/dev/ublkb[0-9]+$ ]] || fail "$link leads to $device"
    equal "device in list" "$(export_field "$1" device)" "$device"
}
# export_field VOLUME FIELD: of its ublk export
export_field() { service_json | jq -r ".exports[] | select(.kind == \"ublk\" and .volume == \"$1\") | .$2"; }

start_disk() {
    local name=$1 volume=$2 options=$3 zero_copy=$4
    truncate -s $size "$5"
    service_start --workers 2 --volume "$name=$volume" --ublk "$name,$options"
    up "$name"
    equal "zero copy" "$(export_field "$name" zero_copy)" "$zero_copy"
    ringblk list --control "$SERVICE.control" | tee /dev/stderr | grep -q "$name"
}

# disk TITLE NAME VOLUME UBLK-OPTIONS ZERO-COPY QUEUES FILE: everything, on one disk.
disk() {
    local title=$1 dev=/dev/ringblk/$2 file=$7
    check "$title/start" start_disk "$2" "$3" "$4" "$5" "$file"
    [ "$CHECKED" = 0 ] || return 0
    check "$title/geometry" disk_geometry "$dev" $size 512 "$6"
    check "$title/fio-verify" disk_fio "$dev"
    check "$title/same-bytes-in-file" disk_same_as "$dev" "$file" $((32 * MiB))
    check "$title/flush" disk_flush "$dev"
    check "$title/discard" disk_discard "$dev" zero "$file"
    check "$title/write-zeroes" disk_zeroout "$dev"
    check "$title/ext4" disk_fs "$dev" ext4
    check "$title/xfs" disk_fs "$dev" xfs
    check "$title/same-bytes-after-fs" disk_same_as "$dev" "$file"
    check "$title/stop" service_stop "$(readlink -f "$dev")" "$dev"
    rm -f "$file"
}

zero_copy_refused() {
    truncate -s "$small" /tmp/zc.img
    fails_within 20 ringblk serve --volume zc=file:/tmp/zc.img --ublk zc,zero-copy=on 2>/tmp/said
    cat /tmp/said
    grep -qi 'zero.copy' /tmp/said || fail "the error does not say that zero copy is the reason"
}

# zero_copy_auto IMAGE OPTIONS WHETHER: what is chosen. The kernel drops a flag it
# does not know without a word: what came back counts.
zero_copy_auto() {
    truncate -s "$small" "$1"
    service_start --volume "zc=file:$1$2" --ublk zc,zero-copy=auto
    up zc
    equal "zero copy" "$(export_field zc zero_copy)" "$3"
    disk_fio /dev/ringblk/zc
    disk_same_as /dev/ringblk/zc "$1"
    service_stop /dev/ringblk/zc
    rm "$1"
}

nbd_servers() {
    local f
    for f in kit-unix kit-tcp qemu-unix qemu-tcp; do truncate -s "$small" /tmp/nbd-$f; done
    nbdkit -P /run/kit-unix.pid -U /run/kit-unix.sock file /tmp/nbd-kit-unix
    nbdkit -P /run/kit-tcp.pid -i 127.0.0.1 -p 10901 file /tmp/nbd-kit-tcp
    qemu-nbd --fork -f raw -t -e 8 -x '' --discard=unmap -k /run/qemu-unix.sock /tmp/nbd-qemu-unix
    qemu-nbd --fork -f raw -t -e 8 -x '' --discard=unmap -b 127.0.0.1 -p 10902 /tmp/nbd-qemu-tcp
}

start_many() {
    head -c $small /dev/urandom >/tmp/ro.img
    sha256sum /tmp/ro.img >/tmp/ro.sum
    nbd_servers
    service_start --workers 2 \
        --volume loop=file:/dev/loop1 --ublk loop,queues=2 \
        --volume zram=file:/dev/zram0,direct=on --ublk zram,queues=1 \
        --volume memory=memory:64M --ublk memory,queues=2 \
        --volume null=null:64M --ublk null,queues=1 \
        --volume ro=file:/tmp/ro.img,read-only=on --ublk ro,queues=1 \
        --volume 'kit-unix=nbd:nbd+unix:///?socket=/run/kit-unix.sock' --ublk kit-unix,queues=2 \
        --volume nbd-kit-tcp=nbd:nbd://127.0.0.1:10901/ --ublk nbd-kit-tcp,queues=1 \
        --volume 'qemu-unix=nbd:nbd+unix:///?socket=/run/qemu-unix.sock' --ublk qemu-unix,queues=2 \
        --volume nbd-qemu-tcp=nbd:nbd://127.0.0.1:10902/ --ublk nbd-qemu-tcp,queues=1
    for v in loop zram memory null ro kit-unix nbd-kit-tcp qemu-unix nbd-qemu-tcp; do up $v; done
}

null_reads() {
    fio_run /dev/ringblk/null --rw=randrw --bsrange=512-256k --iodepth=16 --size=$((16 * MiB))
    at_least "bytes read and written" "$(jq '.jobs[0].read.io_bytes + .jobs[0].write.io_bytes' <<<"$FIO")" $((16 * MiB))
}

read_only() {
    disk_read_only /dev/ringblk/ro
    sha256sum -c /tmp/ro.sum
}

# many_volumes PREFIX: one service, two workers, nine disks of every kind of volume.
many_volumes() {
    local p=$1/many d=/dev/ringblk v inside
    check "$p/start" start_many
    [ "$CHECKED" = 0 ] || return 0
    check "$p/loop/geometry" disk_geometry $d/loop $small 512 2
    check "$p/loop/fio-verify" disk_fio $d/loop
    check "$p/loop/discard" disk_discard $d/loop zero /tmp/loop1
    check "$p/loop/same-bytes" disk_same_as $d/loop /dev/loop1
    check "$p/zram/geometry" disk_geometry $d/zram $small 4096 1
    check "$p/zram/same-bytes" disk_same_as $d/zram /dev/zram0
    check "$p/null/reads" null_reads
    for v in zram memory kit-unix nbd-kit-tcp qemu-unix nbd-qemu-tcp; do
        check "$p/$v/fio-verify" disk_fio $d/$v
        # An NBD server may leave anything in what it discarded.
        case $v in zram | memory) inside=zero ;; *) inside=any ;; esac
        check "$p/$v/discard" disk_discard $d/$v $inside
    done
    for v in loop zram memory kit-unix qemu-unix; do
        check "$p/$v/write-zeroes" disk_zeroout $d/$v
        check "$p/$v/ext4" disk_fs $d/$v ext4
    done
    check "$p/nbd-kit-tcp/same-bytes" disk_same_as $d/nbd-kit-tcp /tmp/nbd-kit-tcp
    check "$p/nbd-qemu-tcp/same-bytes" disk_same_as $d/nbd-qemu-tcp /tmp/nbd-qemu-tcp
    check "$p/read-only" read_only
    check "$p/stop" service_stop $d/{loop,zram,memory,null,ro,kit-unix,nbd-kit-tcp,qemu-unix,nbd-qemu-tcp}
    check "$p/no-disk-left" fails ls -d /sys/block/ublkb*
}

# One volume behind both doors at once: what goes in through one comes out
# through the other.
both_doors() {
    local sum
    truncate -s $small /tmp/both.img
    service_start --volume both=file:/tmp/both.img --ublk both,queues=2 --vhost-user both=/run/both.sock,queues=2
    up both
    head -c $small /dev/urandom | dd of=/dev/ringblk/both bs=1M oflag=direct iflag=fullblock conv=fsync status=none
    sum=$(sha256sum </tmp/both.img)
    # In through vhost-user: the load generator fills what it writes with one byte.
    /opt/load --socket /run/both.sock --cpu -1 --rw write --bs 64K --depth 8 --queues 2 --span 8M --ramp 0 --count 512
    fails test "$sum" = "$(sha256sum </tmp/both.img)"
    cmp /tmp/both.img <(region /dev/ringblk/both 0 $small)
    # And both at work together, on parts of their own.
    /opt/load --socket /run/both.sock --cpu -1 --rw randwrite --depth 32 --span 8M --runtime 5 &
    fio_run /dev/ringblk/both --rw=randwrite --bs=4k --iodepth=32 --offset=16m --size=16m --verify=crc32c --verify_fatal=1
    at_least "bytes verified" "$(jq '.jobs[0].read.io_bytes' <<<"$FIO")" $((16 * MiB))
    wait $!
    disk_same_as /dev/ringblk/both /tmp/both.img
    service_stop /dev/ringblk/both /run/both.sock
}

filled_by_vhost_user() {
    service_start --volume x=file:/dev/vda --ublk x
    up x
    disk_filled /dev/ringblk/x
    service_stop /dev/ringblk/x
}

fill_for_vhost_user() {
    service_start --volume y=file:/dev/vdb --ublk y,queues=2
    up y
    disk_fill /dev/ringblk/y /mnt
    umount /mnt
    service_stop /dev/ringblk/y
}
