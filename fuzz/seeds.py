#!/usr/bin/env python3
"""Writes the seeds: inputs in the shapes of the unit tests, as `src/fuzzing` reads them.

They are checked in; this is how they were made. Run it after a change of an input's layout.
"""

from __future__ import annotations

import struct
from pathlib import Path

HERE = Path(__file__).parent / "seeds"
INDIRECT, FLUSH, WCE = 1 << 28, 1 << 9, 1 << 11


def put(target: str, name: str, data: bytes) -> None:
    """Writes one seed."""
    path = HERE / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def machine(shape: int, features: int = INDIRECT | FLUSH, start: int = 0) -> bytes:
    """A set-up of `chain`: the shape's low bits are the vring's size, the others options."""
    return struct.pack("<BQH", shape, features, start)


def request(kind: int, sector: int, head: int, layout: int, *lengths: int) -> bytes:
    """A driver's request; `kind` is an index, a length of 128 + n is n sectors."""
    return bytes([2, kind, sector, head, layout, *lengths])


PASS = bytes([7, 1])
WAKE = bytes([6])
DELAY = bytes([5, 1])


def chain() -> None:
    """Vrings."""
    reads = request(0, 3, 0, 4, 130) + request(1, 9, 4, 4, 129) + request(2, 0, 8, 0)
    put("chain", "kinds", machine(5) + reads + request(3, 0, 12, 4, 100) + PASS)
    put("chain", "event-idx", machine(5 | 128, start=0xFFFE) + reads + PASS + reads + PASS)
    put("chain", "indirect", machine(4) + request(0, 0, 1, 16 | 12, 129, 129, 129) + PASS)
    put("chain", "split-header", machine(4) + request(0, 0, 1, 1 | 4, 129) + PASS)
    put("chain", "discard", machine(4) + request(4, 1, 0, 2, 5, 0) + request(5, 1, 8, 2, 5, 1) + PASS)
    put("chain", "null", machine(4 | 32) + request(0, 8, 0, 4, 136) + PASS)
    put("chain", "read-only", machine(4 | 64, FLUSH | WCE) + request(1, 0, 0, 4, 129) + PASS)
    late = DELAY + reads + PASS + WAKE + PASS
    put("chain", "late", machine(5) + late + WAKE + PASS + reads + PASS)
    put("chain", "twice", machine(3) + DELAY + request(0, 0, 1, 4, 129) + PASS + bytes([3, 1]) + PASS)
    put("chain", "jump", machine(3) + bytes([4, 0, 0x40]) + PASS)
    anywhere = struct.pack("<BHQBHQBHQ", 3, 0, 0x4000, 3, 0, 0x3000, 3, 0, 0x3400)
    put("chain", "elsewhere", machine(3 | 8) + anywhere + request(0, 0, 0, 4, 129) + PASS)
    loop = bytes([0, 0, 0, 0, 0x10, 16, 1, 0]) + bytes([3, 0]) + PASS
    put("chain", "loop", machine(2) + loop)
    across = bytes([0, 1, 2, 0xF0, 0x2F, 130, 2, 0])
    put("chain", "regions", machine(3) + request(0, 0, 0, 32) + across + bytes([3, 0]) + PASS)
    # Version 1 for 16 descriptors, the second of which is in flight.
    notes = struct.pack("<QHHHH", 0, 1, 16, 0, 0) + bytes(16) + struct.pack("<B5xHQ", 1, 0, 7)
    region = struct.pack("<HHBB", 1, 16, len(notes), 0) + notes + bytes(1)
    put("chain", "again", machine(4 | 16) + region + request(0, 0, 1, 4 | 32, 129) + PASS)


def option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    """A server's answer to an option."""
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data


