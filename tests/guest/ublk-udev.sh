# shellcheck shell=bash
# What udev makes of our disks, with the rules that we ship (systemd/60-ringblk.rules) and those of systemd.
# Sourced in the guest, after ublk-recovery.sh.

start_udev() {
    mkdir -p /run/udev
    /lib/systemd/systemd-udevd --daemon
    wait_for 20 udevadm control --ping
}
leads() { [ "$(readlink -f "$1")" = "$2" ]; }
has_tag() { udevadm info --query=property "$1" | grep -q '^TAGS=.*:systemd:'; }

udev_names() {
    local device uuid=01234567-89ab-cdef-0123-456789abcdef
    start_udev
    start_plain ""
    device=$(readlink -f /dev/ringblk/p)
    wait_for 20 eval "udevadm info --query=symlink $device | grep -w ringblk/p"
    # What systemd makes a device unit of.
    wait_for 20 has_tag "$device"
    mkfs.ext4 -q -L its-label -U $uuid "$device"
    wait_for 20 leads /dev/disk/by-uuid/$uuid "$device"
    wait_for 20 leads /dev/disk/by-label/its-label "$device"
    # They stay while a service is followed by the next.
    hand_over
    leads /dev/disk/by-uuid/$uuid "$device"
    serve
    up p
    service_stop /dev/ringblk/p
    wait_for 20 absent /dev/disk/by-uuid/$uuid
    # One partition, from 1 MiB on.
    start_plain ""
    device=$(readlink -f /dev/ringblk/p)
    printf '\x00\x00\x00\x00\x83\x00\x00\x00\x00\x08\x00\x00\x00\x40\x00\x00' | dd of="$device" bs=1 seek=446 conv=notrunc status=none
    printf '\x55\xaa' | dd of="$device" bs=1 seek=510 conv=notrunc,fsync status=none
    wait_for 20 blockdev --rereadpt "$device"
    wait_for 20 leads /dev/ringblk/p-part1 "${device}p1"
    mkfs.ext4 -q -U $uuid "${device}p1"
    wait_for 20 leads /dev/disk/by-uuid/$uuid "${device}p1"
    service_stop /dev/ringblk/p
    wait_for 20 absent /dev/ringblk/p-part1
    udevadm control --exit
}

# udev PREFIX: last but for what may hang, since it goes on looking at disks.
udev() {
    check "$1/udev" udev_names
    udevadm control --exit 2>/dev/null || :
}
