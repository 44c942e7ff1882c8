"""What both halves of a comparison and its report share: jobs, the plan of a run, a measurement."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypedDict

MIB = 1 << 20

Condition = str | int | float | None
# What must be equal on both sides of a ratio, by name. None: does not apply to this side (a program that is its
# own client has no client CPUs). See `report.refusal`.
Conditions = Mapping[str, Condition]


class Measurement(TypedDict, total=False):
    """One measured peer, store, job and client in one round: one line of the results."""

    half: Literal["native", "guest"]
    peer: str
    store: str
    job: str
    client: Literal["event", "poll", "fio"]
    round: int
    conditions: Conditions
    # Native: requests per second, latencies in microseconds, CPU microseconds per I/O of each side.
    iops: float
    p50_us: float
    p99_us: float
    p999_us: float
    server_us: float
    client_us: float
    # Guest: thousand guest instructions per I/O, and how many I/Os they were counted over.
    kinsn: float
    ios: int


@dataclass(frozen=True)
class Job:
    """A load: `queues` queues (or connections) of `depth` requests of `block` bytes in flight."""

    name: str
    rw: Literal["randread", "randwrite", "read", "write"]
    block: int
    depth: int
    queues: int = 1

    @property
    def writes(self) -> bool:
        return self.rw in ("randwrite", "write")


JOBS: dict[str, Job] = {
    job.name: job
    for job in (
        Job("randread-qd1", "randread", 4096, 1),
        Job("randread-qd32", "randread", 4096, 32),
        Job("randread-qd128", "randread", 4096, 128),
        Job("randread-4xqd32", "randread", 4096, 32, 4),
        Job("read128k-qd8", "read", 128 << 10, 8),
        Job("randwrite-qd1", "randwrite", 4096, 1),
        Job("randwrite-qd32", "randwrite", 4096, 32),
        Job("randwrite-qd128", "randwrite", 4096, 128),
        Job("write128k-qd8", "write", 128 << 10, 8),
    )
}


@dataclass(frozen=True)
class Seconds:
    """Of one native measurement."""

    measured: float
    # Of load before it.
    ramp: float


@dataclass(frozen=True)
class Note:
    """Something that has no figure, and why: a peer that failed, or a store that this machine does not have."""

    half: Literal["native", "guest"]
    what: str
    why: str


@dataclass
class Plan:
    """What to run, where, and what was noticed on the way."""

    quick: bool
    rounds: int
    # Of each native measurement.
    times: Seconds
    jobs: re.Pattern[str]
    peers: re.Pattern[str]
    # The run's scratch directory, on a disk file system; removed at the end.
    scratch: Path
    # What this peer's programs call themselves: {"qemu-nbd": "qemu-nbd 7.2.22 ..."}.
    versions: dict[str, str] = field(default_factory=dict)
    # Ran and failed.
    failures: list[Note] = field(default_factory=list)
    # Was not tried.
    absent: list[Note] = field(default_factory=list)
    # Another build of ringblk, which is a peer then.
    against: Path | None = None

    def wants(self, peer: str, job: str, client: str = "event", store: str = "") -> bool:
        """Whether --peers and --jobs choose it; --jobs sees "STORE/JOB/CLIENT"."""
        return bool(self.peers.search(peer) and self.jobs.search(f"{store}/{job}/{client}"))

    def say(self, text: str) -> None:
        """A line of progress, on stderr."""
        print(f"compare: {text}", file=sys.stderr, flush=True)


class Progress:
    """Tells how many of `total` steps are done and how long the rest will take."""

    def __init__(self, plan: Plan, total: int) -> None:
        self.plan, self.total, self.done, self.start = plan, total, 0, time.monotonic()

    def step(self, text: str) -> None:
        """Call before each step."""
        left = "?"
        if self.done:
            left = clock((time.monotonic() - self.start) / self.done * (self.total - self.done))
        self.done += 1
        self.plan.say(f"{self.done} of {self.total}, {left} left: {text}")


def clock(seconds: float) -> str:
    """"12:05" of 725 seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
