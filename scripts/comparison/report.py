"""The summary of a run: medians, spreads, ratios that are fair, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .model import JOBS, Conditions, Measurement, Note

OURS = "ringblk"
VALUES = ("iops", "p50_us", "p99_us", "p999_us", "server_us", "client_us", "kinsn")


@dataclass(frozen=True)
class Row:
    """One peer at one job: the medians of its rounds."""

    half: str
    store: str
    job: str
    client: str
    peer: str
    rounds: int
    medians: dict[str, float]
    # (largest - smallest) / median of IOPS or of the guest's instructions.
    spread: float
    conditions: Conditions
    # Why its rounds are not of one kind, where they are not.
    mixed: str = ""


def summarise(measurements: Iterable[Measurement]) -> list[Row]:
    """In the order of first appearance."""
    groups: dict[tuple[str, str, str, str, str], list[Measurement]] = {}
    for one in measurements:
        key = (one["half"], one["store"], one["job"], one["client"], one["peer"])
        groups.setdefault(key, []).append(one)
    return [row(*key, group) for key, group in groups.items()]


def row(half: str, store: str, job: str, client: str, peer: str, group: Sequence[Measurement]) -> Row:
    medians = {
        name: statistics.median(one[name] for one in group)  # type: ignore[literal-required]
        for name in VALUES
        if all(one.get(name) is not None for one in group)
    }
    main = "iops" if half == "native" else "kinsn"
    values = [one[main] for one in group]  # type: ignore[literal-required]
    spread = (max(values) - min(values)) / medians[main]
    first = group[0]["conditions"]
    reasons = (differing(first, one["conditions"]) for one in group)
    mixed = next((reason for reason in reasons if reason), "")
    return Row(half, store, job, client, peer, len(group), medians, spread, first, mixed)


def differing(ours: Conditions, theirs: Conditions) -> str:
    """The first condition that is not the same, or "". One that is None does not apply to its side; one that is not
    there is not known to be equal."""
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in ours or name not in theirs:
            return f"{name} is known of one side only"
        if ours[name] != theirs[name] and ours[name] is not None and theirs[name] is not None:
            return f"{name}: {ours[name]} against {theirs[name]}"
    return ""


def refusal(ours: Row, theirs: Row) -> str:
    """Why the two may not be divided by each other, or ""."""
    if ours.mixed or theirs.mixed:
        return ours.mixed or theirs.mixed
    return differing(ours.conditions, theirs.conditions)


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs, or why it is refused; neither where one side has no such value."""

    value: float | None
    why: str = ""

    def __str__(self) -> str:
        return f"{self.value:.2f}x" if self.value is not None else "refused" if self.why else "-"


def ratio(ours: Row, theirs: Row, name: str) -> Ratio:
    if why := refusal(ours, theirs):
        return Ratio(None, why)
    if not theirs.medians.get(name) or name not in ours.medians:
        return Ratio(None)
    return Ratio(ours.medians[name] / theirs.medians[name])


def find(rows: Iterable[Row], half: str, store: str, job: str, client: str, peer: str) -> Row | None:
    key = (half, store, job, client, peer)
    return next((row for row in rows if (row.half, row.store, row.job, row.client, row.peer) == key), None)


def rival_of(rows: list[Row], row: Row) -> Row | None:
    """Our row of the same job; fio, its own client, is compared with our event-driven one."""
    client = "event" if row.client == "fio" and row.half == "native" else row.client
    return find(rows, row.half, row.store, row.job, client, OURS)


def summary(rows: list[Row]) -> list[dict[str, object]]:
    """For the JSON."""
    out = []
    for one in rows:
        entry: dict[str, object] = {
            "half": one.half, "store": one.store, "job": one.job, "client": one.client, "peer": one.peer,
            "rounds": one.rounds, "median": one.medians, "spread": one.spread,
        }  # fmt: skip
        ours = rival_of(rows, one)
        if ours is not None and one.peer != OURS:
            ratios = {name: ratio(ours, one, name) for name in one.medians if name in ours.medians}
            entry["ringblk_over_it"] = {name: each.value for name, each in ratios.items()}
            if why := refusal(ours, one):
                entry["refused"] = why
        out.append(entry)
    return out


def kilo(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e3:.1f}k"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def native_table(rows: list[Row]) -> list[str]:
    """A part for each store, job and client; fio, which has no client, is with the event-driven ones. Ratios are
    ringblk's value over the peer's."""
    places: dict[tuple[str, str, str], list[Row]] = {}
    for one in rows:
        places.setdefault((one.store, one.job, "event" if one.client == "fio" else one.client), []).append(one)
    stores, jobs = list(dict.fromkeys(store for store, _, _ in places)), list(JOBS)
    head = ("peer", "IOPS", "spread", "p50 us", "p99 us", "p99.9 us", "CPU us/IO", "IOPS x", "CPU x", "p99 x")
    lines, refused = [], []
    for place in sorted(places, key=lambda place: (stores.index(place[0]), jobs.index(place[1]), place[2])):
        store, job, client = place
        lines += ["", f"{store}: {job}, {'polling' if client == 'poll' else 'event-driven'} client", table_line(head)]
        for one in places[place]:
            ours = rival_of(rows, one)
            lines.append(table_line(native_fields(one, ours)))
            if ours is not None and (why := refusal(ours, one)):
                refused.append(f"{one.peer}, {store}, {job}: no ratio: {why}")
    return lines + [""] * bool(refused) + refused


def native_fields(one: Row, ours: Row | None) -> list[str]:
    times = [number(one.medians.get(name)) for name in ("p50_us", "p99_us", "p999_us", "server_us")]
    ratios = []
    if ours is not None and one.peer != OURS:
        ratios = [str(ratio(ours, one, name)) for name in ("iops", "server_us", "p99_us")]
    return [one.peer, kilo(one.medians["iops"]), f"{one.spread:.0%}", *times, *ratios]


def table_line(fields: Iterable[str]) -> str:
    name, *rest = fields
    return (f"  {name:<14}" + "".join(f"{field:>11}" for field in rest)).rstrip()


def guest_table(rows: list[Row]) -> list[str]:
    """Thousand instructions per I/O, a line for each peer, and in brackets ringblk's over it."""
    jobs = list(dict.fromkeys(row.job for row in rows))
    lines = ["", "guest: thousand guest instructions per I/O (x: ringblk's over the peer's)"]
    lines.append("  " + f"{'peer':<22}" + "".join(f"{job:>24}" for job in jobs))
    for store, peer in dict.fromkeys((row.store, row.peer) for row in rows):
        fields = []
        for job in jobs:
            one = next((row for row in rows if (row.store, row.peer, row.job) == (store, peer, job)), None)
            if one is None or "kinsn" not in one.medians:
                fields.append("-")
                continue
            ours = rival_of(rows, one)
            with_ratio = f" {ratio(ours, one, 'kinsn')}" if ours is not None and peer != OURS else ""
            fields.append(f"{number(one.medians['kinsn'])}{with_ratio}")
        lines.append("  " + f"{peer + ' ' + store:<22}" + "".join(f"{field:>24}" for field in fields))
    return lines


def notes(title: str, of: list[Note]) -> list[str]:
    return ["", f"{title}:", *(f"  {note.half}: {note.what}: {note.why}" for note in of)] if of else []
