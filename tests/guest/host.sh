# shellcheck shell=bash
# The host's half of the suite for one kernel. Sourced by scripts/guest-suite, with:
#   series kernel   "6.12", and its directory
#   work results    a scratch directory, and the file that collects the lines
#   scripts suite tools ublk_tools      what to boot with
# shellcheck disable=SC2034,SC2154

guest='' nbd=''
# shellcheck disable=SC2317 # called by the trap
clean_up_kernel() {
    [ -z "$guest" ] || kill "$guest" 2>/dev/null || :
    [ ! -s "$work/qemu.pid" ] || kill -KILL "$(<"$work/qemu.pid")" 2>/dev/null || :
    [ -z "$nbd" ] || kill "$nbd" 2>/dev/null || :
    service_kill 2>/dev/null || :
}

report() { tee -a "$results"; }

# boot NAME ARG...: a guest in the background; what it prints goes to NAME.out and to us.
boot() {
    local name=$1
    shift
    rm -f "$work/qemu.pid"
    "$scripts/guest" --kernel "$kernel" --timeout 3600 --out "$work/$series-$name" --pid-file "$work/qemu.pid" "${tools[@]}" "$@" \
        > >(tee "$work/$name.out" | grep --line-buffered -E '^(ok|not ok|skip|    \|) ' | report) 2>"$work/$name.err" &
    guest=$!
}

# until_said NAME LINE: waits for the guest to print it, or to end.
until_said() {
    until grep -qx "$2" "$work/$1.out" 2>/dev/null; do
        kill -0 "$guest" 2>/dev/null || { cat "$work/$1.err"; fail "the guest ended before it said: $2"; }
        sleep 0.2
    done
}

ended() {
    local rc=0
    wait "$guest" || rc=$?
    guest=''
    echo "$rc" >"$work/guest.status"
}
ended_well() { cat "$work/$1.err"; equal "exit status of the guest" "$(<"$work/guest.status")" 0; grep -qx "end of $1" "$work/$1.out"; }
kill_guest() { [ ! -s "$work/qemu.pid" ] || kill -KILL "$(<"$work/qemu.pid")" 2>/dev/null || :; ended; }

# vhost_disk VOLUME QUEUES. QEMU 10.0.13 gives the guest 1024 descriptors, whatever
# queue-size says, but keeps notes for as many as that says: so all say 1024.
vhost_disk() {
    extra+=(--qemu -chardev --qemu "socket,id=$1,path=$work/$1.sock"
        --qemu -device --qemu "vhost-user-blk-pci,chardev=$1,num-queues=$2,queue-size=1024")
}
plain_disk() { extra+=(--qemu -drive --qemu "file=$work/$1.img,format=raw,if=virtio,file.locking=off$2"); }

told() { sed -n "s/^sum $1 //p" "$work/vhost-user.out"; }
head_sum() { head -c $((16 << 20)) "$work/$1.img" | sha256sum | cut -d' ' -f1; }
same_sum() { equal "what the guest read of $1, and its file" "$(told "$1")" "$(head_sum "$1")"; }
connected() { service_json | jq -e ".exports[] | select(.volume == \"$1\") | .connected"; }
left_alone() {
    service_ended && fail "ringblk ended when the VMM was killed: $(tail -n 5 "$SERVICE.log")"
    wait_for 10 fails connected one
    wait_for 10 fails connected two
}

enlarge() {
    until_said vhost-user "make vdb larger now"
    ringblk resize two +10M --control "$SERVICE.control"
    equal "bytes of the image" "$(stat -c %s "$work/two.img")" $((340 << 20))
}

start_service() {
    local v
    truncate -s 320M "$work/one.img"
    truncate -s 330M "$work/two.img"
    head -c 16M /dev/urandom >"$work/ro.img"
    truncate -s 64M "$work/nbd.img" "$work/y.img"
    service_start --workers 2 \
        --volume "one=file:$work/one.img" --vhost-user "one=$work/one.sock,queues=1,queue-size=1024" \
        --volume "two=file:$work/two.img,direct=on" --vhost-user "two=$work/two.sock,queues=2,queue-size=1024" \
        --volume "ro=file:$work/ro.img,read-only=on" --vhost-user "ro=$work/ro.sock,queue-size=1024" \
        --volume "nbd=nbd:nbd+unix:///?socket=$work/nbd.nbd" --vhost-user "nbd=$work/nbd.sock,queues=2,queue-size=1024" \
        --volume "y=file:$work/y.img" --vhost-user "y=$work/y.sock,queues=2,queue-size=1024"
    for v in one two ro nbd y; do
        wait_for 10 test -S "$work/$v.sock"
        equal "mode of the socket" "$(stat -c %a "$work/$v.sock")" 600
    done
}

one_kernel() {
    local p=$series extra=()
    trap clean_up_kernel EXIT
    trap 'exit 130' INT TERM
    truncate -s 64M "$work/nbd.img"
    qemu-nbd -f raw -t -e 8 -x '' --discard=unmap -k "$work/nbd.nbd" "$work/nbd.img" &
    nbd=$!
    wait_for 10 test -S "$work/nbd.nbd"
    check "$p/vhost-user/start" start_service | report

    vhost_disk one 1; vhost_disk two 2; vhost_disk ro 1; vhost_disk nbd 2
    boot vhost-user --module virtio_blk --module xfs "${extra[@]}" "$suite/vhost-user.sh" "$p/vhost-user"
    check "$p/vhost-user/resize" enlarge | report
    check "$p/vhost-user/all-said" until_said vhost-user "kill me now" | report
    sleep 0.5
    kill_guest
    check "$p/vhost-user/read-only/same-sum" same_sum ro | report
    check "$p/vhost-user/nbd/same-sum" same_sum nbd | report
    check "$p/vmm-killed/service-stays" left_alone | report
    check "$p/vmm-killed/same-sum" same_sum two | report

    extra=()
    truncate -s 256M "$work/swap.img"
    plain_disk one ,snapshot=on; plain_disk y ""; plain_disk swap ""
    boot ublk --memory 2G --module virtio_blk "${ublk_tools[@]}" "${extra[@]}" "$suite/ublk.sh" "$p/ublk" "$series"
    ended
    check "$p/ublk/all-said" ended_well ublk | report

    extra=()
    vhost_disk one 1; vhost_disk two 2; vhost_disk y 2
    boot again --module virtio_blk --module xfs "${extra[@]}" "$suite/vhost-user-again.sh" "$p/vmm-restarted" "$(told two)"
    check "$p/vmm-restarted/all-said" until_said again "stop the service now" | report
    check "$p/vmm-restarted/stop-under-load" service_stop "$work"/{one,two,ro,nbd,y}.sock | report
    kill_guest
    kill "$nbd"
    wait "$nbd" || :
    nbd=''
}
