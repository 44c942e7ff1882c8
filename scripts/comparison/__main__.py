"""scripts/compare's command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from . import bars, chart, conditions, guest, native, report
from .model import Measurement, Note, Plan, Seconds, clock
from .peers import AGAINST

HALVES: dict[str, Callable[[Plan], Iterator[Measurement]]] = {"native": native.measure, "guest": guest.measure}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare",
        description="Run ringblk and its peers on the same work, in turn, and compare them. The native half serves "
        "files, memory and block devices over vhost-user and NBD, with the server on one CPU and the client on "
        "another; the guest half counts the instructions of block devices in a virtual machine.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer jobs and 3 rounds: under 5 minutes")
    size.add_argument("--full", action="store_true", help="all jobs, 5 rounds (the default)")
    parser.add_argument("--rounds", type=int, help="how often to measure each job")
    parser.add_argument("--seconds", type=float, help="seconds of a native measurement (0.9; --quick: 0.6)")
    parser.add_argument("--only", choices=HALVES, help="one half")
    parser.add_argument("--jobs", type=re.compile, default=re.compile(""), metavar="REGEX",
                        help="only where STORE/JOB/CLIENT has it, such as ext4/randread-qd32/event")  # fmt: skip
    parser.add_argument("--peers", type=re.compile, metavar="REGEX",
                        help="only peers in whose name it is found; ratios need ringblk")  # fmt: skip
    parser.add_argument("--against", type=Path, metavar="BINARY",
                        help="another build of ringblk, say the one before a change: with it alone, in the native half, "
                        "unless --peers or --only says else")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements and the summary there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write a chart there")
    parser.add_argument("--scratch", type=Path, metavar="DIR",
                        help="for the files that are served [the build directory]")  # fmt: skip
    parser.add_argument("--strict", action="store_true", help="fail when a bar is missed")
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 1 or args.seconds is not None and args.seconds <= 0:
        parser.error("--rounds and --seconds must be more than 0")
    if args.against and not os.access(args.against, os.X_OK):
        parser.error(f"--against: {args.against} cannot be run")
    if args.against and not args.peers:
        args.peers, args.only = re.compile(f"^(ringblk|{AGAINST})$"), args.only or "native"
    args.peers = args.peers or re.compile("")
    return args


def interrupted(*_: object) -> None:
    """SIGTERM, as Ctrl-C: leave all `with` and `finally` blocks."""
    raise KeyboardInterrupt


def collect(plan: Plan, only: str | None) -> list[Measurement]:
    """What the halves measure; a half that breaks down is a failure, and the other still counts."""
    measurements: list[Measurement] = []
    for name, measure in HALVES.items():
        if only in (None, name):
            try:
                with closing(measure(plan)) as figures:
                    measurements.extend(figures)
            except (OSError, subprocess.SubprocessError) as error:
                plan.failures.append(Note(name, "everything", str(error)))  # type: ignore[arg-type]
    return measurements


def header(plan: Plan, machine: dict[str, object]) -> list[str]:
    lines = [
        f"ringblk's comparison, {'quick' if plan.quick else 'full'}: medians of {plan.rounds} rounds"
        + (" (fewer jobs and rounds than a full run)" if plan.quick else ""),
        f"  machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_mib']} MiB,"
        f" virtual: {machine['virtual']}",
        f"  {machine['kernel']}, commit {machine['commit']}",
        f"  load average before the run {machine['load_average']:.2f}, stolen CPU time during it"
        f" {machine['steal_percent']:.1f} %" + (": BUSY, do not trust it" if machine["busy"] else ""),
    ]
    return lines + [f"  {name}: {version}" for name, version in plan.versions.items()]


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, interrupted)
    base = args.scratch or Path(os.environ.get("CARGO_TARGET_DIR") or native.ROOT / "target")
    base.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        quick=args.quick,
        rounds=args.rounds or (3 if args.quick else 5),
        times=Seconds(args.seconds or (0.6 if args.quick else 0.9), 0.15 if args.quick else 0.2),
        jobs=args.jobs,
        peers=args.peers,
        against=args.against and args.against.resolve(),
        scratch=Path(tempfile.mkdtemp(prefix="compare.", dir=base)).resolve(),
    )
    start, steal = time.monotonic(), conditions.Steal()
    load = conditions.warn_if_busy(plan)
    machine: dict[str, object] = {**conditions.machine(), "load_average": load, "busy": load > conditions.BUSY}
    try:
        measurements = collect(plan, args.only)
    except KeyboardInterrupt:
        plan.say("interrupted")
        return 130
    finally:
        shutil.rmtree(plan.scratch)
    machine |= {"steal_percent": steal.percent(), "seconds": time.monotonic() - start}
    plan.say(f"took {clock(time.monotonic() - start)}")

    rows = report.summarise(measurements)
    outcomes = bars.judge(rows)
    lines = header(plan, machine)
    lines += report.native_table([row for row in rows if row.half == "native"])
    if any(row.half == "guest" for row in rows):
        lines += report.guest_table([row for row in rows if row.half == "guest"])
    lines += bars.table(outcomes) + report.notes("failed", plan.failures) + report.notes("not measured", plan.absent)
    print("\n".join(lines))
    if args.json:
        everything = {
            "quick": plan.quick, "rounds": plan.rounds, "machine": machine, "versions": plan.versions,
            "measurements": measurements, "summary": report.summary(rows),
            "bars": [asdict(one) for one in outcomes],
            "failed": [asdict(note) for note in plan.failures],
            "not_measured": [asdict(note) for note in plan.absent],
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(everything, indent=1) + "\n")
    if args.svg:
        args.svg.parent.mkdir(parents=True, exist_ok=True)
        args.svg.write_text(chart.svg(rows, machine))
    return int(args.strict and any(one.verdict == "missed" for one in outcomes))


sys.exit(main())
