"""What the servers serve: made once, brought to the same state before each measurement, and removed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .conditions import file_system
from .model import MIB, Conditions, Plan

SIZE = 512 * MIB
PAGE = 4096
ZRAM_CONTROL = Path("/sys/class/zram-control")


class Absent(Exception):
    """This machine does not have such a store; the text says why."""


@dataclass(frozen=True)
class Store:
    """`path`: a file or a block device of SIZE bytes; None for what a server has of its own."""

    name: str
    kind: Literal["file", "block", "null", "memory"]
    path: Path | None = None
    direct: bool = False
    what: str = ""

    @property
    def conditions(self) -> Conditions:
        cache = "none" if self.path is None else "direct" if self.direct else "buffered, all of it cached in pages"
        return {"store": self.name, "backing": self.what or self.kind, "size": SIZE, "cache": cache}

    def prepare(self, writes: bool) -> None:
        """All of it in the page cache, or, for O_DIRECT, none. What the last load left to write back is written:
        it would be in the middle of this one. For writes the whole cache is dirty then: the first write to a clean
        page costs more than the next one, and how many are the first depends on the speed. (`fill` says why pages.)"""
        if self.path is None:
            return
        fd = os.open(self.path, os.O_RDWR)
        try:
            os.fdatasync(fd)
            if self.direct:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                return
            # What is not there is read without read-ahead, which makes large folios.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            buffer = bytearray(MIB)
            for offset in range(0, SIZE, MIB):
                if os.preadv(fd, [buffer], offset) != MIB:
                    raise OSError(f"{self.path} is shorter than {SIZE} bytes")
                if writes:
                    os.pwrite(fd, buffer, offset)
        finally:
            os.close(fd)


def fill(path: Path) -> None:
    """SIZE random bytes: not compressible, no holes, and written by the page: a file system that caches large folios
    takes their size from the first write, and to put 4 KiB into one costs ext4 several times what any server here
    costs, so that all would look the same."""
    flags = os.O_WRONLY if path.is_block_device() else os.O_WRONLY | os.O_CREAT
    fd = os.open(path, flags, 0o600)
    try:
        for base in range(0, SIZE, MIB):
            data = memoryview(os.urandom(MIB))
            for offset in range(0, MIB, PAGE):
                os.pwrite(fd, data[offset : offset + PAGE], base + offset)
        os.fsync(fd)
    finally:
        os.close(fd)


class Stores:
    """All stores of a run. Those that are asked for are made on first use; `close` takes everything away."""

    NAMES = ("ext4", "direct", "null", "memory", "tmpfs", "zram", "zram-cached")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.files: dict[Path, Path] = {}
        self.zram: int | None = None

    def get(self, name: str) -> Store:
        """Raises Absent or OSError."""
        match name:
            case "null" | "memory":
                return Store(name, "null" if name == "null" else "memory")
            case "ext4" | "direct":
                if (kind := file_system(self.plan.scratch)) != "ext4":
                    raise Absent(f"the scratch directory is on {kind}, not ext4; name another one with --scratch")
                return Store(name, "file", self.file(self.plan.scratch), name == "direct", "file on ext4")
            case "tmpfs":
                directory = Path("/dev/shm")
                if not directory.is_dir() or file_system(directory) != "tmpfs":
                    raise Absent("/dev/shm is no tmpfs here")
                return Store(name, "file", self.file(directory), what="file on tmpfs")
            case "zram" | "zram-cached":
                return Store(name, "block", self.device(), name == "zram", "zram block device")
        raise AssertionError(name)

    def file(self, directory: Path) -> Path:
        if directory not in self.files:
            free = os.statvfs(directory)
            if free.f_bavail * free.f_frsize < 2 * SIZE:
                raise Absent(f"{directory} has less than {2 * SIZE // MIB} MiB free")
            path = directory / f"ringblk-compare-{os.getpid()}"
            self.files[directory] = path
            fill(path)
        return self.files[directory]

    def device(self) -> Path:
        """A zram device of our own; one that exists may be in somebody's use."""
        if self.zram is None:
            if not (ZRAM_CONTROL / "hot_add").exists():
                raise Absent("this kernel has no zram (and may have it as a module: modprobe zram)")
            try:
                self.zram = int((ZRAM_CONTROL / "hot_add").read_text())
                Path(f"/sys/block/zram{self.zram}/disksize").write_text(str(SIZE))
            except OSError as error:
                raise Absent(f"no new zram device: {error}") from error
            fill(Path(f"/dev/zram{self.zram}"))
        return Path(f"/dev/zram{self.zram}")

    def close(self) -> None:
        for path in self.files.values():
            path.unlink(missing_ok=True)
        if self.zram is not None:
            (ZRAM_CONTROL / "hot_remove").write_text(str(self.zram))
