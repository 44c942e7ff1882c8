"""The chart is well-formed, and shows what was measured."""

import unittest
import xml.etree.ElementTree as xml

from .. import chart, report
from .rows import EQUAL, guest, native

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = {"cpu": "CPU <1>", "cpus": 2, "kernel": "Linux 6", "commit": "abc"}


def bars_of(*measurements):
    """Each bar's name and width, and all text."""
    root = xml.fromstring(chart.svg(report.summarise(measurements), MACHINE))
    names = [text.text for text in root.iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    widths = [float(rect.get("width")) for rect in root.iter(f"{SVG}rect") if rect.get("class") != "page"]
    return dict(zip(names, widths, strict=True)), " ".join(text.text for text in root.iter(f"{SVG}text"))


class Chart(unittest.TestCase):
    def test_lengths_are_the_shares_of_the_longest(self):
        bars, text = bars_of(native("ringblk", 200_000), native("qsd", 100_000))
        self.assertAlmostEqual(bars["qsd"], bars["ringblk"] / 2, places=1)
        self.assertIn("100k, 0.50 x", text)
        self.assertIn("CPU <1>", text)

    def test_what_has_no_fair_ratio_has_no_bar(self):
        bars, _ = bars_of(native("ringblk", 2), native("qsd", 1, conditions={**EQUAL, "kernel": "6.18"}))
        self.assertEqual([*bars], ["ringblk"])

    def test_both_halves(self):
        bars, text = bars_of(native("ringblk", 2), guest("ringblk", 5), guest("rublk", 10))
        self.assertIn("rublk", bars)
        self.assertIn("instructions", text)

    def test_nothing_measured(self):
        self.assertEqual(bars_of()[0], {})
