"""Measurements for the tests."""

from __future__ import annotations

from ..model import Conditions, Measurement

EQUAL: Conditions = {
    "kernel": "6.1", "boot_id": "a", "store": "ext4", "client_cpus": "0", "client": "event", "depth": 32,
}  # fmt: skip


def native(
    peer: str, iops: float, *, round_: int = 1, server_us: float = 2.0, job: str = "randread-qd32",
    client: str = "event", store: str = "ext4", conditions: Conditions = EQUAL,
) -> Measurement:  # fmt: skip
    return {
        "half": "native", "peer": peer, "store": store, "job": job, "client": client, "round": round_,
        "conditions": conditions, "iops": iops, "p50_us": 10.0, "p99_us": 20.0, "p999_us": 30.0,
        "server_us": server_us, "client_us": 1.0,
    }  # type: ignore[typeddict-item]  # fmt: skip


def guest(peer: str, kinsn: float, *, job: str = "randread-qd32", store: str = "ext4") -> Measurement:
    return {
        "half": "guest", "peer": peer, "store": store, "job": job, "client": "fio", "round": 1,
        "conditions": {"guest_boot": "b"}, "kinsn": kinsn, "ios": 1000,
    }  # fmt: skip
