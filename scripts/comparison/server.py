"""A server's process: started on its CPU, waited for, stopped; its log."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from .conditions import SERVER_CPU

START_SECONDS = 15.0
STOP_SECONDS = 10.0
ACCEPTS = 0x10000  # __SO_ACCEPTCON of /proc/net/unix
TCP_LISTEN = "0A"


class Failed(Exception):
    """A server or a load generator did not do its work; the text ends with its last lines."""


class NotStarted(Failed):
    """A server did not come up."""


def tail(log: Path, lines: int = 5) -> str:
    text = log.read_text(errors="replace").strip().splitlines()[-lines:] if log.exists() else []
    return "; ".join(text) or "its log is empty"


def listens(address: str) -> bool:
    """Whether somebody accepts connections at "unix:PATH" or "tcp:HOST:PORT"; nothing is sent there."""
    kind, rest = address.split(":", 1)
    if kind == "unix":
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[7] == rest and int(fields[3], 16) & ACCEPTS:
                return True
        return False
    port = f":{int(rest.rsplit(':', 1)[1]):04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1].endswith(port) and fields[3] == TCP_LISTEN:
            return True
    return False


class Server:
    """Runs while the `with` block does; not in our process group, so that Ctrl-C is ours alone."""

    def __init__(self, command: list[str], address: str, log: Path) -> None:
        self.command, self.address, self.log = command, address, log
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    def state(self) -> str:
        """For a message: whether it runs, and what it said last."""
        assert self.process
        code = self.process.poll()
        return f"{'still runs' if code is None else f'ended with {code}'}: {tail(self.log)}"

    def __enter__(self) -> Server:
        if self.address.startswith("unix:"):
            Path(self.address.removeprefix("unix:")).unlink(missing_ok=True)
        with self.log.open("wb") as log:
            try:
                # taskset becomes the server: the process is its own.
                self.process = subprocess.Popen(
                    ["taskset", "-c", str(SERVER_CPU), *self.command],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )
            except OSError as error:
                raise NotStarted(str(error)) from error
        try:
            end = time.monotonic() + START_SECONDS
            while not listens(self.address):
                if self.process.poll() is not None:
                    raise NotStarted(f"ended with {self.process.returncode}: {tail(self.log)}")
                if time.monotonic() > end:
                    raise NotStarted(f"does not listen after {START_SECONDS:.0f} s: {tail(self.log)}")
                time.sleep(0.01)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
