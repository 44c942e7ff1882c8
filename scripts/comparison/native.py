"""The native half: servers on one CPU, the load generator on another, peers in turn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from . import conditions
from .matrix import Cell, cells
from .model import Measurement, Note, Plan, Progress
from .peers import AGAINST, BATCHED, Peer, all_peers
from .server import Failed, NotStarted, Server
from .stores import SIZE, Absent, Store, Stores

ROOT = Path(__file__).parents[2]
# Of a load generator beyond the time that it measures.
PATIENCE_SECONDS = 60


def build(plan: Plan) -> tuple[Path, Path]:
    """The paths of ringblk and of the load generator, as this tree has them now."""
    plan.say("building")
    base = ["cargo", "build", "--release", "--quiet", "--message-format=json-render-diagnostics"]
    paths = {}
    # Two builds: in one, the development dependencies' features would be ringblk's as well.
    for name, what in (("ringblk", ["--bin", "ringblk"]), ("load", ["--bench", "load"])):
        done = subprocess.run([*base, *what], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"compare: could not build {name}")
        for line in done.stdout.splitlines():
            message = json.loads(line)
            if message.get("executable") and message["target"]["name"] == name:
                paths[name] = Path(message["executable"])
    return paths["ringblk"], paths["load"]


class Bench:
    """Measures one peer at a time."""

    def __init__(self, plan: Plan, load: Path) -> None:
        self.plan, self.load = plan, load
        self.log = plan.scratch / "server.log"

    def measure(self, peer: Peer, store: Store, cell: Cell) -> Measurement:
        """Raises Failed."""
        store.prepare(cell.job.writes)
        values = self._fio(peer, store, cell) if peer.serve is None else self._served(peer, store, cell)
        client = "fio" if peer.serve is None else cell.client
        named = {
            "half": "native", "peer": peer.name, "store": store.name, "job": cell.job.name, "client": client,
            "conditions": conditions.native(cell.job, client, store.conditions, self.plan.times),
        }  # fmt: skip
        return cast(Measurement, named | values)

    def _run(self, command: list[str]) -> dict[str, object]:
        """The JSON that a load generator prints."""
        patience = self.plan.times.measured + PATIENCE_SECONDS
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"the load does not end after {patience:.0f} s") from error
        if done.returncode:
            raise Failed((done.stderr or done.stdout).strip()[-400:] or f"the load ended with {done.returncode}")
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    def _served(self, peer: Peer, store: Store, cell: Cell) -> dict[str, object]:
        assert peer.serve
        served = peer.serve(store, self.plan.scratch)
        job, times = cell.job, self.plan.times
        load = [str(self.load), *served.client, "--json", "--cpu", str(conditions.CLIENT_CPU)]
        with Server(served.command, served.address, self.log) as server:
            if store.kind == "memory":
                # Pages that nobody wrote need no copy in some servers.
                writes = ["--rw", "write", "--bs", "128K", "--depth", "8", "--ramp", "0"]
                self._watched(server, [*load, *writes, "--count", str(SIZE >> 17)])
            what = ["--rw", job.rw, "--bs", str(job.block), "--depth", str(job.depth), "--queues", str(job.queues)]
            time = ["--runtime", str(times.measured), "--ramp", str(times.ramp), "--server-pid", str(server.pid)]
            poll = ["--poll"] if cell.client == "poll" else []
            answer = self._watched(server, [*load, *what, *time, *poll])
        return {name: answer[name] for name in ("iops", "p50_us", "p99_us", "p999_us", "server_us", "client_us")}

    def _watched(self, server: Server, command: list[str]) -> dict[str, object]:
        try:
            return self._run(command)
        except Failed as error:
            raise Failed(f"{error}; the server {server.state()}") from error

    def _fio(self, peer: Peer, store: Store, cell: Cell) -> dict[str, object]:
        """fio's own io_uring loop on the store, on the server's CPU, as it is by default or with batches. Its CPU time
        would be one thread's, without the kernel's workers, and is left out."""
        job, times = cell.job, self.plan.times
        batches = []
        if peer.name == BATCHED:
            batches = [f"--iodepth_batch_submit={max(1, job.depth // 2)}", "--iodepth_batch_complete_min=1",
                       f"--iodepth_batch_complete_max={job.depth}"]  # fmt: skip
        command = [
            "taskset", "-c", str(conditions.SERVER_CPU), "fio", "--name=ceiling", f"--filename={store.path}",
            "--ioengine=io_uring", f"--rw={job.rw}", f"--bs={job.block}", f"--iodepth={job.depth}",
            f"--direct={int(store.direct)}", "--invalidate=0", *batches,
            "--norandommap", "--randrepeat=0", f"--size={SIZE}", "--time_based", "--allow_file_create=0",
            f"--runtime={int(times.measured * 1000)}ms", f"--ramp_time={int(times.ramp * 1000)}ms",
            # From submission to completion, as the load generator's: io_uring reads what is cached in the former.
            "--lat_percentiles=1", "--clat_percentiles=0", "--percentile_list=50:99:99.9", "--output-format=json",
        ]  # fmt: skip
        side = self._run(command)["jobs"][0]  # type: ignore[index]
        of = side["write" if job.writes else "read"]
        latencies = of["lat_ns"]["percentile"]
        return {
            "iops": of["iops"], "p50_us": latencies["50.000000"] / 1e3, "p99_us": latencies["99.000000"] / 1e3,
            "p999_us": latencies["99.900000"] / 1e3,
        }  # fmt: skip


def peers_here(plan: Plan, program: Path) -> list[Peer]:
    """Those whose programs are there."""
    peers = []
    for peer in all_peers(program, plan.against):
        if not plan.peers.search(peer.name):
            continue
        if not shutil.which(peer.program):
            plan.absent.append(Note("native", peer.name, f"there is no {peer.program}"))
            continue
        name = AGAINST if peer.name == AGAINST else Path(peer.program).name
        plan.versions[name] = conditions.first_line(peer.program, "--version")
        peers.append(peer)
    return peers


def measure(plan: Plan) -> Iterator[Measurement]:
    """Measures all, round by round; what cannot be measured goes to plan.failures and plan.absent."""
    if (os.cpu_count() or 1) < 2:
        plan.absent.append(Note("native", "everything", "needs two CPUs: one for the server, one for the load"))
        return
    program, load = build(plan)
    chosen = cells(plan, peers_here(plan, program))
    stores, bench = Stores(plan), Bench(plan, load)
    lost: set[tuple[str, ...]] = set()
    progress = Progress(plan, plan.rounds * sum(len(cell.peers) for cell in chosen))
    try:
        for round_ in range(1, plan.rounds + 1):
            for cell in chosen:
                for peer in cell.peers:
                    progress.step(f"round {round_}: {peer.name} {cell.store} {cell.job.name} {cell.client}")
                    names = (peer.name, cell.store, cell.job.name, cell.client)
                    if {(cell.store,), names[:2], names} & lost:
                        continue
                    try:
                        result = bench.measure(peer, stores.get(cell.store), cell)
                    except Absent as error:
                        lost.add((cell.store,))
                        plan.absent.append(Note("native", f"store {cell.store}", str(error)))
                    except (NotStarted, OSError) as error:
                        lost.add(names[:2])
                        failed(plan, names[:2], error)
                    except Failed as error:
                        lost.add(names)
                        failed(plan, names, error)
                    else:
                        result["round"] = round_
                        yield result
    finally:
        stores.close()


def failed(plan: Plan, names: tuple[str, ...], error: Exception) -> None:
    plan.failures.append(Note("native", " ".join(names), str(error)))
    plan.say(f"FAILED: {' '.join(names)}: {error}")
