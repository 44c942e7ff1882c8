"""The peers of the guest half: what each is called, and which programs and modules it needs in the guest."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parents[1]
# All that the guest might load.
MODULES = (
    "brd", "loop", "ublk_drv", "nbd", "configfs", "nvmet", "nvmet-tcp", "nvme-fabrics", "nvme-tcp",
    "target_core_mod", "target_core_file", "iscsi_target_mod", "iscsi_tcp", "sd_mod",
)  # fmt: skip


class Lacking(Exception):
    """A program for the guest cannot be had; the text says why."""


@dataclass(frozen=True)
class Peer:
    """`name` and `store` as in the report; `kind`: who makes it in the guest, guest/peers.sh's peer_KIND."""

    name: str
    store: str
    kind: str
    # Of the tools.
    programs: tuple[str, ...] = ()
    quick: bool = False

    @property
    def disk(self) -> str:
        """What guest/measure.sh calls it."""
        return f"{self.kind}@{self.store}"


PEERS = (
    # The block layer alone: memory is its own, not the file.
    Peer("brd", "memory", "brd"),
    Peer("ringblk", "null", "ringblk-null"),
    Peer("rublk", "null", "rublk-null"),
    # As users get it: with a copy, but for the direct ones.
    Peer("ringblk", "ext4", "ringblk-file", quick=True),
    Peer("ringblk-zc", "ext4", "ringblk-file-zc"),
    Peer("rublk", "ext4", "rublk-loop", quick=True),
    Peer("rublk-zc", "ext4", "rublk-loop-zc"),
    Peer("loop", "ext4", "loop", quick=True),
    Peer("nbd-tcp", "ext4", "nbd-tcp", ("nbdkit", "nbd-client"), quick=True),
    Peer("nbd-unix", "ext4", "nbd-unix", ("nbdkit", "nbd-client")),
    Peer("nvme-tcp", "ext4", "nvme-tcp"),
    Peer("iscsi", "ext4", "iscsi", ("iscsistart",)),
    # rublk's default.
    Peer("ringblk", "direct", "ringblk-file"),
    Peer("rublk", "direct", "rublk-loop"),
    Peer("rublk-zc", "direct", "rublk-loop-zc"),
    # Where io_uring cannot but hand every request to a thread of its own.
    Peer("ringblk", "tmpfs", "ringblk-file"),
    Peer("ringblk-zc", "tmpfs", "ringblk-file-zc"),
    Peer("rublk", "tmpfs", "rublk-loop"),
    Peer("rublk-zc", "tmpfs", "rublk-loop-zc"),
    Peer("loop", "tmpfs", "loop"),
)


def printed(*command: str | Path) -> str:
    """What it prints. Raises Lacking."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise Lacking(f"{Path(command[0]).name} failed")
    return done.stdout.strip()


def shipped(peer: Peer) -> list[str]:
    """scripts/guest's arguments for what a peer needs in the guest. Raises Lacking."""
    files = list(peer.programs)
    if peer.kind.startswith("rublk"):
        files.append(printed(SCRIPTS / "rublk"))
    if "nbdkit" in peer.programs:
        plugins = re.search("^plugindir=(.*)$", printed("nbdkit", "--dump-config"), re.MULTILINE)
        if plugins is None:
            raise Lacking("nbdkit does not say where its plugins are")
        files.append(f"{plugins[1]}/nbdkit-file-plugin.so")
    return [argument for file in files for argument in ("--bin", file)]


def stripped(binary: Path, scratch: Path) -> Path:
    """A copy without debugging information, which the guest's memory would hold twice."""
    copy = scratch / "ringblk-in-guest"
    subprocess.run(["strip", "-o", copy, binary], check=True)
    return copy
