"""Compressed writes through the compress filter: what is stored, what is refused, and what the reference reads."""

from __future__ import annotations

import errno
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import RunningDaemon
from nbd_reader import NbdError, NbdReader
from qcow2_images import assert_clean, content, find, img, io, write_raw

Start = Callable[..., RunningDaemon]

CLUSTERS = 64
NBD = ("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
IO_ERROR = errno.EIO


def add(qmp: Any, image: Path, name: str, **more: Any) -> None:
    """The image as the exports ``NAME`` and, compressing, ``NAME-packed``."""
    file = {"driver": "file", "filename": str(image)}
    options = {"driver": "qcow2", "node-name": name, "discard": "unmap", "file": file, **more}
    qmp.execute_raw("blockdev-add", options)
    packing = {"driver": "compress", "node-name": f"{name}-packed", "discard": "unmap", "file": name}
    qmp.execute_raw("blockdev-add", packing)
    for node in (name, f"{name}-packed"):
        qmp.execute("block-export-add", type="nbd", id=node, node_name=node, name=node, writable=True)


def remove(qmp: Any, name: str) -> None:
    for node in (f"{name}-packed", name):
        qmp.execute("block-export-del", id=node)
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        qmp.execute("blockdev-del", node_name=node)


def text(seed: int, size: int) -> bytes:
    """What compresses."""
    return (b"%07d " % seed * (size // 8 + 1))[:size]


class Model:
    """A disk whose clusters hold nothing, data, or compressed data, and random operations on both exports of it."""

    def __init__(self, seed: int, cluster: int, size: int) -> None:
        self.rng = random.Random(seed)
        self.cluster = cluster
        self.data = bytearray(size)
        self.kinds = ["none"] * -(-size // cluster)

    def span(self, first: int, count: int = 1) -> slice:
        return slice(first * self.cluster, min((first + count) * self.cluster, len(self.data)))

    def write_packed(self, client: NbdReader) -> None:
        rng = self.rng
        first = rng.randrange(len(self.kinds))
        count = min(rng.choice((1, 1, 2, 5, 16)), len(self.kinds) - first)
        parts, refused = [], False
        for cluster in range(first, first + count):
            span = self.span(cluster)
            if rng.random() < 0.3:
                part = rng.randbytes(span.stop - span.start)
                self.data[span], self.kinds[cluster] = part, "plain"
            else:
                part = text(rng.randrange(10**7), span.stop - span.start)
                if self.kinds[cluster] == "none":
                    self.data[span], self.kinds[cluster] = part, "packed"
                else:
                    refused = True
            parts.append(part)
        answer = 0
        try:
            client.write(first * self.cluster, b"".join(parts), fua=rng.random() < 0.1)
        except NbdError as error:
            answer = error.args[0]
        assert answer == (IO_ERROR if refused else 0)

    def write_plain(self, client: NbdReader) -> None:
        rng = self.rng
        length = rng.choice((100, 4096, self.cluster, 3 * self.cluster))
        offset = rng.randrange(len(self.data) - length)
        data = rng.randbytes(length)
        client.write(offset, data)
        self.data[offset : offset + length] = data
        for cluster in range(offset // self.cluster, (offset + length - 1) // self.cluster + 1):
            self.kinds[cluster] = "plain"

    def empty(self, client: NbdReader) -> None:
        first = self.rng.randrange(len(self.kinds))
        count = min(self.rng.choice((1, 3, 9)), len(self.kinds) - first)
        span = self.span(first, count)
        if self.rng.random() < 0.5:
            client.write_zeroes(span.start, span.stop - span.start, may_unmap=True)
        else:
            client.trim(span.start, span.stop - span.start)
        self.data[span] = bytes(span.stop - span.start)
        self.kinds[first : first + count] = ["none"] * count

    def step(self, plain: NbdReader, packed: NbdReader) -> None:
        kind = self.rng.randrange(10)
        if kind < 5:
            self.write_packed(packed)
        elif kind < 6:
            self.write_plain(plain)
        elif kind < 8:
            self.empty(self.rng.choice((plain, packed)))
        else:
            client = self.rng.choice((plain, packed))
            length = self.rng.choice((512, self.cluster, 7 * self.cluster))
            offset = self.rng.randrange(len(self.data) - length)
            assert client.read(offset, length) == self.data[offset : offset + length], (offset, length)
        if self.rng.random() < 0.1:
            plain.flush()


# Bytes in a cluster, and what else the image is made with.
VARIANTS = {
    "zlib": (65536, "compat=1.1"),
    "zstd": (16384, "compression_type=zstd"),
    "cluster-512": (512, "compat=1.1"),
    "cluster-2M": (2 << 20, "compat=1.1"),
    "extended": (16384, "extended_l2=on"),
    "refcount-1": (4096, "refcount_bits=1"),
    "refcount-2": (4096, "refcount_bits=2"),
    "lazy": (4096, "lazy_refcounts=on"),
    "v2": (4096, "compat=0.10"),
}


def test_random_operations_on_both_sides_of_the_filter(daemon: Start, tmp_path: Path) -> None:
    qmp = daemon(*NBD).qmp()
    left = []
    for seed, (name, (cluster, options)) in enumerate(VARIANTS.items()):
        image = tmp_path / f"{name}.qcow2"
        model = Model(seed, cluster, (8 if name == "cluster-2M" else CLUSTERS) * cluster)
        img("create", "-q", "-f", "qcow2", "-o", f"{options},cluster_size={cluster}", image, len(model.data))
        add(qmp, image, name)
        with (
            NbdReader(tmp_path / "nbd.sock", name) as plain,
            NbdReader(tmp_path / "nbd.sock", f"{name}-packed") as packed,
        ):
            for _ in range(20 if name == "cluster-2M" else 150):
                model.step(plain, packed)
            assert plain.read(0, len(model.data)) == model.data, name
            assert packed.read(0, len(model.data)) == model.data, name
        remove(qmp, name)
        left.append((image, model))
    for image, model in left:
        assert_clean(image)
        found = json.loads(img("check", "--output=json", image))
        assert found.get("compressed-clusters", 0) == model.kinds.count("packed"), image.name
        img("compare", "-q", "-f", "qcow2", "-F", "raw", image, write_raw(tmp_path, "expected.raw", model.data))


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_copied_disk_is_small_and_the_same(daemon: Start, tmp_path: Path, kind: str) -> None:
    data = content(5)
    raw = write_raw(tmp_path, "source.raw", data)
    image = tmp_path / "a.qcow2"
    img("create", "-q", "-f", "qcow2", "-o", f"compression_type={kind}", image, len(data))
    qmp = daemon(*NBD).qmp()
    add(qmp, image, "d")
    uri = f"nbd+unix:///d-packed?socket={tmp_path / 'nbd.sock'}"
    subprocess.run([find("nbdcopy"), "--flush", raw, uri], check=True, timeout=60)
    img("compare", "-q", "-f", "raw", "-F", "raw", raw, uri)
    remove(qmp, "d")
    assert_clean(image)
    img("compare", "-q", "-f", "raw", "-F", "qcow2", raw, image)
    theirs = tmp_path / "theirs.qcow2"
    img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", raw, theirs)
    assert image.stat().st_size < theirs.stat().st_size + (256 << 10)


def test_partial_last_cluster_is_compressed_where_the_user_may_resize(daemon: Start, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    img("create", "-q", "-f", "qcow2", image, 100 << 10)
    qmp = daemon(*NBD).qmp()
    qmp.execute_raw("blockdev-add", {"driver": "file", "node-name": "f", "filename": str(image)})
    qmp.execute_raw("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": "f"})
    qmp.execute_raw("blockdev-add", {"driver": "compress", "node-name": "c", "file": "n"})
    refusal = qmp.refusal("block-export-add", type="nbd", id="e", node_name="c", writable=True)
    assert refusal == (
        "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment"
    )
    qmp.execute("block-export-add", type="nbd", id="e", node_name="c", name="d")
    with NbdReader(tmp_path / "nbd.sock", "d") as client:
        assert client.read(0, 100 << 10) == bytes(100 << 10)


def test_compressed_data_goes_where_there_is_none(daemon: Start, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    img("create", "-q", "-f", "qcow2", image, "1M")
    io(image, "write -q -P 1 0 64k", "write -q -c -P 2 64k 64k", "write -q -z 128k 64k")
    img("snapshot", "-c", "s", image)
    io(image, "write -q -P 3 192k 64k")
    qmp = daemon(*NBD).qmp()
    add(qmp, image, "n")
    with NbdReader(tmp_path / "nbd.sock", "n-packed") as client:
        for cluster in (0, 1, 3):
            with pytest.raises(NbdError) as caught:
                client.write(cluster << 16, text(1, 1 << 16))
            assert caught.value.args == (IO_ERROR,)
        noise = random.Random(1).randbytes(1 << 16)
        for cluster in (0, 1, 3):
            client.write(cluster << 16, noise)
        client.write(2 << 16, text(7, 1 << 16))
        assert client.read(0, 4 << 16) == noise * 2 + text(7, 1 << 16) + noise
    remove(qmp, "n")
    assert_clean(image)


def test_part_of_a_cluster_is_put_together_with_what_the_backing_file_has(daemon: Start, tmp_path: Path) -> None:
    base = write_raw(tmp_path, "base.raw", text(3, 1 << 20))
    image = tmp_path / "a.qcow2"
    img("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
    qmp = daemon(*NBD).qmp()
    add(qmp, image, "n")
    with NbdReader(tmp_path / "nbd.sock", "n-packed") as client:
        client.write(70_000, b"new" * 10)
        assert client.read(0, 1 << 20) == text(3, 70_000) + b"new" * 10 + text(3, 1 << 20)[70_030:]
    remove(qmp, "n")
    assert_clean(image)
    assert json.loads(img("check", "--output=json", image))["compressed-clusters"] == 1


def test_what_cannot_be_compressed_is_refused(daemon: Start, tmp_path: Path) -> None:
    image, data = tmp_path / "a.qcow2", tmp_path / "a.data"
    img("create", "-q", "-f", "qcow2", "-o", f"data_file={data}", image, "1M")
    qmp = daemon(*NBD).qmp()
    add(qmp, image, "n")
    for node, kind in (({"driver": "null-co"}, "null-co"), ("n-packed", "compress")):
        refusal = qmp.refusal("blockdev-add", driver="compress", node_name="x", file=node)
        assert refusal == f"Compression is not supported for underlying format: {kind}"
    refusal = qmp.refusal("blockdev-reopen", options=[{"driver": "compress", "node-name": "n-packed", "file": "n"}])
    assert refusal == "Block format 'compress' used by node 'n-packed' does not support reopening files"
    with NbdReader(tmp_path / "nbd.sock", "n-packed") as client:
        for piece in (text(1, 1 << 16), random.Random(1).randbytes(1 << 16)):
            with pytest.raises(NbdError) as caught:
                client.write(0, piece)
            # The protocol's ENOTSUP.
            assert caught.value.args == (errno.EOPNOTSUPP,)
    remove(qmp, "n")
    assert_clean(image)


def test_filter_is_reported_as_the_reference_reports_it(daemon: Start, tmp_path: Path) -> None:
    base, image = tmp_path / "base.qcow2", tmp_path / "a.qcow2"
    img("create", "-q", "-f", "qcow2", base, "1M")
    img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    qmp = daemon(*NBD).qmp()
    add(qmp, image, "n")
    info = next(each for each in qmp.execute("query-named-block-nodes") if each["node-name"] == "n-packed")
    tree = {"driver": "compress", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": str(image)}}}
    assert json.loads(info["file"].removeprefix("json:")) == tree
    assert info["backing_file_depth"] == 2
    shown = info["image"]
    assert shown["limits"] == {
        "request-alignment": 65536,
        "discard-alignment": 65536,
        "min-mem-alignment": 1,
        "opt-mem-alignment": 4096,
        "max-iov": 1024,
    }
    assert shown["cluster-size"] == 65536
    assert shown["backing-image"]["filename"] == str(image)
    assert shown["backing-image"]["backing-image"]["filename"] == str(base)
    info = json.loads(
        subprocess.run(
            [find("nbdinfo"), "--json", f"nbd+unix:///n-packed?socket={tmp_path / 'nbd.sock'}"],
            check=True,
            timeout=60,
            capture_output=True,
        ).stdout
    )
    assert info["exports"][0]["block_size_minimum"] == 65536


def test_depth_below_the_filter_is_the_reference_s(daemon: Start, tmp_path: Path) -> None:
    base, image = tmp_path / "base.qcow2", tmp_path / "a.qcow2"
    img("create", "-q", "-f", "qcow2", base, "256k")
    io(base, "write -q -P 1 64k 128k")
    img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    io(image, "write -q -c -P 2 128k 64k")
    qmp = daemon(*NBD).qmp()
    add(qmp, image, "n")
    qmp.execute(
        "block-export-add", type="nbd", id="e", node_name="n-packed", name="depth", **{"allocation-depth": True}
    )
    uri = f"nbd+unix:///depth?socket={tmp_path / 'nbd.sock'}"
    command = [find("nbdinfo"), "--json", "--map=qemu:allocation-depth", uri]
    shown = subprocess.run(command, check=True, timeout=60, capture_output=True).stdout
    depths = [(extent["offset"] >> 16, extent["type"]) for extent in json.loads(shown)]
    assert depths == [(0, 0), (1, 3), (2, 1), (3, 0)]