def nbd() -> None:
    """Handshakes, then transmissions."""
    greeting = b"\0" + b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3)
    info = struct.pack(">HQH", 0, 1 << 20, 0x10D)
    blocks = struct.pack(">HIII", 3, 512, 4096, 32 << 20)
    good = option_reply(7, 3, info) + option_reply(7, 3, blocks) + option_reply(7, 1)
    put("nbd", "go", greeting + option_reply(8, 1) + good)
    put("nbd", "simple", greeting + option_reply(8, 0x80000001) + good)
    old = struct.pack(">QH", 1 << 20, 1) + bytes(124)
    put("nbd", "export-name", greeting + option_reply(8, 1) + option_reply(7, 0x80000001) + old)
    put("nbd", "refused", greeting + option_reply(8, 1) + option_reply(7, 0x80000006, b"no such disk"))
    odd = struct.pack(">HIII", 3, 3, 1 << 31, 7)
    put("nbd", "blocks", greeting + option_reply(8, 1) + option_reply(7, 3, odd))

    def session(structured: bool, jobs: list[tuple[int, int, int]], answers: list[bytes]) -> bytes:
        """Requests of (kind, blocks - 1, first block), and the server's deeds."""
        head = b"\1" + struct.pack("<HBB", 0x6D, structured, len(jobs) - 1)
        # After each deed a byte says whether there is another request: not here.
        return head + b"".join(bytes(job) for job in jobs) + b"".join(deed + b"\1" for deed in answers)

    jobs = [(0, 7, 0), (2, 3, 8), (3, 0, 0), (4, 1, 4), (5, 1, 2)]
    idle = bytes([0x07, 0])
    put("nbd", "read", session(False, jobs[:1], [idle, bytes([0, 0]), idle]))
    put("nbd", "read-chunks", session(True, jobs[:1], [idle, bytes([0, 0]), idle]))
    put("nbd", "all", session(False, jobs, [idle] + [bytes([1, n]) for n in range(1, 5)] + [bytes([0, 0]), idle]))
    put("nbd", "errors", session(True, jobs, [idle] + [bytes([0x41, n]) for n in range(5)]))
    hole = bytes([0x84, 0]) + struct.pack("<I", 4096)
    put("nbd", "hole", session(True, jobs[:1], [idle, hole, idle]))
    part = bytes([3, 0, 8]) + struct.pack("<H", 512)
    put("nbd", "parts", session(True, jobs[:1], [idle, part, bytes([0x82, 0]), idle]))
    text = bytes([0x85, 0]) + struct.pack("<HI", 0x8001, 0) + bytes([10]) + struct.pack(">IH", 5, 4) + b"full"
    put("nbd", "error-chunk", session(True, jobs[:1], [idle, text, idle]))
    put("nbd", "cut", session(True, jobs, [idle, bytes([0xF7, 0]), idle]))
    put("nbd", "noise", session(True, jobs, [idle, bytes([6, 0, 20]) + bytes(range(20)), idle]))


def protocol() -> None:
    """Streams of messages."""

    def message(request: int, body: bytes = b"", flags: int = 1) -> bytes:
        return struct.pack("<III", request, flags, len(body)) + body

    start = message(3) + message(1) + message(2, struct.pack("<Q", 1 << 30)) + message(15)
    start += message(16, struct.pack("<Q", 0x10FF))
    put("protocol", "start", b"\xff\0" + start)
    put("protocol", "slow", b"\2\0" + start)
    region = struct.pack("<QQQQ", 0, 1 << 20, 0x7F0000000000, 0)
    table = message(5, struct.pack("<Q", 1) + region)
    put("protocol", "table", b"\xff\1" + table + table)
    put("protocol", "table-late", b"\xff\x41" + table)
    add, remove = message(37, bytes(8) + region, 9), message(38, bytes(8) + region, 9)
    put("protocol", "add", b"\xff\1" + add + remove + add)
    vring = message(8, struct.pack("<II", 0, 256)) + message(10, struct.pack("<II", 0, 0))
    vring += message(9, struct.pack("<IIQQQQ", 0, 0, 0x1000, 0x2000, 0x3000, 0)) + message(18, struct.pack("<II", 0, 1))
    put("protocol", "vring", b"\xff\0" + vring + message(11, struct.pack("<II", 0, 0)))
    put("protocol", "kick", b"\xff\1" + b"".join(message(code, bytes(8)) for code in (12, 13, 14)))
    put("protocol", "config", b"\xff\0" + message(24, struct.pack("<III", 0, 60, 0) + bytes(60)))
    put("protocol", "inflight", b"\xff\1" + message(32, struct.pack("<QQHHI", 4096, 0, 1, 128, 0)))
    put("protocol", "flood", b"\xff\x21" + table)


