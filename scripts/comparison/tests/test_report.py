"""Medians, spreads, ratios, and when there must be none."""

import unittest

from .. import report
from ..model import Note
from .rows import EQUAL, guest, native


def rows_of(*measurements):
    return report.summarise(measurements)


class Summary(unittest.TestCase):
    def test_medians_and_spread(self):
        row, = rows_of(*(native("ringblk", iops, round_=at) for at, iops in enumerate((90, 100, 150), 1)))
        self.assertEqual((row.rounds, row.medians["iops"]), (3, 100))
        self.assertAlmostEqual(row.spread, 0.6)

    def test_clients_are_not_mixed(self):
        rows = rows_of(native("ringblk", 1), native("ringblk", 2, client="poll"))
        self.assertEqual([row.client for row in rows], ["event", "poll"])

    def test_a_value_that_a_peer_does_not_have(self):
        fio = native("fio", 100, client="fio")
        del fio["client_us"]
        self.assertNotIn("client_us", rows_of(fio)[0].medians)


class Ratios(unittest.TestCase):
    def test_ours_over_theirs(self):
        ours, theirs = rows_of(native("ringblk", 300, server_us=1), native("qsd", 100, server_us=4))
        self.assertEqual(report.ratio(ours, theirs, "iops").value, 3)
        self.assertEqual(report.ratio(ours, theirs, "server_us").value, 0.25)

    def test_refused_under_other_conditions(self):
        for name, value in (("boot_id", "b"), ("depth", 128), ("store", "tmpfs"), ("client_cpus", "1")):
            with self.subTest(name):
                ours, theirs = rows_of(native("ringblk", 3), native("qsd", 1, conditions={**EQUAL, name: value}))
                refused = report.ratio(ours, theirs, "iops")
                self.assertIsNone(refused.value)
                self.assertIn(name, refused.why)
                self.assertEqual(str(refused), "refused")

    def test_refused_where_a_condition_is_not_known(self):
        partial = {name: value for name, value in EQUAL.items() if name != "kernel"}
        for first, second in ((EQUAL, partial), (partial, EQUAL)):
            ours, theirs = rows_of(native("ringblk", 3, conditions=first), native("qsd", 1, conditions=second))
            self.assertIn("kernel", report.refusal(ours, theirs))

    def test_refused_where_one_side_changed_between_its_rounds(self):
        changed = native("qsd", 1, round_=2, conditions={**EQUAL, "boot_id": "b"})
        ours, theirs = rows_of(native("ringblk", 3), native("qsd", 1), changed)
        self.assertIn("boot_id", report.refusal(ours, theirs))

    def test_what_does_not_apply_to_one_side_may_differ(self):
        alone = {**EQUAL, "client_cpus": None, "client": None}
        ours, theirs = rows_of(native("ringblk", 90), native("fio", 100, client="fio", conditions=alone))
        self.assertEqual(report.ratio(ours, theirs, "iops").value, 0.9)

    def test_no_ratio_to_nothing(self):
        ours, theirs = rows_of(native("ringblk", 3), native("qsd", 1, server_us=0))
        self.assertEqual(str(report.ratio(ours, theirs, "server_us")), "-")


class Tables(unittest.TestCase):
    def test_a_refusal_is_printed_with_its_reason_and_no_number(self):
        rows = rows_of(native("ringblk", 3000), native("qsd", 1000, conditions={**EQUAL, "kernel": "6.18"}))
        text = "\n".join(report.native_table(rows))
        self.assertIn("refused", text)
        self.assertIn("kernel: 6.1 against 6.18", text)
        self.assertNotIn("3.00x", text)
        self.assertEqual(set(report.summary(rows)[1]["ringblk_over_it"].values()), {None})

    def test_native(self):
        text = "\n".join(report.native_table(rows_of(native("ringblk", 300_000), native("qsd", 100_000))))
        self.assertRegex(text, r"qsd +100.0k +0% +10.0 +20.0 +30.0 +2.00 +3.00x +1.00x +1.00x")

    def test_fio_is_beside_the_event_driven_clients(self):
        alone = {**EQUAL, "client_cpus": None, "client": None}
        fio = native("fio", 100_000, client="fio", conditions=alone)
        lines = report.native_table(rows_of(native("ringblk", 90_000), native("ringblk", 95_000, client="poll"), fio))
        self.assertEqual([line for line in lines if "fio" in line][0].split()[7], "0.90x")

    def test_guest(self):
        text = "\n".join(report.guest_table(rows_of(guest("ringblk", 8), guest("rublk", 10))))
        self.assertRegex(text, r"rublk ext4 +10.0 0.80x")

    def test_notes(self):
        self.assertEqual(report.notes("failed", []), [])
        self.assertIn("  native: qsd: ended with 1", report.notes("failed", [Note("native", "qsd", "ended with 1")]))
