"""Which native job runs on which store against which peers, in --quick and in full."""

from __future__ import annotations

from dataclasses import dataclass

from .model import JOBS, Job, Plan
from .peers import AGAINST, NOTED, OPEN, Peer

VHOST = ("ringblk", "qsd", "qsd-threads")
ALL = (*VHOST, "nbdkit", "nbdkit-tcp", "qemu-nbd", "qemu-nbd-tcp", "fio", "fio-batched")
POLLED = ("randread-qd1", "randread-qd32", "randread-qd128")


@dataclass(frozen=True)
class Cell:
    """What the peers take turns at."""

    store: str
    job: Job
    client: str
    peers: tuple[Peer, ...]


# (store, client) to (jobs, peers); what is named first is run first. Reads before writes: they find the store as it
# was made in the first round, and what a load generator writes is as random as that.
Rows = list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]

FULL: Rows = [
    ("ext4", "event", tuple(JOBS), ALL),
    ("ext4", "event", ("randread-qd32",), (NOTED, OPEN)),
    ("ext4", "poll", POLLED, (*VHOST, "nbdkit", "qemu-nbd")),
    ("direct", "event", ("randread-qd1", "randread-qd32", "randread-qd128", "randread-4xqd32", "read128k-qd8",
                         "randwrite-qd32"), ALL),
    ("null", "event", ("randread-qd1", "randread-qd32", "randread-qd128", "randread-4xqd32"), ALL),
    ("null", "poll", ("randread-qd1", "randread-qd32"), ALL),
    ("memory", "event", ("randread-qd1", "randread-qd32", "randread-qd128", "read128k-qd8", "randwrite-qd32"), ALL),
    ("tmpfs", "event", ("randread-qd1", "randread-qd32", "randread-qd128", "randread-4xqd32", "read128k-qd8",
                        "randwrite-qd32"), (*VHOST, "nbdkit", "fio", "fio-batched")),
    ("zram", "event", ("randread-qd32", "randread-qd128", "read128k-qd8", "randwrite-qd32"), ALL),
    ("zram-cached", "event", ("randread-qd32", "randwrite-qd32"), ALL),
]  # fmt: skip

QUICK: Rows = [
    ("ext4", "event", ("randread-qd1", "randread-qd128", "randread-4xqd32", "read128k-qd8", "randwrite-qd32"), VHOST),
    ("ext4", "event", ("randread-qd32",), ALL),
    ("ext4", "poll", ("randread-qd1",), VHOST),
    ("direct", "event", ("randread-qd32", "randread-qd128"), VHOST),
    ("null", "event", ("randread-qd32", "randread-qd128"), VHOST),
]


def cells(plan: Plan, peers: list[Peer]) -> list[Cell]:
    """Those that --jobs and --peers choose. fio has no client that could poll, and one thread."""
    chosen = []
    for store, client, jobs, names in QUICK if plan.quick else FULL:
        for job in (JOBS[name] for name in jobs):
            takers = tuple(
                peer
                for peer in peers
                if ("ringblk" if peer.name == AGAINST else peer.name) in names
                and store in peer.stores
                and (peer.quick or not plan.quick)
                and not (peer.serve is None and (client == "poll" or job.queues > 1))
                and plan.wants(peer.name, job.name, client, store)
            )
            if takers:
                chosen.append(Cell(store, job, client, takers))
    return chosen