def session() -> None:
    """Sessions: each deed is a byte, then what it takes."""
    hello = bytes([0]) + struct.pack("<HH", 0x9209, 0x7E)
    table = bytes([1, 1, 0, 1])

    def vring(index: int, size: int = 0, order: int = 0, odd: int = 0) -> bytes:
        """A set-up; `size` is an index, `order` 0 for the call first and 1 for the kick."""
        return bytes([3, index | size << 1 | order << 5, odd])

    def ask(index: int, kind: int, sector: int, head: int, layout: int, *more: int) -> bytes:
        """A request; `kind` is an index."""
        return bytes([11, index, kind, sector, head, layout, *more])

    wait, leave, reset = bytes([16, 31]), bytes([19, 0]), bytes([19, 1])
    start = hello + table + vring(0) + vring(1, order=1)
    io = ask(0, 0, 3, 0, 4 | 1) + wait + ask(0, 1, 3, 4, 4 | 2) + wait + ask(1, 2, 0, 0, 0) + wait
    put("session", "everyday", start + io + ask(0, 3, 0, 8, 16 | 4) + wait + reset)
    put("session", "ranges", start + ask(0, 4, 1, 0, 4, 8, 0) + wait + ask(0, 5, 1, 0, 4, 8, 1) + wait)
    put("session", "indirect", start + ask(0, 0, 0, 3, 16 | 12 | 2) + ask(0, 1, 0, 4, 16 | 4 | 1) + wait)
    put("session", "nowhere", start + ask(0, 0, 0, 0, 4 | 3, 0, 0xF0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 130) + wait)
    put("session", "regions", hello + table + bytes([2, 1, 12]) + vring(0) + io + bytes([2, 0, 0]) + wait)
    put("session", "shorter", hello + bytes([1, 0, 6, 4, 0]) + vring(0) + io)
    put("session", "truncated", start + io + bytes([17, 0, 4]) + ask(0, 1, 3, 8, 4 | 1) + wait)
    put("session", "punched", start + io + bytes([17, 2, 0]) + ask(0, 0, 3, 8, 4 | 1) + wait)
    notes = bytes([7, 0, 2, 4]) + bytes([7, 4, 2, 4])
    killed = ask(0, 1, 3, 0, 4 | 1) + leave + hello + table + bytes([7, 4, 2, 4]) + vring(0) + wait
    put("session", "comes-back", hello + table + notes + vring(0) + io + killed)
    put("session", "notes-changed", hello + table + notes + vring(0) + io + bytes([7, 2, 2, 4, 8, 8]) + bytes(8) + leave
        + hello + table + bytes([7, 4, 2, 4]) + vring(0) + io)
    put("session", "foreign-notes", hello + table + bytes([7, 3, 2, 4, 0]) + vring(0) + io)
    put("session", "jump", start + bytes([14, 0, 0, 0x40]) + wait)
    put("session", "changes", start + b"".join(bytes([5, n, 0, 1, 0, 0, 1, 5]) for n in range(9)) + io)
    put("session", "events", start + bytes([18, 1]) + io + bytes([18, 5]) + io)
    put("session", "configuration", hello + bytes([8, 1, 0, 0, 0, 0]) + bytes([8, 2, 0, 0, 60]) + bytes(60) + table)
    put("session", "anything", hello + bytes([6, 11, 8, 8]) + bytes(8) + bytes([6, 9, 9, 4, 1, 2, 3, 4, 2]))
    put("session", "half", hello + table + bytes([6, 5, 0, 0]))


TOML = """\
workers = 2
poll-us = 50
control = "/run/x/control.sock"

[volume.root]
driver = "file"
path = "/srv/a,b.img"
direct = true
block-size = 4096

[volume.far]
driver = "nbd"
uri = "nbd://server/disk"
connections = 2
reconnect = 30

[volume.scratch]
driver = "memory"
size = "1G"

[[ublk]]
volume = "root"
queues = 2
zero-copy = true
id = 7
max-io = "1M"

[[vhost-user]]
volume = "root"
socket = "/run/x/root.sock"
queue-size = 128
mode = "0660"
owner = "root:0"
read-only = true
"""

FLAGS = """\
volume a=file:/srv/x,,y.img,direct=on,lock=off
volume b=nbd:nbd+unix:///e?socket=/run/n.sock,reconnect=5
volume c=null:1G,block-size=4096
ublk c,queues=2,depth=64,zero-copy=off,id=3
vhost-user a=/run/a.sock,mode=0600,owner=0:0,queue-size=256
control /run/c.sock
workers xx
"""


def config() -> None:
    """Files and flags."""
    put("config", "file", b"\0" + TOML.encode())
    put("config", "flags", b"\1" + FLAGS.encode())
    small = '[volume.a]\ndriver = "null"\nsize = "1G"\n'
    put("config", "both", b"\2" + (small + "\n--\nublk a\nworkers x\n").encode())
    put("config", "unknown", b"\0" + (small + 'colour = "red"\n').encode())
    put("config", "inline", b'\0volume = { a = { driver = "memory", size = 1048576 } }\nublk = [{ volume = "a" }]\n')
    put("config", "broken", b'\0[volume.a\ndriver = "fi\\u001ble"\n')


if __name__ == "__main__":
    chain()
    nbd()
    protocol()
    session()
    config()
