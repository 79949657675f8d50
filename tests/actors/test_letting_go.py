"""What is closed frees its tables, caches and buffers at once, not when Python next looks for circles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qcow2_fakes import new_image
from whole_daemon import Whole, whole_daemon

from qsd.actors.edges import RootOptions
from qsd.actors.node import Node
from qsd.block.permissions import Perm
from qsd.drivers.qcow2.image import Image
from qsd.drivers.qcow2.layout import Header
from qsd.errors import QmpError

MIB = 1 << 20
WRITER = RootOptions(Perm.CONSISTENT_READ | Perm.WRITE)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Python does not look for circles meanwhile; it has done so before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def add(whole: Whole, **more: Any) -> Node:
    file = {"driver": "file", "filename": str(whole.place / "disk"), "cache": {"direct": True}}
    await whole.run("blockdev-add", driver="qcow2", node_name="n", file=file, **more)
    return whole.daemon.services.graph.find("n")


async def use(whole: Whole) -> None:
    """Write and read, so that there are tables in the caches, buffers in the pools, and something in a bitmap."""
    edge = await whole.daemon.services.graph.attach("n", WRITER)
    await edge.write(0, bytes(MIB))
    await edge.write(MIB + 512, bytes(4096))
    await edge.flush()
    await edge.read(0, MIB)
    await edge.detach()


def large_things(node: Node) -> list[weakref.ref[Any]]:
    """What a qcow2 node and its file have in memory of the image."""
    driver: Any = node.driver
    image, file = driver.image, driver.children["file"].node.driver
    pools = (driver.unpacker._pool, driver.bursts._pool, file.io._direct._pool)
    return [
        weakref.ref(each)
        for each in (
            image.map.l1,
            *image.cache.young.values(),
            *image.cache.old.values(),
            image.refs.table,
            *image.refs.cache.young.values(),
            *(view for pool in pools for kept in pool._free.values() for view, _address in kept),
            *node.bitmaps,
        )
    ]


def alive(references: list[weakref.ref[Any]]) -> list[Any]:
    return [found for reference in references if (found := reference()) is not None]


async def test_closed_images_free_what_is_large(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(new_image(Header(size=64 * MIB)))
    async with whole_daemon(tmp_path) as whole:
        node = await add(whole)
        await whole.run("block-dirty-bitmap-add", node="n", name="b")
        await use(whole)
        held = large_things(node)
        # The L1 table, an L2 slice, the refcount table and a block, a buffer of the file's, a bitmap.
        assert len(alive(held)) >= 6
        await whole.run("blockdev-del", node_name="n")
        assert not alive(held)
        assert node.driver is not None, "it is still referred to"


async def test_an_image_read_anew_frees_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(new_image(Header(size=64 * MIB)))
    async with whole_daemon(tmp_path) as whole:
        node = await add(whole)
        await use(whole)
        held = large_things(node)[:3]
        file = {"driver": "file", "filename": str(tmp_path / "disk"), "cache": {"direct": True}}
        options = {"driver": "qcow2", "node-name": "n", "file": file, "lazy-refcounts": True}
        await whole.run("blockdev-reopen", options=[options])
        assert not alive(held)
        assert alive(large_things(node)[:2]), "the image goes on"


async def test_images_that_cannot_be_opened_leave_no_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The L1 table is read before the backing file is looked for."""
    made: list[weakref.ref[Any]] = []
    original = Image.__init__

    def noting(self: Image, *args: Any) -> None:
        original(self, *args)
        made.append(weakref.ref(self.map.l1))

    monkeypatch.setattr(Image, "__init__", noting)
    header = Header(size=64 * MIB, backing_file=b"nowhere")
    (tmp_path / "disk").write_bytes(new_image(header))
    async with whole_daemon(tmp_path) as whole:
        with pytest.raises(QmpError, match="No such file"):
            await add(whole)
        assert made
        assert not alive(made)
