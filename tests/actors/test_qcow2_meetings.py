"""What happens at the same time to an image, and may meet: discards, packed clusters, marks in the header."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from qcow2_fakes import CLUSTER, MemoryFile, SlowFile, cut, examine, new_image, opened_on, read, write

from qsd.block.bitmap import DirtyBitmap
from qsd.block.dirty import NamedBitmap
from qsd.drivers import mapped
from qsd.drivers.calls import call
from qsd.drivers.gather import Callback
from qsd.drivers.qcow2 import image as image_module
from qsd.drivers.qcow2 import internal_snapshots, writeback
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.qcow2.image import Freeing, Image
from qsd.drivers.qcow2.layout import CORRUPT, DIRTY, LAZY_REFCOUNTS, Header, parse_header
from qsd.errors import QmpError
from qsd.messages import Flag, Op, Request


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


def _mark_for_snapshot(image: Image) -> None:
    image.driver.host.spawn(internal_snapshots._mark, image, name="mark")


@pytest.mark.parametrize(
    "marks",
    [(_mark_dirty, _mark_corrupt), (_mark_corrupt, _mark_dirty), (_mark_corrupt, _mark_for_snapshot)],
)
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
    monkeypatch.setattr(writeback, "SLICE_NS", 0)
    monkeypatch.setattr(writeback, "TOGETHER", 1)
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
            assert driver.writeback.freed <= left
        await file.end_all()
        assert not driver.writeback.freed
        assert [refs.get(first) for first in gone] == [0, 1, 0, 1, 0]


def _let_wait(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let no more runs of clusters than that wait to become free."""
    for module in (image_module, writeback):
        monkeypatch.setattr(module, "MOST_FREED", most)


async def _filled(driver: Qcow2Driver, clusters: int) -> None:
    await write(driver, 0, b"x" * (clusters * CLUSTER))
    await call(driver, Op.FLUSH, 0, 0)


async def _end_all(file: SlowFile, driver: Qcow2Driver) -> None:
    file.slow = frozenset()
    await file.end_all()
    await driver.writeback.finish()


@asynccontextmanager
async def _slow_to_free(clusters: int) -> AsyncIterator[tuple[SlowFile, Qcow2Driver, trio.Nursery]]:
    """A disk with so many clusters of data, for which a test slows its file down; in the end nothing has leaked."""
    file = SlowFile(new_image(Header(size=1 << 20)))
    async with opened_on(file, pass_discard_request=True) as driver, trio.open_nursery() as nursery:
        await _filled(driver, clusters)
        yield file, driver, nursery
        await _end_all(file, driver)
    assert not examine(bytes(file.data)).leaks


def _ended(nursery: trio.Nursery, driver: Qcow2Driver, op: Op, clusters: Iterable[int]) -> list[int]:
    """Start requests, one for each cluster; the clusters of those that have ended, in that order."""
    ended: list[int] = []

    async def ask(cluster: int) -> None:
        await call(driver, op, cluster * CLUSTER, CLUSTER, None, Flag.MAY_UNMAP if op is Op.WRITE_ZEROES else 0)
        ended.append(cluster)

    for cluster in clusters:
        nursery.start_soon(ask, cluster)
    return ended


