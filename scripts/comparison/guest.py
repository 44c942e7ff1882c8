"""The guest half: thousand guest instructions per I/O of block devices, all of them in one boot of one kernel.

The guest counts (scripts/guest --icount: a virtual nanosecond is an instruction) and prints; guest/measure.sh says how.
Here it is decided what to measure, and what the programs come from. It needs neither KVM nor a ublk driver on this
machine, and a busy machine makes it slower but does not change the figures.

Instructions are no time: a copy weighs as much as its instructions, and a wake-up of another CPU or a cache miss
nothing. They compare the work of the control path.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from . import native, report
from .guest_peers import MODULES, PEERS, SCRIPTS, Lacking, Peer, printed, shipped, stripped
from .model import JOBS, Conditions, Job, Measurement, Note, Plan, Progress, Seconds

IN_GUEST = Path(__file__).parent / "guest"
SERIES = "7"
# Without these features the kernel copies in loops of eight bytes. With them (scripts/guest --icount's own choice) each
# step of a `rep movsb` counts, and a copy weighs about eight times as much.
DEFAULT_CPU = "max,-erms,-fsrm"
SIZE = "256 MiB"
# Emulation makes 50 to 200 million instructions a second here.
LIMIT_SECONDS = {True: 300, False: 3600}
# icount runs agree within 2 %: more rounds would only repeat each other.
MOST_ROUNDS = 1
QUICK_JOBS = ("randread-qd1", "randread-qd32")
FEW_JOBS = (*QUICK_JOBS, "randwrite-qd1", "randwrite-qd32")
BACKINGS = {
    "null": "null", "memory": "kernel memory", "ext4": "file on ext4 on brd, in the page cache",
    "direct": "file on ext4 on brd, O_DIRECT", "tmpfs": "file on tmpfs",
}  # fmt: skip


def ios(job: Job) -> int:
    """How many to count over."""
    return 400 if job.block > 4096 else 2000 if job.depth == 1 else 10_000


def conditions(job: Job, store: str, kernel: str, cpu: str, boot: str) -> Conditions:
    return {
        "kernel": kernel, "guest_boot": boot, "cpu": cpu, "cpus": 1, "client": "fio io_uring, direct", "store": store,
        "backing": BACKINGS[store], "size": SIZE, "rw": job.rw, "block": job.block, "depth": job.depth,
        "queues": job.queues, "ios": ios(job),
    }  # fmt: skip


class Output:
    """Reads what the guest prints."""

    def __init__(self, plan: Plan, kernel: str, cpu: str, peers: list[Peer], jobs: list[Job], rounds: int) -> None:
        self.plan, self.kernel, self.cpu = plan, kernel, cpu
        self.peers = {peer.disk: peer for peer in peers}
        self.progress = Progress(plan, rounds * len(jobs))
        self.seen: set[tuple[str, str]] = set()
        self.boot = ""
        self.ended = False

    def read(self, line: str) -> Measurement | None:
        kind, _, rest = line.strip().partition(" ")
        match kind:
            case "boot":
                self.boot = rest
            case "down":
                disk, _, why = rest.partition(" ")
                self.fail(disk, why)
            case "lost":
                disk, job, _, why = rest.split(" ", 3)
                self.fail(disk, f"{job}: {why}")
            case "cell":
                disk, job, round_number, count, microseconds = rest.split()
                self.mark(job, round_number)
                return self.measurement(self.peers[disk], JOBS[job], int(round_number), int(count), int(microseconds))
            case "end":
                self.ended = True
            case "up":
                pass
            case _:
                self.plan.say(f"guest: {line.strip()}")
        return None

    def fail(self, disk: str, why: str) -> None:
        peer = self.peers[disk]
        self.plan.failures.append(Note("guest", f"{peer.name} {peer.store}", why))

    def mark(self, job: str, round_number: str) -> None:
        if (job, round_number) not in self.seen:
            self.seen.add((job, round_number))
            self.progress.step(f"guest: {job}")

    def measurement(self, peer: Peer, job: Job, number: int, count: int, microseconds: int) -> Measurement:
        return {
            "half": "guest", "peer": peer.name, "store": peer.store, "job": job.name, "client": "fio", "round": number,
            # A virtual microsecond is a thousand instructions.
            "kinsn": microseconds / count, "ios": count,
            "conditions": conditions(job, peer.store, self.kernel, self.cpu, self.boot),
        }  # fmt: skip


def chosen(plan: Plan) -> tuple[list[Peer], dict[Job, list[str]]]:
    """What the plan asks for: peers, and jobs with their stores; the guest measures a job with every peer on these."""
    peers = [peer for peer in PEERS if (peer.quick or not plan.quick) and plan.peers.search(peer.name)]
    jobs = {}
    for job in JOBS.values():
        stores = [
            store for store in dict.fromkeys(peer.store for peer in peers)
            if job.queues == 1 and plan.jobs.search(f"{store}/{job.name}/fio")
            and job.name in (QUICK_JOBS if plan.quick else FEW_JOBS if store in ("direct", "tmpfs") else JOBS)
        ]  # fmt: skip
        if stores:
            jobs[job] = stores
    used = {store for stores in jobs.values() for store in stores}
    return [peer for peer in peers if peer.store in used], jobs


def measure(plan: Plan, ringblk: Path | None = None, cpu: str = DEFAULT_CPU) -> Generator[Measurement, None, None]:
    """Yields each figure as it comes. `ringblk`: a binary to measure instead of this tree's; `cpu`: QEMU's -cpu."""
    peers, jobs = chosen(plan)
    if not peers or not jobs:
        return
    try:
        kernel = Path(printed(SCRIPTS / "kernel", SERIES))
    except Lacking as error:
        plan.failures.append(Note("guest", "everything", str(error)))
        return
    bins = ["--bin", f"{IN_GUEST}:/compare", "--bin", "fio", "--bin", "timeout", "--bin", "mkfs.ext4"]
    there = []
    for peer in peers:
        try:
            bins += shipped(peer)
            there.append(peer)
        except Lacking as error:
            plan.failures.append(Note("guest", f"{peer.name} {peer.store}", str(error)))
    bins += ["--bin", f"{stripped(ringblk or native.build(plan)[0], plan.scratch)}:/bin/ringblk"]
    version = (kernel / "version").read_text().strip()
    plan.versions["guest"] = f"Linux {version}, QEMU -icount with -cpu {cpu}"

    rounds = min(plan.rounds, MOST_ROUNDS)
    script = [
        f"{job.name}:{job.rw}:{job.block}:{job.depth}:{ios(job)}:{'+'.join(stores)}" for job, stores in jobs.items()
    ]
    command = [
        str(SCRIPTS / "guest"), "--kernel", str(kernel), "--icount", "--qemu", "-cpu", "--qemu", cpu,
        "--memory", "2G", "--out", str(plan.scratch / "guest"), "--timeout", str(LIMIT_SECONDS[plan.quick]), *bins,
        *(argument for module in MODULES for argument in ("--ship-module", module)),
        str(IN_GUEST / "measure.sh"), str(rounds), ",".join(script), *(peer.disk for peer in there),
    ]  # fmt: skip
    output = Output(plan, version, cpu, there, list(jobs), rounds)
    plan.say(f"guest: kernel {version}, {len(there)} disks")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace")
    try:
        assert process.stdout
        for line in process.stdout:
            if one := output.read(line):
                yield one
        process.wait()
    finally:
        # Its trap ends QEMU.
        process.terminate()
        process.wait()
    if not output.ended:
        plan.failures.append(Note("guest", "the rest", f"the guest ended early, status {process.returncode}"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="comparison.guest", description="The guest half of scripts/compare alone.")
    parser.add_argument("--quick", action="store_true", help="four disks, reads of depth 1 and 32")
    parser.add_argument("--jobs", type=re.compile, default=re.compile(""), metavar="REGEX")
    parser.add_argument("--peers", type=re.compile, default=re.compile(""), metavar="REGEX")
    parser.add_argument("--ringblk", type=Path, help="a binary to measure [this tree's, built first]")
    parser.add_argument("--cpu", default=DEFAULT_CPU, help="QEMU's -cpu [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a measurement a line there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-guest.") as scratch:
        plan = Plan(
            quick=args.quick, rounds=MOST_ROUNDS, times=Seconds(0, 0), jobs=args.jobs, peers=args.peers,
            scratch=Path(scratch),
        )  # fmt: skip
        with closing(measure(plan, args.ringblk, args.cpu)) as figures:
            measurements = list(figures)
    if args.json:
        args.json.write_text("".join(json.dumps(one) + "\n" for one in measurements))
    print("\n".join(report.guest_table(report.summarise(measurements)) + report.notes("failed", plan.failures)))
    sys.exit(0 if measurements else 1)


if __name__ == "__main__":
    main()
