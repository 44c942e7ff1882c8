"""What a run was made on, and the conditions of a native measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from .model import Conditions, Job, Plan, Seconds

# A machine with more runnable than this before the run is busy.
BUSY = 0.5
SERVER_CPU = 1
CLIENT_CPU = 0


def first_line(*command: str) -> str:
    """What a program prints first, or why it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError as error:
        return f"unknown: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "unknown"


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def file_system(directory: Path) -> str:
    """The type of the file system that holds it: "ext4"."""
    return first_line("stat", "-f", "-c", "%T", str(directory)).replace("ext2/ext3", "ext4")


class Steal:
    """The part of this machine's CPU time that its host gave to others."""

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[int, int]:
        times = [int(text) for text in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return times[7], sum(times)

    def percent(self) -> float:
        """Since this object was made."""
        steal, everything = self._read()
        return 100 * (steal - self.start[0]) / max(1, everything - self.start[1])


def warn_if_busy(plan: Plan) -> float:
    """The load average of the last minute; says so where it is too high to measure well."""
    load = os.getloadavg()[0]
    if load > BUSY:
        plan.say(f"warning: the machine is busy (load average {load:.2f}); figures will be worse and spread more")
    return load


def machine() -> dict[str, str | int]:
    """The machine, its kernel and what was measured there."""
    root = Path(__file__).parents[2]
    changed = first_line("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no") != "unknown"
    return {
        "cpu": cpu_model(),
        "cpus": os.cpu_count() or 0,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": f"{platform.system()} {platform.release()}",
        "virtual": first_line("systemd-detect-virt", "--vm"),
        "boot_id": boot_id(),
        "commit": first_line("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
        + (" with uncommitted changes" if changed else ""),
    }


def native(job: Job, client: str, store: Conditions, times: Seconds) -> Conditions:
    """A program that is its own client ("fio") has no client's CPU and no client that waits."""
    alone = client == "fio"
    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} CPUs",
        "kernel": platform.release(),
        "boot_id": boot_id(),
        **store,
        "server_cpus": str(SERVER_CPU),
        "client_cpus": None if alone else str(CLIENT_CPU),
        "client": None if alone else client,
        "rw": job.rw,
        "block": job.block,
        "depth": job.depth,
        "queues": job.queues,
        "seconds": times.measured,
        "ramp_seconds": times.ramp,
    }