@pytest.mark.parametrize("op", [Op.DISCARD, Op.WRITE_ZEROES])
async def test_who_frees_more_than_can_be_given_up_waits(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holes take a file long; meanwhile the image grew by what it had given up, without end."""
    _let_wait(monkeypatch, 4)
    async with _slow_to_free(16) as (file, driver, nursery):
        file.slow = frozenset({Op.DISCARD})
        ended = _ended(nursery, driver, op, range(1, 16, 2))
        await trio.testing.wait_all_tasks_blocked()
        # One is being given up, four wait for that.
        assert len(ended) in (4, 5)
        assert await read(driver, 2 * CLUSTER, 1) == b"x"
        await write(driver, 2 * CLUSTER, b"y")
        nursery.start_soon(call, driver, Op.FLUSH, 0, 0)
        while len(ended) < 8:
            file.end_one()
            await trio.testing.wait_all_tasks_blocked()
            assert driver.writeback.freed <= 4


async def test_who_waits_to_free_goes_on_as_soon_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """They waited until half of what may wait was given up: a second for 64 KiB clusters, eight for 512 bytes."""
    _let_wait(monkeypatch, 4)
    monkeypatch.setattr(writeback, "TOGETHER", 1)
    async with _slow_to_free(16) as (file, driver, nursery):
        file.slow = frozenset({Op.DISCARD})
        ended = _ended(nursery, driver, Op.DISCARD, range(1, 16, 2))
        await trio.testing.wait_all_tasks_blocked()
        before = len(ended)
        file.end_one()
        await trio.testing.wait_all_tasks_blocked()
        assert len(ended) == before + 1


async def test_zeroes_that_free_nothing_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """They did: beside discards, clients that wrote zeroes had 25 answers a second of what had been 10000."""
    _let_wait(monkeypatch, 2)
    async with _slow_to_free(16) as (file, driver, nursery):
        file.slow = frozenset({Op.FLUSH})
        for wave in (range(0, 4, 2), range(4, 16, 2)):
            _ended(nursery, driver, Op.DISCARD, wave)
            await trio.testing.wait_all_tasks_blocked()
        assert driver.writeback.is_behind
        async with trio.open_nursery() as free:
            free.start_soon(call, driver, Op.WRITE_ZEROES, CLUSTER, CLUSTER)
            free.start_soon(call, driver, Op.WRITE_ZEROES, 0, CLUSTER, None, Flag.MAY_UNMAP)
            free.start_soon(call, driver, Op.DISCARD, 2 * CLUSTER, CLUSTER)
            await trio.testing.wait_all_tasks_blocked()
            assert not free.child_tasks
        assert driver.writeback.is_behind


async def test_new_clusters_are_those_that_wait_to_become_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image grew instead, and who freed more waited for holes that a file makes 500 times a second."""
    _let_wait(monkeypatch, 4)
    monkeypatch.setattr(writeback, "TOGETHER", 1)
    async with _slow_to_free(12) as (file, driver, nursery):
        first = file.data.index(b"x" * CLUSTER)
        file.slow = frozenset({Op.DISCARD})
        _ended(nursery, driver, Op.DISCARD, range(1, 12, 2))
        await trio.testing.wait_all_tasks_blocked()
        assert len(file.waiting) == 1
        await write(driver, 12 * CLUSTER + 512, b"y")
        assert await read(driver, 12 * CLUSTER, 1024) == bytes(512) + b"y" + bytes(511)
        assert b"y" in file.data[first + 512 : first + 12 * CLUSTER : CLUSTER]
        await _end_all(file, driver)
        assert await read(driver, 12 * CLUSTER + 512, 1) == b"y"
        assert await read(driver, 10 * CLUSTER, 2 * CLUSTER) == b"x" * CLUSTER + bytes(CLUSTER)
    assert not examine(bytes(file.data)).corruptions


async def test_writing_over_what_snapshots_have_waits_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    _let_wait(monkeypatch, 2)
    file = SlowFile(new_image(Header(size=1 << 20)))
    async with opened_on(file) as driver, trio.open_nursery() as nursery:
        await _filled(driver, 8)
        await internal_snapshots.create(driver, "s", 0)
        file.slow = frozenset({Op.FLUSH})
        for cluster in range(1, 8, 2):
            nursery.start_soon(write, driver, cluster * CLUSTER, b"y" * CLUSTER)
        await trio.testing.wait_all_tasks_blocked()
        # With the first, the copied table and what it has moved wait to become free.
        assert len(nursery.child_tasks) == 3
        await file.end_all()
        assert not nursery.child_tasks
    assert not examine(bytes(file.data)).corruptions


async def test_discards_go_on_where_nothing_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """To wait would not help, and a node with requests that wait for ever could not even be closed."""
    _let_wait(monkeypatch, 2)
    file = SlowFile(new_image(Header(size=1 << 20)))
    async with opened_on(file) as driver:
        await _filled(driver, 16)
        refs, left = driver.image.refs, 1
        add = refs.add

        def fail(first: int, count: int, difference: int) -> list[tuple[int, int]]:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.EIO, "a refcount block cannot be read")
            return add(first, count, difference)

        monkeypatch.setattr(refs, "add", fail)
        async with trio.open_nursery() as nursery:
            ended = _ended(nursery, driver, Op.DISCARD, range(1, 16, 2))
        assert len(ended) == 8
        await driver.wait_idle()
        monkeypatch.setattr(refs, "add", add)
        await driver.writeback.finish()
    assert not examine(bytes(file.data)).leaks


async def test_discards_that_wait_end_with_the_error_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    _let_wait(monkeypatch, 2)
    file = SlowFile(new_image(Header(size=1 << 20)))
    async with opened_on(file) as driver:
        await _filled(driver, 16)
        file.fails = True
        errors: list[OSError] = []

        async def discard(cluster: int) -> None:
            try:
                await call(driver, Op.DISCARD, cluster * CLUSTER, CLUSTER)
            except OSError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for cluster in range(1, 16, 2):
                nursery.start_soon(discard, cluster)
        assert {error.errno for error in errors} == {errno.EIO}
        assert 1 <= len(errors) <= 6
        await driver.wait_idle()


