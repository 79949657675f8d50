"""query-blockstats after a known workload.

The reference counts for devices only, of which a storage daemon has none: its counters stay zero. Here they count.
What it tells otherwise is the same: how far has been written, and what became of discards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from harness import Qmp, RunningDaemon
from nbd_reader import NbdError, NbdReader

MIB: Final = 1 << 20
STEPS: Final[list[Callable[[NbdReader], Any]]] = [
    lambda client: client.write(0, b"x" * 4096),
    lambda client: client.write(1000, b"y" * 100),
    lambda client: client.write(70_000, b"z" * 512, fua=True),
    lambda client: client.write(MIB, bytes(65536)),
    lambda client: client.read(0, 65536),
    lambda client: client.read(5, 10),
    lambda client: client.write_zeroes(131_072, 65536, may_unmap=False),
    lambda client: client.write_zeroes(196_608, 65536, may_unmap=True),
    lambda client: client.trim(0, 65536),
    lambda client: client.trim(1, 100),
    lambda client: client.flush(),
    lambda client: client.read(1 << 30, 512),
    lambda client: client.write(2 * MIB - 1, b"q"),
]
# After all of them, where zeroes are not looked for.
COUNTED: Final = {
    "rd_bytes": 65536 + 10,
    "rd_operations": 2,
    "wr_bytes": 4096 + 100 + 512 + 65536 + 1,
    "wr_operations": 5,
    "unmap_bytes": 65536 + 100,
    "unmap_operations": 2,
    "flush_operations": 1,
}


def statistics(qmp: Qmp) -> dict[str, dict[str, Any]]:
    found = qmp.execute("query-blockstats", query_nodes=True)
    return {node["node-name"]: node for node in found}


def told(qmp: Qmp) -> dict[str, Any]:
    """What both tell."""
    return {
        name: (node["stats"]["wr_highest_offset"], node.get("driver-specific"))
        for name, node in statistics(qmp).items()
    }


def play(qmp: Qmp, place: Path, options: dict[str, str]) -> list[Any]:
    """What it tells after every step."""
    (place / "image").write_bytes(bytes(2 * MIB))
    qmp.execute("blockdev-add", driver="file", node_name="f", filename=str(place / "image"), discard="unmap")
    qmp.execute_raw("blockdev-add", {"driver": "raw", "node-name": "n", "file": "f", "discard": "unmap", **options})
    qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(place / "nbd.sock")}})
    qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d", writable=True)
    found = [told(qmp)]
    with NbdReader(place / "nbd.sock", "d") as client:
        for step in STEPS:
            with contextlib.suppress(NbdError):
                step(client)
            found.append(told(qmp))
    # Neither may have noticed yet that the client has gone.
    qmp.execute("block-export-del", id="e", mode="hard")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("nbd-server-stop")
    return found


@pytest.mark.parametrize("detect", ["off", "on", "unmap"])
def test_statistics_are_the_reference_s_where_it_has_any(
    daemon: Callable[..., RunningDaemon], tmp_path: Path, reference_qmp: Qmp, detect: str
) -> None:
    options = {"detect-zeroes": detect}
    qmp = daemon().qmp()
    assert play(qmp, tmp_path, options) == play(reference_qmp, tmp_path, options)
    stats = statistics(qmp)
    counts = {name: stats["n"]["stats"][name] for name in COUNTED}
    if detect == "off":
        assert counts == COUNTED
    assert stats["n"]["parent"]["node-name"] == "f"
    # All that was asked for is a member of the reference's, too.
    theirs = statistics(reference_qmp)
    assert {name: set(node["stats"]) for name, node in theirs.items()} == {
        name: set(node["stats"]) for name, node in stats.items()
    }
