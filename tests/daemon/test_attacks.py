"""Attacks that storage daemons and image tools have suffered, and where it is tested that this one survives them.

``TABLE`` leads from each to its tests; CVE numbers say what is meant. Below it are the tests that belong nowhere
else. What the daemon does not have yet (TLS, NBD as a client, VMDK, vhost-user) is not in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from harness import RunningDaemon
from nbd_contexts import ContextClient
from nbd_reader import NbdReader
from qcow2_images import img
from test_memory import peak

Start = Callable[..., RunningDaemon]
TESTS: Final = Path(__file__).parents[1]

TABLE: Final[dict[str, tuple[str, ...]]] = {
    # The NBD server, and hostile clients.
    "half-negotiated connections are held open while the server stops (2024-7409)": (
        "daemon/test_nbd.py::test_half_open_clients_stop_nobody",
        "actors/test_nbd_clients.py::test_slow_negotiation_is_ended",
        "actors/test_nbd_clients.py::test_half_open_connection_makes_room_for_one_that_waits",
    ),
    "names and requests at the limit of 4096 bytes (2020-10761, 2017-15118)": (
        "unit/test_nbd_handshake.py::test_option_refused",
        "differential/test_differential.py::test_nbd_client_is_answered_as_by_the_reference",
    ),
    "option payloads of up to 4 GiB (2017-15119)": (
        "unit/test_nbd_handshake.py::test_negotiation_fails",
        "unit/test_nbd_handshake.py::test_long_payload_is_skipped_not_kept",
    ),
    "clients that leave during a reply or the negotiation (2017-10664, 2017-9524, 2017-7539)": (
        "daemon/test_nbd_peers.py::test_clients_that_vanish_leave_nothing",
        "unit/test_nbd_handshake.py::test_a_client_that_goes_away",
        "unit/test_nbd_transmission.py::test_client_that_leaves_gives_its_loans_back",
    ),
    "exports that are not there (2013-7441)": ("unit/test_nbd_handshake.py::test_option_refused",),
    "commands in the wrong order (nbdkit's 2019-14850, 2019-14851)": (
        "unit/test_nbd_handshake.py::test_any_options_are_survived",
        "unit/test_nbd_handshake.py::test_any_bytes_are_survived",
        "daemon/test_nbd.py::test_bad_request_is_an_error_and_no_more",
    ),
    "block status of enormous ranges (2025-47711)": (
        "daemon/test_attacks.py::test_block_status_of_an_enormous_range_is_bounded",
    ),
    "lengths of 0xffffffff (2022-26495)": ("daemon/test_nbd.py::test_bad_request_is_an_error_and_no_more",),
    # Images.
    "divisors that are zero (2014-0142), sizes that overflow (2014-0143 to 2014-0148, 2014-0222, 2014-0223)": (
        "actors/test_qcow2_hostile.py::test_any_change_of_an_image_is_survived",
        "actors/test_hostile_images.py::test_any_change_of_an_image_that_was_not_closed_is_survived",
        "unit/test_qcow2_layout.py::test_parse_damaged_header_is_a_header_or_one_error",
        "actors/test_luks_hostile.py::test_any_header_of_a_volume_is_survived",
        "actors/test_luks_hostile.py::test_any_encryption_header_of_an_image_is_survived",
    ),
    "tables that outgrow memory: L1, refcounts, snapshots, bitmaps": (
        "daemon/test_memory.py::test_memory_is_bounded",
        "actors/test_qcow2_hostile.py::test_large_table_lets_others_run_and_is_zeroes_behind_the_end_of_the_file",
        "actors/test_qcow2_hostile.py::test_long_snapshot_table_lets_others_run",
    ),
    "tables that lie on other metadata, refcount blocks at offset 0": (
        "actors/test_qcow2_hostile.py::test_metadata_that_is_other_metadata_too_is_not_written",
        "actors/test_qcow2_hostile.py::test_refcount_block_for_two_places_is_not_believed",
        "actors/test_hostile_images.py::test_entry_that_leads_anywhere",
        "daemon/test_overlap_check.py::test_metadata_that_counts_as_free_is_left_alone",
    ),
    "chains that are loops": (
        "daemon/test_qcow2_names.py::test_images_that_are_their_own_backing_files_are_refused",
    ),
    "compressed clusters that inflate without end": (
        "daemon/test_memory.py::test_compressed_bombs_cost_no_more_than_other_clusters",
        "unit/test_qcow2_compressed.py::test_inflate_stream_of_more_than_a_cluster_stops_there",
        "unit/test_qcow2_compressed.py::test_inflate_zstd_frame_that_asks_for_a_huge_window_is_eio",
    ),
    "processor time and memory that opening takes (2015-5162, 2018-10908)": (
        "actors/test_hostile_images.py::test_any_change_of_an_image_that_was_not_closed_is_survived",
        "daemon/test_luks.py::test_hostile_counts_are_refused_at_once",
        "actors/test_luks_hostile.py::test_counts_are_bounded_when_the_header_is_read_again",
    ),
    # Files that images name.
    "backing files, and json: in names (2024-4467)": (
        "daemon/test_qcow2_names.py::test_backing_file_of_any_name_is_opened_or_refused_at_once",
    ),
    "data files of qcow2 images (2024-32498)": (
        "daemon/test_qcow2_names.py::test_data_file_of_any_name_is_a_path",
        "actors/test_hostile_images.py::test_any_change_of_an_image_that_was_not_closed_is_survived",
    ),
    "raw images that a guest writes another format's header into (2013-1922, 2026-24708)": (
        "daemon/test_attacks.py::test_raw_image_stays_raw_whatever_its_guest_writes",
        "daemon/test_qcow2_names.py::test_format_of_a_backing_file_is_what_the_image_says",
    ),
    # The monitor.
    "frames and messages of websockets (2015-1779)": (
        "unit/test_websocket.py::test_giant_frame_costs_nothing_but_what_has_come",
        "unit/test_websocket.py::test_request_without_end_is_refused_at_the_limit",
        "unit/test_websocket.py::test_any_bytes_do_no_harm_and_pieces_do_not_matter",
    ),
    "depth and size of JSON": (
        "unit/test_qmp_json.py::test_depth_limit_is_1024_open_brackets",
        "unit/test_qmp_json.py::test_token_count_limit",
        "unit/test_qmp_json.py::test_token_size_limit_bounds_what_is_kept",
        "actors/test_monitor.py::test_attack_is_answered_and_survived",
    ),
    "clients that never read": (
        "actors/test_monitor.py::test_client_that_never_reads_costs_bounded_memory_and_hurts_nobody",
        "actors/test_monitor.py::test_client_that_does_not_read_its_events_is_disconnected",
    ),
    # FUSE.
    "allow_other (2018-10906), and mount points": (
        "daemon/test_fuse.py::test_refusals_are_worded_as_the_reference_s",
        "daemon/test_fuse.py::test_unprivileged_user_mounts_with_fusermount3",
        "unit/test_mount.py::test_mount_points_must_be_regular_files",
    ),
    "messages of a kernel gone wrong": (
        "actors/test_fuse_session.py::test_no_message_upsets_a_session",
        "unit/test_fuse_wire.py::test_any_bytes_are_read_or_refused",
    ),
}


def test_table_names_tests_that_there_are() -> None:
    for attack, names in TABLE.items():
        for name in names:
            path, _colons, function = name.partition("::")
            text = (TESTS / path).read_text()
            assert re.search(rf"^(async )?def {function}\(", text, re.MULTILINE), (attack, name)


MANY: Final = 20_000


@pytest.mark.parametrize("extended", [False, True])
def test_block_status_of_an_enormous_range_is_bounded(daemon: Start, tmp_path: Path, extended: bool) -> None:
    """Of an image with more extents than a reply may have."""
    size = 8 << 30
    with (tmp_path / "image").open("wb") as file:
        for number in range(MANY):
            os.pwrite(file.fileno(), b"x", number << 13)
        file.truncate(size)
    running = daemon(
        *("--blockdev", "driver=file,node-name=f,filename=image"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "type=nbd,id=e,node-name=f,name=d,writable=on"),
    )
    with ContextClient(tmp_path / "nbd.sock", "d", extended=extended) as client:
        client.select("base:allocation")
        client.go()
        client.status(0, 4096)
        before = peak(running)
        for _time in range(20):
            for length in (0xFFFFF000, *([size] if extended else [])):
                ((_number, runs),) = client.status(0, length)
                assert 1 < len(runs) < MANY
                assert sum(run[0] for run in runs) <= size
        if extended:
            # EINVAL: more than there is.
            assert client.status(0, 1 << 63)[0] == 22
        assert peak(running) - before < 20
        running.qmp().execute("query-version")


def test_raw_image_stays_raw_whatever_its_guest_writes(daemon: Start, tmp_path: Path) -> None:
    """Its header becomes that of an image over a file that is none of the guest's business.

    Whoever makes overlays of it, or streams down to it, writes down that it is raw.
    """
    (tmp_path / "secret").write_bytes(b"secret" * 1000)
    img("create", "-q", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", tmp_path / "forged", "64k")
    forged = (tmp_path / "forged").read_bytes()
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    qmp = daemon("--nbd-server", "addr.type=unix,addr.path=nbd.sock").qmp()

    def file_of(name: str) -> dict[str, Any]:
        return {"driver": "file", "filename": str(tmp_path / name)}

    def drivers() -> list[str]:
        return sorted(node["drv"] for node in qmp.execute("query-named-block-nodes"))

    def overlay(node: str, name: str) -> None:
        taken = {"node-name": node, "snapshot-file": str(tmp_path / name), "snapshot-node-name": name}
        qmp.execute_raw("blockdev-snapshot-sync", taken)

    qmp.execute("blockdev-add", driver="raw", node_name="r", file=file_of("disk"))
    qmp.execute("block-export-add", type="nbd", id="e", node_name="r", name="d", writable=True)
    with NbdReader(tmp_path / "nbd.sock", "d") as client:
        client.write(0, forged)
        overlay("r", "one")
        overlay("one", "two")
        assert client.read(0, len(forged)) == forged
        qmp.execute("block-stream", job_id="j", device="two", base_node="r")
        qmp.wait_event("BLOCK_JOB_COMPLETED")
    qmp.execute("block-export-del", id="e")
    qmp.wait_event("BLOCK_EXPORT_DELETED")
    qmp.execute("blockdev-del", node_name="r")
    assert drivers() == []
    for name in ("one", "two"):
        qmp.execute("blockdev-add", driver="qcow2", node_name="n", file=file_of(name))
        # The image and its file, the raw one and its file; no third.
        assert drivers() == ["file", "file", "qcow2", "raw"]
        qmp.execute("block-export-add", type="nbd", id="e", node_name="n", name="d")
        with NbdReader(tmp_path / "nbd.sock", "d") as client:
            assert client.read(0, len(forged)) == forged
        qmp.execute("block-export-del", id="e")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("blockdev-del", node_name="n")