async def test_neighbours_are_given_up_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole is as much work as a large one."""
    file = SlowFile(new_image(Header(size=1 << 20)))
    async with opened_on(file, pass_discard_request=True) as driver:
        await _filled(driver, 16)
        for cluster in (5, 3, 2, 8, 4):
            await call(driver, Op.DISCARD, cluster * CLUSTER, CLUSTER)
        first = file.data.index(b"x" * CLUSTER)
        file.slow = frozenset({Op.DISCARD})
        await call(driver, Op.FLUSH, 0, 0)
        told = []
        await trio.testing.wait_all_tasks_blocked()
        while file.waiting:
            told.append((file.waiting[0].offset - first, file.waiting[0].length))
            file.end_one()
            await trio.testing.wait_all_tasks_blocked()
        assert told == [(2 * CLUSTER, 4 * CLUSTER), (8 * CLUSTER, CLUSTER)]


async def test_table_that_is_cut_off_while_it_is_written_back() -> None:
    """What a slice no longer led to was given up, though neither the slice nor the L1 table was on the disk."""
    table = 64 << 9
    file = SlowFile(new_image(Header(size=2 * table, cluster_bits=9)))
    async with opened_on(file) as driver:
        await write(driver, table, b"x" * 1024)
        await call(driver, Op.FLUSH, 0, 0)
        await call(driver, Op.DISCARD, table, 512)
        before = bytes(file.data)
        file.log.clear()
        file.slow = frozenset({Op.FLUSH})
        driver.writeback.start()
        await trio.testing.wait_all_tasks_blocked()
        assert file.waiting, "the first step of writing back is under way"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.truncate, table)
            await file.end_all()
        assert driver.length == table
    for image in cut(before, file.log):
        assert not examine(image).corruptions


async def test_no_bitmap_is_stored_in_an_image_that_was_found_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counts are not to be trusted: what they say is free may be the guest's."""
    file = MemoryFile(new_image(Header(size=1 << 20)))
    async with opened_on(file) as driver:
        monkeypatch.setattr(driver.host, "warn", lambda _text: None)
        monkeypatch.setattr(driver.host, "emit", lambda *_event: None)
        store = driver.bitmap_store
        assert store is not None
        await store.load(driver.length)
        driver.corrupt("found broken")
        await driver.wait_idle()
        file.log.clear()
        bits = DirtyBitmap(driver.length, 1 << 16)
        with pytest.raises(QmpError, match="Input/output error"):
            await store.store([NamedBitmap("b", bits, is_persistent=True)])
        # Nothing is no failure: most images have no bitmaps when they are closed.
        await store.store([])
        assert not file.log


class _LendingFile(MemoryFile):
    """Notes which reads might have been answered with a loan."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.asked: list[bool] = []

    def submit(self, batch: list[Request]) -> None:
        self.asked += [bool(request.flags & Flag.MAY_LEND) for request in batch if request.op == Op.READ]
        super().submit(batch)


@pytest.mark.parametrize("clusters", [1, 2, 3])
async def test_nothing_is_lent_once_clusters_change_their_owners(clusters: int) -> None:
    """What is lent leaves when the client takes it: the cluster may be somebody else's by then."""
    file = _LendingFile(new_image(Header(size=1 << 20)))
    async with opened_on(file) as driver:

        def lending_read() -> None:
            length = clusters * CLUSTER
            buffer = memoryview(bytearray(length))
            reply = Callback(lambda _request: None)
            driver.submit([Request(Op.READ.value, 0, length, buffer, reply, Flag.MAY_LEND.value)])

        await write(driver, 0, b"x" * 4 * CLUSTER)
        file.asked.clear()
        lending_read()
        assert file.asked == [True]
        await call(driver, Op.DISCARD, 3 * CLUSTER, CLUSTER)
        await call(driver, Op.FLUSH, 0, 0)
        await driver.wait_idle()
        file.asked.clear()
        lending_read()
        assert file.asked == [False]


