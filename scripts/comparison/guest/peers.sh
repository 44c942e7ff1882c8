# shellcheck shell=bash
# One function for each peer: makes a block device, which it names in $device. It
# fails with a reason on stderr. Each peer stays up until the guest ends; an idle
# one costs nothing. Sourced by measure.sh, with:
#   peer store number    what is to be made, and a number that no other has
#   image size           the file behind it, if it has one, and its bytes
# shellcheck disable=SC2034,SC2154

port_nvme=4420 port_iscsi=3260 port_nbd=10809
config=/sys/kernel/config

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || { echo "waited in vain for: $*" >&2; return 1; }
        sleep 0.05
    done
}
listens() { busybox netstat -ltn | grep -q ":$1 "; }

# server NAME COMMAND...: in the background; its process id goes to /run/NAME.pid.
server() {
    local name=$1
    shift
    "$@" >"/run/$name.log" 2>&1 &
    echo $! >"/run/$name.pid"
}
# log_of NAME: why it failed, for stderr.
log_of() { tail -n 3 "/run/$1.log" | tr '\n' ' ' >&2; }

# The block layer alone, on memory of its own.
peer_brd() {
    device=/dev/ram0
    dd if=/dev/zero of=$device bs=1M count=$((size >> 20)) oflag=direct status=none
}

peer_loop() {
    modprobe loop
    device=$(losetup -f)
    losetup "$device" "$image"
}

# ringblk_disk VOLUME ZERO-COPY
ringblk_disk() {
    local volume=$1 zero_copy=$2
    modprobe ublk_drv
    device=/dev/ublkb$number
    [ "$store" != direct ] || volume+=,direct=on
    # The name is the device's too, in /dev/ringblk.
    server "$peer" ringblk serve --workers 1 --control "/run/$peer.sock" --volume "v$number=$volume" \
        --ublk "v$number,id=$number,queues=1,depth=128,zero-copy=$zero_copy"
    wait_for 10 test -b "$device" || { log_of "$peer"; return 1; }
}
peer_ringblk_null() { ringblk_disk "null:$size" auto; }
# Several of them have the image, which their lock is there to prevent.
peer_ringblk_file() { ringblk_disk "file:$image,lock=off" auto; }
peer_ringblk_file_zc() { ringblk_disk "file:$image,lock=off" on; }

# rublk_disk TARGET ARG...
rublk_disk() {
    modprobe ublk_drv
    device=/dev/ublkb$number
    server "$peer" rublk add "$1" --number "$number" --queue 1 --depth 128 --foreground --quiet "${@:2}"
    wait_for 10 test -b "$device" || { log_of "$peer"; return 1; }
}
# Its default is O_DIRECT, which tmpfs takes and ignores: asked for the page cache where the others use it.
rublk_loop() {
    local cache=()
    [ "$store" = direct ] || cache=(--buffered-io)
    rublk_disk loop --file "$image" ${cache[@]+"${cache[@]}"} "$@"
}
peer_rublk_null() { rublk_disk null; }
peer_rublk_loop() { rublk_loop; }
peer_rublk_loop_zc() { rublk_loop --zero-copy; }

# The kernel's client and one connection, to nbdkit.
peer_nbd_tcp() {
    modprobe nbd nbds_max=2
    server "$peer" nbdkit -f -i 127.0.0.1 -p $port_nbd file "$image"
    wait_for 10 listens $port_nbd || { log_of "$peer"; return 1; }
    device=/dev/nbd0
    nbd-client 127.0.0.1 $port_nbd $device -C 1 >/dev/null
}
peer_nbd_unix() {
    modprobe nbd nbds_max=2
    server "$peer" nbdkit -f -U /run/nbd file "$image"
    wait_for 10 test -S /run/nbd || { log_of "$peer"; return 1; }
    device=/dev/nbd1
    nbd-client -unix /run/nbd $device -C 1 >/dev/null
}

config_mounted() { modprobe configfs; grep -q "^configfs $config " /proc/mounts || mount -t configfs configfs $config; }

peer_nvme_tcp() {
    local target=$config/nvmet name=nqn.2026-01.test:disk
    config_mounted
    modprobe -a nvmet nvmet-tcp nvme-fabrics nvme-tcp
    mkdir "$target/subsystems/$name" "$target/subsystems/$name/namespaces/1" "$target/ports/1"
    echo 1 >"$target/subsystems/$name/attr_allow_any_host"
    echo -n "$image" >"$target/subsystems/$name/namespaces/1/device_path"
    echo 1 >"$target/subsystems/$name/namespaces/1/buffered_io"
    echo 1 >"$target/subsystems/$name/namespaces/1/enable"
    echo tcp >"$target/ports/1/addr_trtype"
    echo ipv4 >"$target/ports/1/addr_adrfam"
    echo 127.0.0.1 >"$target/ports/1/addr_traddr"
    echo $port_nvme >"$target/ports/1/addr_trsvcid"
    ln -s "$target/subsystems/$name" "$target/ports/1/subsystems/"
    wait_for 10 listens $port_nvme
    echo "transport=tcp,traddr=127.0.0.1,trsvcid=$port_nvme,nqn=$name,nr_io_queues=1" >/dev/nvme-fabrics
    device=/dev/nvme0n1
    wait_for 10 test -b $device
}

peer_iscsi() {
    local store=$config/target/core/fileio_0/disk group=$config/target/iscsi/iqn.2026-01.test:disk/tpgt_1
    config_mounted
    modprobe -a target_core_mod target_core_file iscsi_target_mod iscsi_tcp sd_mod
    mkdir -p "$store"
    echo "fd_dev_name=$image,fd_dev_size=$size,fd_buffered_io=1" >"$store/control"
    echo 1 >"$store/enable"
    mkdir -p "${group%/*}" && mkdir "$group" "$group/lun/lun_0" "$group/np/127.0.0.1:$port_iscsi"
    ln -s "$store" "$group/lun/lun_0/disk"
    for setting in authentication=0 generate_node_acls=1 cache_dynamic_acls=1 demo_mode_write_protect=0; do
        echo "${setting#*=}" >"$group/attrib/${setting%=*}"
    done
    echo 1 >"$group/enable"
    timeout 20 iscsistart -i iqn.2026-01.test:client -t iqn.2026-01.test:disk -g 1 -a 127.0.0.1 -p $port_iscsi \
        >"/run/$peer.log" 2>&1 || { log_of "$peer"; return 1; }
    device=/dev/sda
    wait_for 10 test -b $device
}
