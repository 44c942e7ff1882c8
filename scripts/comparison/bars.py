"""The bars: how much better than its peers ringblk has to be, and whether a run shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .report import OURS, Row, find, ratio

Verdict = Literal["met", "missed", "no bar", "not measured", "refused", "elsewhere"]


@dataclass(frozen=True)
class Check:
    """Ours over the best of theirs, for IOPS at least, for costs at most, `limit` (None: to be told, not
    judged); `inverse`: theirs over ours, for a cost at least that."""

    what: str
    store: str
    job: str
    rivals: tuple[str, ...]
    limit: float | None
    value: str = "iops"
    client: str = "event"
    rival_client: str = ""
    half: str = "native"
    inverse: bool = False

    @property
    def at_least(self) -> bool:
        return self.inverse or self.value == "iops"


def guest(
    what: str, job: str, rivals: tuple[str, ...], limit: float | None, inverse: bool = False, store: str = "ext4"
) -> Check:
    return Check(what, store, job, rivals, limit, "kinsn", "fio", half="guest", inverse=inverse)


@dataclass(frozen=True)
class Elsewhere:
    """A bar that another command judges."""

    what: str
    limit: str
    command: str


@dataclass(frozen=True)
class Outcome:
    what: str
    limit: str
    verdict: Verdict
    ratio: float | None = None
    spread: float | None = None
    # The peer, the reason, or the command.
    note: str = ""


QSD = ("qsd", "qsd-threads")
UNIX = ("nbdkit", "qemu-nbd")
RUBLK = ("rublk", "rublk-zc")
TCP = ("nbdkit-tcp", "qemu-nbd-tcp")

CHECKS: tuple[Check, ...] = (
    Check("cached ext4, randread QD32, IOPS over qemu-storage-daemon", "ext4", "randread-qd32", QSD, 1.8),
    Check("  its CPU per I/O", "ext4", "randread-qd32", QSD, 0.55, "server_us"),
    Check("cached ext4, randread QD128", "ext4", "randread-qd128", QSD, 2.0),
    Check("cached ext4, randread 4 x QD32", "ext4", "randread-4xqd32", QSD, 2.0),
    Check("cached ext4, randwrite QD32", "ext4", "randwrite-qd32", QSD, 1.6),
    Check("cached ext4, QD32 over the better of nbdkit and qemu-nbd, unix", "ext4", "randread-qd32", UNIX, 3.5),
    Check("cached ext4, QD32 over the better of nbdkit and qemu-nbd, TCP", "ext4", "randread-qd32", TCP, 6.0),
    Check("cached ext4, QD32 against fio's io_uring on the file", "ext4", "randread-qd32", ("fio",), 0.9,
          rival_client="fio"),
    Check("cached ext4, QD1, polling client", "ext4", "randread-qd1", QSD, 1.8, client="poll"),
    Check("cached ext4, QD1, event-driven client", "ext4", "randread-qd1", QSD, 2.5),
    Check("O_DIRECT ext4, QD32, IOPS", "direct", "randread-qd32", QSD, 1.05),
    Check("  CPU per I/O", "direct", "randread-qd32", QSD, 0.8, "server_us"),
    Check("O_DIRECT ext4, QD128, IOPS", "direct", "randread-qd128", QSD, 1.05),
    Check("  CPU per I/O", "direct", "randread-qd128", QSD, 0.8, "server_us"),
    Check("null, QD32", "null", "randread-qd32", QSD, 2.0),
    Check("null, QD128", "null", "randread-qd128", QSD, 3.0),
    Check("cached ext4, 128 KiB sequential read", "ext4", "read128k-qd8", QSD, 1.15),
    guest("ublk, file on tmpfs, guest instructions over rublk loop's, QD1", "randread-qd1", RUBLK, 0.85, store="tmpfs"),
    guest("  QD32", "randread-qd32", RUBLK, 0.75, store="tmpfs"),
    guest("  cached ext4, QD1", "randread-qd1", RUBLK, None),
    guest("  cached ext4, QD32", "randread-qd32", RUBLK, None),
    guest("  cached ext4, random write QD1", "randwrite-qd1", RUBLK, None),
    guest("  O_DIRECT ext4, QD1", "randread-qd1", RUBLK, None, store="direct"),
    guest("  O_DIRECT ext4, QD32", "randread-qd32", RUBLK, None, store="direct"),
    guest("NBD over TCP, guest instructions over our ublk's, QD32", "randread-qd32", ("nbd-tcp",), 3.5, inverse=True),
    guest("NVMe/TCP, the same", "randread-qd32", ("nvme-tcp",), 3.5, inverse=True),
    guest("iSCSI, the same", "randread-qd32", ("iscsi",), 3.5, inverse=True),
)  # fmt: skip

FOOTPRINT = "cargo test --release --test footprint"
ELSEWHERE: tuple[Elsewhere, ...] = (
    Elsewhere("parse + complete of one 4 KiB request", "at most 100 ns", "cargo bench --bench micro"),
    Elsewhere("64 idle exports: CPU over 60 s", "at most 0.1 % of a core",
              f"{FOOTPRINT} many_idle_exports_use_no_cpu_for_a_minute -- --ignored"),
    Elsewhere("64 exports: memory for each above the first", "at most 1 MiB", f"{FOOTPRINT} an_export_more"),
    Elsewhere("resident memory with one export, fresh and after 100 connections", "at most 16 MiB",
              f"{FOOTPRINT} one_export_is_small"),
    Elsewhere("cost per I/O with 64 exports on one worker against 1", "at most 1.1x",
              "cargo bench --bench micro -- worker: null"),
)  # fmt: skip


def judge(rows: list[Row]) -> list[Outcome]:
    return [outcome(check, rows) for check in CHECKS] + [
        Outcome(bar.what, bar.limit, "elsewhere", note=bar.command) for bar in ELSEWHERE
    ]


def outcome(check: Check, rows: list[Row]) -> Outcome:
    limit = "" if check.limit is None else f"at {'least' if check.at_least else 'most'} {check.limit}x"
    ours = find(rows, check.half, check.store, check.job, check.client, OURS)
    rivals = [
        row for peer in check.rivals
        if (row := find(rows, check.half, check.store, check.job, check.rival_client or check.client, peer))
    ]  # fmt: skip
    if ours is None or not rivals:
        return Outcome(check.what, limit, "not measured")
    # The one that is faster, also where its cost is what counts.
    main = "iops" if check.half == "native" else "kinsn"
    best = (max if main == "iops" else min)(rivals, key=lambda row: row.medians[main])
    found = ratio(ours, best, check.value)
    if found.value is None:
        return Outcome(check.what, limit, "refused" if found.why else "not measured", note=found.why)
    value = 1 / found.value if check.inverse else found.value
    verdict: Verdict = "no bar"
    if check.limit is not None:
        met = value >= check.limit if check.at_least else value <= check.limit
        verdict = "met" if met else "missed"
    return Outcome(check.what, limit, verdict, value, max(ours.spread, best.spread), f"against {best.peer}")


def table(outcomes: list[Outcome]) -> list[str]:
    lines = ["", "bars (ringblk over the peer unless it says else; spread: the larger of both sides')"]
    for one in outcomes:
        value = "" if one.ratio is None else f"{one.ratio:.2f}x"
        spread = "" if one.spread is None else f"spread {one.spread:.0%}"
        text = "; ".join(part for part in (one.limit, one.note) if part)
        lines.append(f"  {one.verdict:<13}{value:>7} {spread:<12} {one.what}: {text}".rstrip(": "))
    return lines
