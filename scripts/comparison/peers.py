"""The peers of the native half: how each serves a store, and where its clients reach it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .stores import SIZE, Store

QUEUES = 4
# fio that submits and takes completions in batches, which it does not by default.
BATCHED = "fio-batched"
# ringblk itself, noting what is in flight, and without its sandbox.
NOTED, OPEN = "ringblk-noted", "ringblk-open"
# Another build of ringblk, such as the one before a change.
AGAINST = "against"


def escaped(path: Path | None) -> str:
    """For QEMU's and ringblk's lists of options, in which a comma ends a value."""
    return str(path).replace(",", ",,")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Served:
    """A server's command line; where it listens, as server.listens has it; the load generator's arguments."""

    command: list[str]
    address: str
    client: list[str]


@dataclass(frozen=True)
class Peer:
    name: str
    program: str
    # The stores that it can serve.
    stores: frozenset[str]
    # None: no server, but fio, which is its own client.
    serve: Callable[[Store, Path], Served] | None
    # Run in --quick as well.
    quick: bool = True


def ringblk(program: Path, name: str = "ringblk", server: str | None = None, client: str | None = None) -> Peer:
    """The release build of this tree; under another name with one more option for the server or the client, to see
    what that costs."""

    def serve(store: Store, work: Path) -> Served:
        target = store.name if store.path is None else escaped(store.path)
        volume = f"{store.kind}:{SIZE}" if store.path is None else f"file:{target}"
        volume += ",direct=on" if store.direct else ""
        path = work / "ringblk.socket"
        command = [
            str(program), "serve", "--workers", "1", "--control", str(work / "control.socket"),
            "--volume", f"v={volume}", "--vhost-user", f"v={escaped(path)},queues={QUEUES},queue-size=1024",
            *([server] if server else []),
        ]  # fmt: skip
        return Served(command, f"unix:{path}", ["--socket", str(path), *([client] if client else [])])

    stores = frozenset({"ext4", "direct", "null", "memory", "tmpfs", "zram", "zram-cached"})
    return Peer(name, str(program), stores, serve)


def storage_daemon(name: str, aio: str, stores: set[str], quick: bool) -> Peer:
    def serve(store: Store, work: Path) -> Served:
        if store.kind == "null":
            node = f"driver=null-co,node-name=n,size={SIZE},read-zeroes=off"
        else:
            driver = "host_device" if store.kind == "block" else "file"
            cache = "on" if store.direct else "off"
            node = f"driver={driver},node-name=n,filename={escaped(store.path)},cache.direct={cache},aio={aio}"
        path = work / "qsd.socket"
        export = f"type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={escaped(path)}"
        command = [
            "qemu-storage-daemon", "--blockdev", node, "--export", f"{export},writable=on,num-queues={QUEUES}",
        ]  # fmt: skip
        return Served(command, f"unix:{path}", ["--socket", str(path)])

    return Peer(name, "qemu-storage-daemon", frozenset(stores), serve, quick)


def nbd(name: str, command: Callable[[Store, str], list[str]], stores: set[str]) -> Peer:
    """`command` is given the store and the address as server.listens has it."""
    tcp = name.endswith("-tcp")

    def serve(store: Store, work: Path) -> Served:
        address = f"tcp:127.0.0.1:{free_port()}" if tcp else f"unix:{work / 'nbd.socket'}"
        return Served(command(store, address), address, ["--nbd", address])

    return Peer(name, name.removesuffix("-tcp"), frozenset(stores), serve)


def nbdkit(store: Store, address: str) -> list[str]:
    kind, rest = address.split(":", 1)
    host, _, port = rest.partition(":")
    listen = ["--unix", rest] if kind == "unix" else ["--ipaddr", host, "--port", port]
    plugin = [store.kind, str(SIZE)] if store.path is None else ["file", str(store.path)]
    return ["nbdkit", "--foreground", *listen, *plugin]


def qemu_nbd(store: Store, address: str) -> list[str]:
    kind, rest = address.split(":", 1)
    host, _, port = rest.partition(":")
    listen = ["--socket", rest] if kind == "unix" else ["--bind", host, "--port", port]
    options = ["--persistent", "--shared", str(QUEUES), "--format", "raw", "--cache", "writeback", "--aio", "io_uring"]
    return ["qemu-nbd", *listen, *options, str(store.path)]


def all_peers(program: Path, against: Path | None = None) -> list[Peer]:
    """In the order in which they take turns. qemu-storage-daemon's `aio=threads` is its default; NBD has no say
    over O_DIRECT in nbdkit, so that it is left out there."""
    files = {"ext4", "direct", "tmpfs", "zram", "zram-cached"}
    return [
        ringblk(program),
        *([ringblk(against, AGAINST)] if against else []),
        ringblk(program, NOTED, client="--inflight"),
        ringblk(program, OPEN, server="--sandbox=off"),
        storage_daemon("qsd", "io_uring", files | {"null"}, quick=True),
        storage_daemon("qsd-threads", "threads", files, quick=False),
        nbd("nbdkit", nbdkit, {"ext4", "null", "memory", "tmpfs"}),
        nbd("nbdkit-tcp", nbdkit, {"ext4"}),
        nbd("qemu-nbd", qemu_nbd, {"ext4"}),
        nbd("qemu-nbd-tcp", qemu_nbd, {"ext4"}),
        Peer("fio", "fio", frozenset(files), None),
        Peer(BATCHED, "fio", frozenset(files), None),
    ]
