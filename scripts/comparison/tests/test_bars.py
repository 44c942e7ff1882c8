"""Verdicts."""

import unittest

from .. import bars, report
from .rows import EQUAL, guest, native


def verdicts(*measurements):
    return {one.what: one for one in bars.judge(report.summarise(measurements))}


QD32 = "cached ext4, randread QD32, IOPS over qemu-storage-daemon"
CPU = "  its CPU per I/O"


class Bars(unittest.TestCase):
    def test_met_and_missed(self):
        for iops, verdict in ((180, "met"), (179, "missed")):
            one = verdicts(native("ringblk", iops), native("qsd", 100))[QD32]
            self.assertEqual((one.verdict, one.ratio), (verdict, iops / 100))

    def test_a_cost_may_not_be_above_its_bar(self):
        for cost, verdict in ((0.55, "met"), (0.56, "missed")):
            found = verdicts(native("ringblk", 1, server_us=cost), native("qsd", 1, server_us=1.0))
            self.assertEqual(found[CPU].verdict, verdict)

    def test_against_the_fastest_variant_for_cost_too(self):
        fast, frugal = native("qsd", 200, server_us=4), native("qsd-threads", 100, server_us=1)
        found = verdicts(native("ringblk", 300, server_us=2), fast, frugal)
        self.assertEqual((found[QD32].ratio, found[CPU].ratio), (1.5, 0.5))
        self.assertEqual(found[QD32].note, "against qsd")

    def test_not_measured(self):
        self.assertEqual(verdicts(native("ringblk", 1))[QD32].verdict, "not measured")
        self.assertEqual(verdicts(native("qsd", 1))[QD32].verdict, "not measured")

    def test_refused(self):
        one = verdicts(native("ringblk", 2), native("qsd", 1, conditions={**EQUAL, "kernel": "6.18"}))[QD32]
        self.assertEqual((one.verdict, one.ratio), ("refused", None))

    def test_other_commands_judge_the_rest(self):
        elsewhere = [one for one in bars.judge([]) if one.verdict == "elsewhere"]
        self.assertTrue(elsewhere)
        self.assertTrue(all(one.note.startswith("cargo ") for one in elsewhere))

    def test_guest(self):
        found = verdicts(guest("ringblk", 10), guest("rublk", 14), guest("rublk-zc", 13), guest("iscsi", 35))
        told = found["  cached ext4, QD32"]
        self.assertEqual((told.note, told.verdict, told.limit), ("against rublk-zc", "no bar", ""))
        self.assertEqual(found["  QD32"].verdict, "not measured", "tmpfs is another store")
        found |= verdicts(guest("ringblk", 3, store="tmpfs"), guest("rublk", 4, store="tmpfs"))
        self.assertEqual((found["  QD32"].note, found["  QD32"].verdict), ("against rublk", "met"))
        found |= verdicts(guest("ringblk", 10), guest("iscsi", 35))
        self.assertEqual(found["iSCSI, the same"].verdict, "met")
        self.assertEqual(found["NVMe/TCP, the same"].verdict, "not measured")

    def test_every_check_names_a_job_and_a_bar_once(self):
        keys = [(c.half, c.store, c.job, c.value, c.client, c.rivals) for c in bars.CHECKS]
        self.assertEqual(len(keys), len(set(keys)))
