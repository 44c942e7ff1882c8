# shellcheck shell=bash
# Checks that any of our block devices must pass, whichever door it came
# through. Each takes the device's path. Sourced in the guest, after check.sh.

MiB=1048576

# sysfs directory of a device: /dev/ringblk/x -> /sys/block/ublkb0
sys_of() { echo "/sys/block/$(basename "$(readlink -f "$1")")"; }

# stat_of DEV FIELD: from /sys/block/*/stat; 1 reads, 5 writes, 12 discards, 16 flushes
stat_of() { awk -v f="$2" '{ print $f }' "$(sys_of "$1")/stat"; }

# What the kernel sees: size in bytes, logical block, hardware queues.
disk_geometry() {
    local dev=$1 size=$2 block=$3 queues=$4 sys
    sys=$(sys_of "$dev")
    equal "size in bytes" "$(blockdev --getsize64 "$dev")" "$size"
    equal "logical block" "$(cat "$sys/queue/logical_block_size")" "$block"
    equal "hardware queues" "$(find "$sys/mq" -mindepth 1 -maxdepth 1 -type d | wc -l)" "$queues"
}

# A cache that can be flushed, and a flush that reaches us.
disk_flush() {
    local dev=$1 before
    equal "cache" "$(cat "$(sys_of "$dev")/queue/write_cache")" "write back"
    before=$(stat_of "$dev" 16)
    dd if=/dev/urandom of="$dev" bs=64k count=4 conv=fsync status=none
    dd if=/dev/urandom of="$dev" bs=4k count=4 oflag=direct,dsync status=none
    at_least "flushes seen by the kernel" "$(($(stat_of "$dev" 16) - before))" 1
}

# fio_run DEV ARG...: fio with its result in $FIO as JSON; any error fails.
fio_run() {
    local dev=$1
    shift
    FIO=$(fio --name=check --filename="$dev" --direct=1 --ioengine=io_uring --thread \
        --randseed=20261122 --output-format=json "$@") || { echo "$FIO"; fail "fio failed: $*"; }
    equal "fio's errors" "$(jq '[.jobs[].error] | add' <<<"$FIO")" 0
}

# Mixed block sizes, sectors to 256 KiB, several in flight; then every byte of
# it is read back and checked. Some blocks are trimmed after they were written.
disk_fio() {
    local dev=$1 size=$((16 * MiB)) block
    block=$(cat "$(sys_of "$dev")/queue/logical_block_size")
    fio_run "$dev" --rw=randwrite --bsrange="$block-256k" --bs_unaligned=0 --iodepth=16 \
        --size=$size --verify=crc32c --verify_fatal=1
    equal "bytes written" "$(jq '.jobs[0].write.io_bytes' <<<"$FIO")" $size
    at_least "bytes verified" "$(jq '.jobs[0].read.io_bytes' <<<"$FIO")" $size
    # Reads and writes in flight together, on the part not verified above.
    fio_run "$dev" --rw=randrw --rwmixread=50 --bsrange="$block-64k" --iodepth=32 \
        --offset=$size --size=$((8 * MiB)) --verify=crc32c --verify_fatal=1
    at_least "bytes read and written" "$(jq '.jobs[0].read.io_bytes + .jobs[0].write.io_bytes' <<<"$FIO")" $((8 * MiB))
    # Trims, with the next ones and writes of a second job in flight.
    fio_run "$dev" --bs=64k --iodepth=8 --size=$((4 * MiB)) --rw=randtrim --offset=$((24 * MiB)) \
        --name=writes --filename="$dev" --direct=1 --ioengine=io_uring --thread --rw=randwrite \
        --bs=64k --iodepth=8 --size=$((4 * MiB)) --offset=$((28 * MiB))
    equal "bytes trimmed" "$(jq '.jobs[0].trim.io_bytes' <<<"$FIO")" $((4 * MiB))
    equal "bytes written beside" "$(jq '.jobs[1].write.io_bytes' <<<"$FIO")" $((4 * MiB))
}

# disk_same_as DEV FILE [BYTES]: through the device every byte (or the first BYTES)
# is the byte of what backs it.
disk_same_as() {
    sync "$1" "$2"
    blockdev --flushbufs "$1"
    cmp ${3:+-n "$3"} "$1" "$2"
}

# A check that fails must not leave the disk in use for the next one.
# shellcheck disable=SC2064 # the directory is known now
unmount_at_end() { trap "umount '$1' 2>/dev/null || :" EXIT; }

