import re
import unittest
from pathlib import Path

from comparison import matrix, peers
from comparison.model import Plan, Seconds


def cells(against: Path | None, wanted: str = "") -> list[matrix.Cell]:
    plan = Plan(False, 1, Seconds(1, 0), re.compile(""), re.compile(wanted), Path("."), against=against)
    return matrix.cells(plan, peers.all_peers(Path("new"), against))


class Against(unittest.TestCase):
    def test_another_build_takes_its_turn_wherever_ringblk_does(self) -> None:
        for cell in cells(Path("old")):
            names = [peer.name for peer in cell.peers]
            self.assertEqual("ringblk" in names, peers.AGAINST in names)
        self.assertTrue(cells(Path("old"), f"^{peers.AGAINST}$"))

    def test_without_one_there_is_none(self) -> None:
        self.assertFalse(cells(None, f"^{peers.AGAINST}$"))


if __name__ == "__main__":
    unittest.main()
