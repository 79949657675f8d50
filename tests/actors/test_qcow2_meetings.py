"""What happens at the same time to an image, and may meet: discards, packed clusters, marks in the header."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from qcow2_fakes import SlowFile, new_image, opened_on

from qsd.drivers.calls import call
from qsd.drivers.qcow2 import writeback
from qsd.drivers.qcow2.image import Freeing, Image
from qsd.drivers.qcow2.layout import CORRUPT, DIRTY, LAZY_REFCOUNTS, Header, parse_header
from qsd.messages import Op


async def test_nothing_is_packed_into_a_cluster_that_is_being_discarded() -> None:
    file = SlowFile(new_image(Header(size=1 << 20)))
    async with opened_on(file, pass_discard_request=True) as driver:
        image = driver.image
        gone = await driver.settled(image.refs.allocate_bytes, 100)
        image.release(gone, 1, Freeing.REQUEST)
        file.slow = frozenset({Op.DISCARD})
        await call(driver, Op.FLUSH, 0, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert [request.offset for request in file.waiting] == [gone]
        packed = await driver.settled(image.refs.allocate_bytes, 100)
        await file.write(packed, b"x" * 100)
        await file.end_all()
        assert await file.read(packed, 100) == b"x" * 100


def _mark_dirty(image: Image) -> None:
    image._set_dirty(lambda _error: None)


def _mark_corrupt(image: Image) -> None:
    image.driver.corrupt("found broken")


@pytest.mark.parametrize("marks", [(_mark_dirty, _mark_corrupt), (_mark_corrupt, _mark_dirty)])
async def test_marks_that_are_set_at_the_same_time_are_both_set(
    marks: tuple[Callable[[Image], None], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SlowFile(new_image(Header(size=1 << 20, compatible=LAZY_REFCOUNTS)))
    async with opened_on(file) as driver:
        told: list[Any] = []
        monkeypatch.setattr(driver.host, "warn", told.append)
        monkeypatch.setattr(driver.host, "emit", lambda *event: told.append(event))
        file.slow = frozenset({Op.WRITE})
        for mark in marks:
            mark(driver.image)
            await trio.testing.wait_all_tasks_blocked()
        await file.end_all()
        assert len(told) == 2
        assert driver.image.header.incompatible == DIRTY | CORRUPT
    assert parse_header(bytes(file.data)).incompatible == DIRTY | CORRUPT


async def test_flush_does_not_wait_until_all_of_a_disk_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writeback, "CLUSTERS", 1)
    file = SlowFile(new_image(Header(size=1 << 20)))
    async with opened_on(file, pass_discard_request=True) as driver:
        image, refs = driver.image, driver.image.refs
        gone = [await driver.settled(refs.allocate_contiguous, 2) for _ in range(5)]
        for first in gone[::2]:
            image.release(first << 16, 2, Freeing.REQUEST)
        file.slow = frozenset({Op.DISCARD})
        await call(driver, Op.FLUSH, 0, 0)
        for left in (2, 1):
            await trio.testing.wait_all_tasks_blocked()
            assert len(file.waiting) == 1
            async with trio.open_nursery() as nursery:
                nursery.start_soon(call, driver, Op.FLUSH, 0, 0)
                await trio.testing.wait_all_tasks_blocked()
                file.end_one()
                await trio.testing.wait_all_tasks_blocked()
                assert not nursery.child_tasks, "the flush has ended"
            assert len(image.pending) <= left
        await file.end_all()
        assert not image.pending
        assert [refs.get(first) for first in gone] == [0, 1, 0, 1, 0]
