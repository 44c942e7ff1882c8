"""The chart of a run: an SVG that reads well on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from .model import JOBS
from .report import OURS, Row, refusal

WIDTH, LEFT, RIGHT = 860, 130, 110
BAR, GAP, GROUP = 13, 2, 14
TITLE = 44

# Colours of the field's parties that keep their contrast on white and on black; text follows the page.
COLOURS = {
    "ringblk": "#e4572e", "qsd": "#4c78a8", "qsd-threads": "#7fa3c7", "nbdkit": "#54a24b", "nbdkit-tcp": "#8fc98a",
    "qemu-nbd": "#b279a2", "qemu-nbd-tcp": "#d3a6c8", "fio": "#9a9a9a", "fio-batched": "#c4c4c4",
}  # fmt: skip
OTHER = "#9a9a9a"

# The rest is in the table.
SHOWN = ("randread-qd1", "randread-qd32", "randread-qd128", "randread-4xqd32", "randwrite-qd32", "read128k-qd8")
# Title, half, store, value.
PANELS = (
    ("I/Os per second on a page-cached ext4 file, one CPU for the server (longer is better)", "native", "ext4", "iops"),
    ("Thousand guest instructions per I/O, page-cached ext4 file (shorter is better)", "guest", "ext4", "kinsn"),
)

STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 }
  .job { font-weight: 600 }
  .small { font-size: 11px; fill: #59636e }
  .axis { stroke: #8c959f; stroke-dasharray: 3 3 }
  .page { fill: #ffffff }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .small { fill: #9198a1 } .axis { stroke: #6e7681 }
    .page { fill: #0d1117 }
  }
"""


@dataclass(frozen=True)
class Bar:
    name: str
    # Of the longest bar of the chart's scale, 0 to 1.
    part: float
    label: str
    colour: str


@dataclass(frozen=True)
class Group:
    title: str
    bars: list[Bar]
    # Where ringblk's bar ends.
    ours: float


def groups_of(rows: list[Row], half: str, store: str, value: str) -> list[Group]:
    """For each job on that store, the value as a share of the job's largest; sides that may not be compared with
    ringblk's are left out."""
    groups = []
    chosen = [row for row in rows if (row.half, row.store) == (half, store) and row.client != "poll"]
    for job in (name for name in JOBS if name in SHOWN):
        of_job = [row for row in chosen if row.job == job]
        ours = next((row for row in of_job if row.peer == OURS), None)
        if ours is None:
            continue
        fair = [row for row in of_job if not refusal(ours, row) and value in row.medians]
        largest = max(row.medians[value] for row in fair)
        bars = [
            Bar(row.peer, of / largest, label(of, value), COLOURS.get(row.peer, OTHER))
            for row in fair
            for of in [row.medians[value]]
        ]
        groups.append(Group(job, bars, ours.medians[value] / largest))
    return groups


def label(value: float, name: str) -> str:
    return f"{value / 1e3:.0f}k" if name == "iops" else f"{value:.1f}k"


def panel(title: str, groups: list[Group], top: int) -> tuple[list[str], int]:
    """Its elements, and the y where the next may begin."""
    room = WIDTH - LEFT - RIGHT
    out = [f'<text class="title" x="16" y="{top + 20}">{escape(title)}</text>']
    y = top + TITLE
    for group in groups:
        height = len(group.bars) * (BAR + GAP)
        out.append(f'<text class="job" x="16" y="{y + BAR - 2}">{escape(group.title)}</text>')
        y += BAR + GAP + 3
        x = LEFT + group.ours * room
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + height}"/>')
        for bar in group.bars:
            out.append(f'<text x="{LEFT - 8}" y="{y + BAR - 2}" text-anchor="end">{escape(bar.name)}</text>')
            width = max(1.0, bar.part * room)
            out.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{bar.colour}"/>')
            share = f"{bar.label}, {bar.part / group.ours:.2f} x" if bar.name != OURS else bar.label
            out.append(f'<text class="small" x="{LEFT + width + 6:.1f}" y="{y + BAR - 2}">{escape(share)}</text>')
            y += BAR + GAP
        y += GROUP
    return out, y


def svg(rows: list[Row], machine: Mapping[str, object]) -> str:
    """The whole file."""
    parts: list[str] = []
    y = 8
    for title, half, store, value in PANELS:
        if groups := groups_of(rows, half, store, value):
            elements, y = panel(title, groups, y)
            parts += elements
    on = f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['kernel']}, ringblk {machine['commit']}"
    where = f"x: of ringblk's. {on}"
    parts.append(f'<text class="small" x="16" y="{y + 10}">{escape(where)}</text>')
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 24}" viewBox="0 0 {WIDTH} {y + 24}">',
        f"<style>{STYLE}</style>",
        # Its own page: a site's theme may not be the one that the browser asks for.
        f'<rect class="page" width="{WIDTH}" height="{y + 24}"/>',
        *parts,
        "</svg>\n",
    ])  # fmt: skip