async def test_a_packed_cluster_is_fetched_before_its_place_is_somebody_elses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where much goes on, the fetch waits for its turn. Meanwhile the cluster was discarded, to the end."""
    monkeypatch.setattr(mapped, "MANY_ROUNDS", 1)
    monkeypatch.setattr(mapped, "SLICE_NS", -1)
    file = SlowFile(new_image(Header(size=1 << 20)))
    async with opened_on(file, pass_discard_request=True) as driver:
        host: Any = driver.host
        host.aio = _Threads()
        content = b"content " * (CLUSTER // 8)
        await call(driver, Op.WRITE, 0, CLUSTER, memoryview(bytearray(content)), Flag.COMPRESSED.value)
        await call(driver, Op.FLUSH, 0, 0)
        for _ in range(50 * mapped.AT_ONCE):
            driver.resume(lambda: None)
        answers: list[Request] = []
        buffer = memoryview(bytearray(CLUSTER))
        reply = Callback(answers.append)
        driver.submit(
            [
                Request(Op.READ.value, 0, CLUSTER, buffer, reply),
                Request(Op.DISCARD.value, 0, CLUSTER, None, reply),
                Request(Op.FLUSH.value, 0, 0, None, reply),
            ]
        )
        await driver.wait_idle()
        assert [request.error for request in answers] == [0, 0, 0]
        assert bytes(buffer) == content
        assert await read(driver, 0, CLUSTER) == bytes(CLUSTER)


async def test_writers_without_room_for_their_slices_wait_for_those_who_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They wrote back what was clean, again and again, and never let those end whose slices they waited for."""
    file = SlowFile(new_image(Header(size=64 << 20)))
    async with opened_on(file, l2_cache_size=1, l2_cache_entry_size=512) as driver:
        span = CLUSTER << driver.image.geometry.slice_bits
        assert driver.image.cache.limit == 2
        slices = range(5)
        for number in slices:
            await write(driver, number * span, b"table")
        await call(driver, Op.FLUSH, 0, 0)
        asked = 0

        def submit(batch: list[Request]) -> None:
            nonlocal asked
            asked += len(batch)
            assert asked < 200, "nobody asks again and again"
            for request in batch:
                # The guest's data takes its time, metadata does not.
                file.slow = frozenset({Op.WRITE} if request.length == CLUSTER else ())
                SlowFile.submit(file, [request])

        monkeypatch.setattr(file, "submit", submit)
        answers: list[Request] = []
        reply = Callback(answers.append)
        data = [memoryview(bytearray(bytes([number]) * CLUSTER)) for number in slices]
        places = [number * span + CLUSTER for number in slices]
        driver.submit(
            [
                Request(Op.WRITE.value, place, CLUSTER, buffer, reply)
                for place, buffer in zip(places, data, strict=True)
            ]
        )
        await trio.testing.wait_all_tasks_blocked()
        assert len(file.waiting) == 2, "as many as there is room for slices"
        file.end_one()
        await trio.testing.wait_all_tasks_blocked()
        assert len(file.waiting) == 2, "the next one goes on at once"
        monkeypatch.undo()
        file.slow = frozenset()
        while file.waiting:
            file.end_one()
            await trio.testing.wait_all_tasks_blocked()
        assert [request.error for request in answers] == [0] * len(slices)
        for place, buffer in zip(places, data, strict=True):
            assert await read(driver, place, CLUSTER) == bytes(buffer)


async def test_a_cluster_in_place_stays_its_writers_while_others_are_filled() -> None:
    """It was discarded meanwhile and became another's, whose data the writer then overwrote."""
    backing = SlowFile(b"b" * (1 << 20))
    file = MemoryFile(new_image(Header(size=1 << 20)))
    async with opened_on(file, backing=backing) as driver:
        await write(driver, 0, b"old" * 1000)
        await call(driver, Op.FLUSH, 0, 0)
        backing.slow = frozenset({Op.READ})
        answers: list[Request] = []
        reply = Callback(answers.append)
        data = memoryview(bytearray(b"x" * CLUSTER))
        driver.submit([Request(Op.WRITE.value, CLUSTER // 2, CLUSTER, data, reply)])
        assert backing.waiting, "the second cluster is being filled"
        driver.submit([Request(Op.DISCARD.value, 0, CLUSTER, None, reply)])
        await trio.testing.wait_all_tasks_blocked()
        await call(driver, Op.FLUSH, 0, 0)
        await trio.testing.wait_all_tasks_blocked()
        await write(driver, 4 * CLUSTER, b"y" * CLUSTER)
        await backing.end_all()
        await driver.wait_idle()
        assert [request.error for request in answers] == [0, 0]
        backing.slow = frozenset()
        assert await read(driver, 4 * CLUSTER, CLUSTER) == b"y" * CLUSTER
        assert await read(driver, CLUSTER, CLUSTER) == b"x" * (CLUSTER // 2) + b"b" * (CLUSTER // 2)


class _Threads:
    """Work that is done at once."""

    def call(self, function: Callable[[], int], done: Callable[[int], None]) -> None:
        done(function())

    def soon(self, function: Callable[[], None]) -> None:
        function()
