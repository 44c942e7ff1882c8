"""What is made of the lines that the guest prints."""

from __future__ import annotations

import re
import unittest
from pathlib import Path

from ..guest import Output, chosen
from ..guest_peers import PEERS
from ..model import JOBS, Measurement, Plan, Seconds
from ..report import differing


def plan(quick: bool = False, jobs: str = "", peers: str = "") -> Plan:
    return Plan(
        quick=quick, rounds=1, times=Seconds(0, 0), jobs=re.compile(jobs), peers=re.compile(peers),
        scratch=Path("/none"),
    )  # fmt: skip


class Reading(unittest.TestCase):
    def setUp(self) -> None:
        self.plan = plan()
        self.said: list[str] = []
        self.plan.say = self.said.append  # type: ignore[assignment, method-assign]
        self.output = Output(self.plan, "7.3.4", "max", list(PEERS), list(JOBS.values()), 1)

    def cell(self, line: str) -> Measurement:
        one = self.output.read(line)
        assert one is not None
        return one

    def test_a_cell_is_thousand_instructions_per_io(self) -> None:
        self.assertIsNone(self.output.read("boot 1234\n"))
        one = self.cell("cell rublk-loop@tmpfs randread-qd32 2 10000 227556\n")
        self.assertEqual((one["peer"], one["store"], one["job"], one["round"]), ("rublk", "tmpfs", "randread-qd32", 2))
        self.assertAlmostEqual(one["kinsn"], 22.7556)
        self.assertEqual(one["ios"], 10000)

    def test_ratios_are_fair_within_one_boot_only(self) -> None:
        self.output.read("boot 1")
        ours = self.cell("cell ringblk-file@ext4 randread-qd1 1 2000 90000")
        theirs = self.cell("cell loop@ext4 randread-qd1 1 2000 50000")
        self.output.read("boot 2")
        later = self.cell("cell loop@ext4 randread-qd1 1 2000 50000")
        elsewhere = self.cell("cell loop@tmpfs randread-qd1 1 2000 20000")
        self.assertEqual(differing(ours["conditions"], theirs["conditions"]), "")
        self.assertIn("guest_boot", differing(ours["conditions"], later["conditions"]))
        self.assertIn("store", differing(later["conditions"], elsewhere["conditions"]))

    def test_a_peer_that_fails_is_told_with_the_reason(self) -> None:
        self.output.read("down iscsi@ext4 waited in vain for: listens 3260")
        self.output.read("lost nbd-tcp@ext4 read128k-qd8 1 fio: status 1 Input/output error")
        self.assertEqual(
            [(note.what, note.why) for note in self.plan.failures],
            [
                ("iscsi ext4", "waited in vain for: listens 3260"),
                ("nbd-tcp ext4", "read128k-qd8: fio: status 1 Input/output error"),
            ],
        )

    def test_only_the_last_line_is_the_end(self) -> None:
        self.output.read("up brd@memory /dev/ram0")
        self.output.read("bash: something unforeseen")
        self.assertFalse(self.output.ended)
        self.assertEqual(self.said, ["guest: bash: something unforeseen"])
        self.output.read("end")
        self.assertTrue(self.output.ended)


class Choosing(unittest.TestCase):
    def test_quick_is_fewer(self) -> None:
        peers, jobs = chosen(plan(quick=True))
        self.assertEqual([job.name for job in jobs], ["randread-qd1", "randread-qd32"])
        self.assertEqual({peer.name for peer in peers}, {"ringblk", "rublk", "loop", "nbd-tcp"})
        every, all_jobs = chosen(plan())
        self.assertEqual((len(every), len(all_jobs)), (len(PEERS), 8))
        self.assertIn("tmpfs", all_jobs[JOBS["randread-qd32"]])
        self.assertNotIn("tmpfs", all_jobs[JOBS["randread-qd128"]])

    def test_a_store_may_be_chosen(self) -> None:
        peers, jobs = chosen(plan(jobs="^tmpfs/randread-qd32"))
        self.assertEqual({peer.store for peer in peers}, {"tmpfs"})
        self.assertEqual({job.name: stores for job, stores in jobs.items()}, {"randread-qd32": ["tmpfs"]})

    def test_no_two_disks_have_one_name(self) -> None:
        self.assertEqual(len({peer.disk for peer in PEERS}), len(PEERS))

    def test_each_disk_has_a_function_in_the_guest(self) -> None:
        script = (Path(__file__).parents[1] / "guest/peers.sh").read_text()
        for peer in PEERS:
            self.assertIn(f"\npeer_{peer.kind.replace('-', '_')}() {{", script)


if __name__ == "__main__":
    unittest.main()
