"""Write down what the reference makes of zeroes, discards and writes: ``python tests/differential/zeroing.py``.

Random requests over NBD to images of several kinds; after each the L2 entries and the block status.
``actors/test_qcow2_zeroing.py`` lets a driver in memory do the same.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path += [str(TESTS / room) for room in ("actors", "daemon")]

from harness import Qmp  # noqa: E402 - the rooms' modules are found where pytest finds them
from nbd_contexts import ContextClient  # noqa: E402
from nbd_reader import TRIM, WRITE, WRITE_ZEROES, NbdError, NbdReader  # noqa: E402
from qcow2_entries import entries  # noqa: E402

PLACE = Path("/opt/qsd-reference/bin")
DATA = TESTS / "data" / "zeroing_reference.json"
KIB = 1 << 10
CLUSTERS = 12
STEPS = 14
# A letter for every 4 KiB: data or a hole.
BELOW = "d..dd.d...d.dd..d.ddd....d.d..dddd.....d.d.....d"
# Options of qemu-img create; of the node; how much of BELOW there is; what the disk lacks of its last cluster.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "backing": {"below": CLUSTERS},
    "short backing": {"below": 7, "lacks": 1536},
    "long backing": {"below": CLUSTERS + 4, "lacks": 1536},
    "extended": {"create": {"extended_l2": "on"}},
    "extended, backing": {"create": {"extended_l2": "on"}, "below": 4 * CLUSTERS, "lacks": 1536},
    "data file": {"create": {"data_file": "data"}},
    "raw data file": {"create": {"data_file": "data", "data_file_raw": "on"}},
    "discard-no-unref": {"node": {"discard-no-unref": True}, "below": CLUSTERS},
    "no unmap": {"node": {"discard": "ignore"}, "below": 7},
    "version 2": {"create": {"compat": "0.10"}},
    "version 2, backing": {"create": {"compat": "0.10"}, "below": CLUSTERS},
}
# Kinds of requests, by weight: s is for a snapshot.
KINDS = "wwzzzzzzdds"
OPS = {"w": WRITE, "z": WRITE_ZEROES, "d": TRIM}


def cluster_size(variant: dict[str, Any]) -> int:
    return (16 if "extended_l2" in variant.get("create", {}) else 4) * KIB


def random_step(rng: random.Random, cluster: int, size: int, create: dict[str, Any]) -> list[Any]:
    """Kind, offset, length, and NBD's flags of WRITE_ZEROES (2 NO_HOLE, 16 FAST_ZERO) or the byte to write.

    Fast zeroes fail in the reference where nothing or little has to be done: version 2, a raw data file.
    """
    kind = rng.choice(KINDS[:-1] if "data_file" in create else KINDS)
    flags = (0, 0, 2) if {"compat", "data_file_raw"} & create.keys() else (0, 0, 2, 16)
    if kind == "s":
        return ["s", 0, 0, 0]
    unit = rng.choice((512, cluster // 2, cluster, cluster))
    offset = rng.randrange(size // unit) * unit
    length = min(size - offset, unit * rng.choice((1, 1, 2, 3, rng.randrange(1, 33))))
    return [kind, offset, length, {"w": rng.randrange(1, 256), "z": rng.choice(flags), "d": 0}[kind]]


def prepare(variant: dict[str, Any], place: Path) -> int:
    """Make the image and what is below it; the disk's size."""
    cluster = cluster_size(variant)
    size = CLUSTERS * cluster - variant.get("lacks", 0)
    options = {"cluster_size": cluster, **variant.get("create", {})}
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    if "below" in variant:
        with (place / "below").open("wb") as file:
            file.truncate(variant["below"] * 4 * KIB)
            for number, letter in enumerate(BELOW[: variant["below"]]):
                if letter == "d":
                    file.seek(number * 4 * KIB)
                    file.write(b"b" * 4 * KIB)
        words += ["-b", "below", "-F", "raw"]
    subprocess.run([PLACE / "qemu-img", "create", "-q", "-f", "qcow2", *words, "image", str(size)], check=True)
    return size


def status(place: Path, size: int) -> list[list[int]]:
    """Length, flags of base:allocation, depth, in runs."""
    with ContextClient(place / "nbd", "e") as client:
        client.select("base:allocation", "qemu:allocation-depth")
        client.go()
        found = dict(client.status(0, size))
    rows: list[list[int]] = []
    flags, depths = ([list(run) for run in found[number]] for number in (0, 1))
    while flags and depths:
        length = min(flags[0][0], depths[0][0])
        if rows and rows[-1][1:] == [flags[0][1], depths[0][1]]:
            rows[-1][0] += length
        else:
            rows.append([length, flags[0][1], depths[0][1]])
        for runs in (flags, depths):
            runs[0][0] -= length
            if not runs[0][0]:
                runs.pop(0)
    return rows


def record(variant: dict[str, Any], seed: int, place: Path) -> list[Any]:
    """A row a step: the step, the error, the entries and the status after it."""
    size = prepare(variant, place)
    listens = ("--chardev", f"socket,id=c,path={place}/qmp,server=on,wait=off", "--monitor", "c")
    serves = ("--nbd-server", f"addr.type=unix,addr.path={place}/nbd")
    subprocess.run([PLACE / "qemu-storage-daemon", "--daemonize", *listens, *serves], check=True)
    qmp = Qmp(place / "qmp")
    node = {"driver": "qcow2", "node-name": "n", "discard": "unmap", **variant.get("node", {})}
    node["file"] = {"driver": "file", "filename": str(place / "image")}
    create = variant.get("create", {})
    if "data_file" in create:
        node["data-file"] = {"driver": "file", "filename": str(place / "data")}
    qmp.execute_raw("blockdev-add", node)
    qmp.execute(
        "block-export-add", type="nbd", id="e", node_name="n", name="e", writable=True, allocation_depth=True
    )
    rng = random.Random(seed)
    rows = []
    for number in range(STEPS):
        step = random_step(rng, cluster_size(variant), size, create)
        kind, offset, length, more = step
        error = 0
        with NbdReader(place / "nbd", "e") as client:
            try:
                if kind == "s":
                    qmp.execute("blockdev-snapshot-internal-sync", device="n", name=str(number))
                elif kind == "w":
                    client.write(offset, bytes([more]) * length)
                else:
                    client.request(OPS[kind], offset, length, flags=more)
            except NbdError as problem:
                error = problem.args[0]
            client.flush()
        rows.append([step, error, entries((place / "image").read_bytes()), status(place, size)])
    qmp.execute("quit")
    qmp.close()
    return rows


def main() -> None:
    found = []
    for name, variant in VARIANTS.items():
        for seed in range(4 if "node" not in variant else 8):
            with tempfile.TemporaryDirectory() as place:
                os.chdir(place)
                found.append([name, variant, record(variant, seed, Path(place))])
                os.chdir("/")
    body = ",\n".join(json.dumps(row) for row in found)
    DATA.write_text(f'{{"below": "{BELOW}", "clusters": {CLUSTERS}, "rows": [\n{body}\n]}}\n')


if __name__ == "__main__":
    main()
