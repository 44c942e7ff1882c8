#!/bin/bash
# The soak inside a guest: soak.sh SEED KILLS HAND-OVERS
# /dev/vda is a vhost-user disk whose ringblk the host kills until it has enough and says so.
# Meanwhile ringblk runs in here, with a ublk disk under the same load, and is killed in here.
seed=$1 kills=$2 hand_overs=$3
control=/run/ringblk.control
rc=0

modprobe ublk_drv || exit 1
truncate -s 8M /tmp/ublk.img
soak disk /dev/vda --threads 8 --seed "$seed" --limit 120 --json /out/vhost-user.json &
outer=$!
soak disk /dev/ringblk/soak --threads 8 --seed "$seed" --kills "$kills" --stops "$hand_overs" --limit 120 \
    --json /out/ublk.json --control "$control" -- \
    ringblk serve --control "$control" --volume soak=file:/tmp/ublk.img --ublk soak,queues=2 || rc=1
read -r _ </run/port-control
kill -TERM $outer
wait $outer || rc=1
[ $rc = 0 ] || tail -n 30 /run/ringblk.log
exit $rc