# Make a file system, fill it, unmount, check it offline, mount again, compare.
disk_fs() {
    local dev=$1 type=$2 mnt sums
    mnt=$(mktemp -d) sums=$(mktemp)
    unmount_at_end "$mnt"
    case $type in
        ext4) mkfs.ext4 -q -F "$dev" ;;
        xfs) mkfs.xfs -q -f "$dev" ;;
    esac
    mount -t "$type" "$dev" "$mnt"
    mkdir "$mnt/copy"
    # Small ones, so that they fit on the smallest disk.
    find /suite /cache -type f -size -512k -exec cp {} "$mnt/copy/" \;
    dd if=/dev/urandom of="$mnt/random" bs=1M count=8 conv=fsync status=none
    (cd "$mnt" && find . -type f -exec sha256sum {} +) >"$sums"
    at_least "files copied" "$(wc -l <"$sums")" 20
    umount "$mnt"
    case $type in
        ext4) e2fsck -f -n "$dev" ;;
        xfs) xfs_repair -n "$dev" ;;
    esac
    blockdev --flushbufs "$dev"
    mount -t "$type" -o ro "$dev" "$mnt"
    (cd "$mnt" && sha256sum -c --quiet "$sums")
    umount "$mnt"
}

# disk_fill DEV DIR: a file system with files and their checksums, left mounted
# on DIR and flushed, for someone else to check.
disk_fill() {
    mkfs.ext4 -q -F "$1"
    mount -t ext4 "$1" "$2"
    cp -r /suite /cache "$2/"
    (cd "$2" && find . -type f ! -name sums -exec sha256sum {} + >sums)
    sync -f "$2"
}

# disk_filled DEV: what disk_fill put there is there.
disk_filled() {
    local mnt
    mnt=$(mktemp -d)
    unmount_at_end "$mnt"
    mount -t ext4 "$1" "$mnt"
    at_least "files" "$(wc -l <"$mnt/sums")" 20
    (cd "$mnt" && sha256sum -c --quiet sums)
    umount "$mnt"
    e2fsck -f -n "$1"
}

# region DEV OFFSET LENGTH: its bytes, past the page cache.
region() { dd if="$1" bs=64k iflag=direct,skip_bytes,count_bytes skip="$2" count="$3" status=none; }
zeroes() { head -c "$1" /dev/zero; }

# Fills 8 MiB with noise, lets COMMAND take [3 MiB, 5 MiB) away, and compares:
# noise before and after, and between it what INSIDE says (zero, or any).
punched() {
    local inside=$1 dev=$2 noise
    shift 2
    noise=$(mktemp)
    head -c $((8 * MiB)) /dev/urandom >"$noise"
    dd if="$noise" of="$dev" bs=1M oflag=direct conv=fsync status=none
    "$@" -o $((3 * MiB)) -l $((2 * MiB)) "$dev"
    cmp -n $((3 * MiB)) "$noise" <(region "$dev" 0 $((3 * MiB)))
    [ "$inside" = any ] || cmp <(zeroes $((2 * MiB))) <(region "$dev" $((3 * MiB)) $((2 * MiB)))
    cmp <(tail -c +$((5 * MiB + 1)) "$noise") <(region "$dev" $((5 * MiB)) $((3 * MiB)))
    rm "$noise"
}

# disk_discard DEV INSIDE [FILE]: with FILE behind it, its blocks must be given back.
disk_discard() {
    local dev=$1 inside=$2 file=${3:-} before=0
    at_least "discard limit" "$(cat "$(sys_of "$dev")/queue/discard_max_bytes")" 1
    if [ -n "$file" ]; then
        dd if=/dev/urandom of="$dev" bs=1M count=8 oflag=direct conv=fsync status=none
        sync "$file"
        before=$(stat -c %b "$file")
    fi
    punched "$inside" "$dev" blkdiscard
    [ -z "$file" ] || at_least "512-byte blocks given back by $file" $((before - $(stat -c %b "$file"))) 4096
}

# Without a limit of its own the kernel would write zeroes itself, and prove nothing.
disk_zeroout() {
    local dev=$1 block
    at_least "write-zeroes limit" "$(cat "$(sys_of "$dev")/queue/write_zeroes_max_bytes")" 1
    punched zero "$dev" blkdiscard -z
    # And a range of odd blocks, that no hole fits.
    block=$(cat "$(sys_of "$dev")/queue/logical_block_size")
    dd if=/dev/urandom of="$dev" bs=64k count=1 oflag=direct status=none
    blkdiscard -z -o "$block" -l $((3 * block)) "$dev"
    cmp <(zeroes $((3 * block))) <(region "$dev" "$block" $((3 * block)))
    fails cmp -s <(zeroes "$block") <(region "$dev" 0 "$block")
    fails cmp -s <(zeroes "$block") <(region "$dev" $((4 * block)) "$block")
}

# Reads work, and no kind of write does.
disk_read_only() {
    local dev=$1 before
    equal "read-only flag" "$(blockdev --getro "$dev")" 1
    before=$(region "$dev" 0 $MiB | sha256sum)
    fails dd if=/dev/urandom of="$dev" bs=4k count=1 oflag=direct status=none
    fails blkdiscard "$dev"
    fails blkdiscard -z "$dev"
    # The flag is the kernel's; without it the refusal must be ours.
    if blockdev --setrw "$dev" 2>/dev/null && [ "$(blockdev --getro "$dev")" = 0 ]; then
        fails dd if=/dev/urandom of="$dev" bs=4k count=1 oflag=direct status=none
    fi
    blockdev --flushbufs "$dev"
    equal "contents" "$(region "$dev" 0 $MiB | sha256sum)" "$before"
}
