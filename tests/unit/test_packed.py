"""Packed clusters on their way into memory: what is fetched together, what is kept, who gets which error."""

from __future__ import annotations

import errno
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qsd.drivers import packed
from qsd.drivers.gather import Gather, gather_read
from qsd.drivers.packed import Cluster, Unpacker
from qsd.drivers.spot import Spot, end_epoch
from qsd.messages import Flag, Op, Pieces, ReplyQueue, Request

SIZE = 1000
# Less than the whole: the rest is kept for whoever reads on.
PART = SIZE - 1


class Child:
    """The way to the file. ``place`` is where that is read on the spot: a descriptor, and flags for preadv2."""

    length = 10000

    def __init__(self) -> None:
        self.place: tuple[int, int] | None = None
        self.counted = (0, 0)

    def spot(self) -> Spot | None:
        if self.place is None:
            return None
        fd, flags = self.place
        return Spot(lambda offset, _length: (fd, offset, flags))

    def served(self, count: int, size: int) -> None:
        self.counted = (self.counted[0] + count, self.counted[1] + size)


class Driver:
    """A file of packed clusters, 100 bytes each, one for every number. Everything waits to be told."""

    def __init__(self) -> None:
        self.in_flight = 0
        self.resumed: list[Callable[[], None]] = []
        self.fetches: list[tuple[int, memoryview, Callable[[int], None]]] = []
        self.jobs: list[tuple[Callable[[], int], Callable[[int], None]]] = []
        self.host = SimpleNamespace(aio=SimpleNamespace(call=lambda *job: self.jobs.append(job), soon=self.soon))
        self.next_round: list[Callable[[], None]] = []
        self.child = Child()
        self.content = {number: bytes([number]) * 100 for number in range(100)}
        this: Any = self
        self.unpacker = Unpacker(this, self.unpack)

    def soon(self, function: Callable[[], None]) -> None:
        self.next_round.append(function)

    def finished(self, count: int = 1) -> None:
        self.in_flight -= count

    def resume(self, go_on: Callable[[], None]) -> None:
        self.resumed.append(go_on)

    def locate(self, where: int) -> tuple[Any, int, int]:
        return self.child, where * 100, 100

    def fetch_for(self, reply: ReplyQueue, _child: Any, offset: int, buffer: memoryview) -> None:
        request = Request(Op.READ.value, offset, len(buffer), buffer, reply)
        self.fetches.append((offset, buffer, request.complete))

    def unpack(self, _where: int, data: memoryview) -> bytes:
        if data[0] == 0xFF:
            raise OSError(errno.EIO, "broken")
        if data[0] == 0xFE:
            raise MemoryError
        return bytes(data) * 10

    def read(self, where: int, skip: int = 0, length: int = PART) -> Request:
        """Read from one cluster, as a request of its own."""
        replies = ReplyQueue(lambda: None)
        request = Request(Op.READ.value, 0, length, memoryview(bytearray(length)), replies)
        this: Any = self
        gather = Gather(this, request)
        assert request.buffer is not None
        self.unpacker.read(where, skip, request.buffer, gather)
        gather.end()
        return request

    def send(self) -> None:
        resumed, self.resumed = self.resumed, []
        for go_on in resumed:
            go_on()

    def end_fetch(self, error: int = 0) -> None:
        offset, buffer, done = self.fetches.pop(0)
        if not error:
            for at in range(0, len(buffer), 100):
                buffer[at : at + 100] = self.content[(offset + at) // 100][: len(buffer) - at]
        done(error)

    def end_job(self) -> None:
        work, done = self.jobs.pop(0)
        done(work())

    def end_all(self) -> None:
        self.send()
        while self.fetches or self.jobs or self.next_round:
            while self.fetches:
                self.end_fetch()
            while self.jobs:
                self.end_job()
            while self.next_round:
                self.next_round.pop()()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(packed, "LANES", 2)
    made = Driver()
    made.unpacker.at_once = 0
    return made


def is_done(request: Request) -> bool:
    return request.reply.ready == [request]


@pytest.fixture
def file_of(driver: Driver, tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Puts so many clusters into a file that is read on the spot."""
    files = []

    def fill(count: int) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"".join(driver.content[number] for number in range(count)))
        files.append(path.open("rb"))
        driver.child.place = files[0].fileno(), 0
        end_epoch()

    yield fill
    for file in files:
        file.close()


def test_what_can_be_read_on_the_spot_is_not_requested(driver: Driver, file_of: Callable[[int], None]) -> None:
    file_of(10)
    requests = [driver.read(where) for where in (3, 4, 9)]
    driver.send()
    assert not driver.fetches
    assert driver.child.counted == (1, 700), "what lies between is fetched along"
    driver.end_all()
    assert all(is_done(request) and not request.error for request in requests)
    assert [request.buffer[0] for request in requests if request.buffer] == [3, 4, 9]
    assert not driver.in_flight


def test_what_is_not_all_there_is_requested(driver: Driver, file_of: Callable[[int], None]) -> None:
    file_of(5)
    requests = [driver.read(where) for where in (4, 5, 60)]
    driver.send()
    assert [(offset, len(view)) for offset, view, _done in driver.fetches] == [(400, 200), (6000, 100)]
    assert driver.child.counted == (0, 0)
    driver.end_all()
    assert [request.buffer[0] for request in requests if request.buffer] == [4, 5, 60]


def test_nothing_is_read_on_the_spot_beyond_the_files_end(driver: Driver, file_of: Callable[[int], None]) -> None:
    file_of(10)
    driver.child.length = 950
    driver.read(9)
    driver.send()
    assert [(offset, len(view)) for offset, view, _done in driver.fetches] == [(900, 100)]
    driver.end_all()


def test_neighbours_are_fetched_with_one_request(driver: Driver) -> None:
    requests = [driver.read(where) for where in (3, 4, 5, 90, 2)]
    driver.send()
    assert [(offset, len(buffer)) for offset, buffer, _ in driver.fetches] == [(300, 300), (9000, 100), (200, 100)]
    driver.end_all()
    assert all(is_done(request) and not request.error for request in requests)
    assert [request.buffer[0] for request in requests if request.buffer] == [3, 4, 5, 90, 2]
    assert not driver.in_flight


def test_clusters_of_one_fetch_are_shared_out_among_the_threads(driver: Driver) -> None:
    for where in range(8):
        driver.read(where)
    driver.send()
    driver.end_fetch()
    assert len(driver.jobs) == 2
    driver.end_all()
    assert driver.unpacker.size == 8 * SIZE


def test_who_wants_the_same_waits_for_it(driver: Driver) -> None:
    first = driver.read(7, 0, 10)
    driver.send()
    second = driver.read(7, 500, 20)
    driver.send()
    assert len(driver.fetches) == 1
    driver.end_all()
    assert first.buffer == bytes([7]) * 10
    assert second.buffer == bytes([7]) * 20
    third = driver.read(7)
    assert is_done(third), "it is in memory"


@pytest.mark.parametrize("moment", ["wanted", "fetching", "unpacking"])
def test_cluster_forgotten_on_its_way_is_not_kept(driver: Driver, moment: str) -> None:
    before = driver.read(7)
    if moment != "wanted":
        driver.send()
    if moment == "unpacking":
        driver.end_fetch()
    driver.unpacker.forget(7)
    if moment == "wanted":
        driver.send()
    if moment != "unpacking":
        driver.end_fetch()
    driver.content[7] = bytes([70]) * 100
    after = driver.read(7)
    driver.end_all()
    assert before.buffer == bytes([7]) * PART, "its reader gets what was there"
    assert after.buffer == bytes([70]) * PART
    again = driver.read(7)
    assert again.buffer == bytes([70]) * PART, "what came first was not kept"


@pytest.mark.parametrize(("first", "error"), [(0xFF, errno.EIO), (0xFE, errno.ENOMEM)])
def test_broken_cluster_fails_alone(driver: Driver, first: int, error: int) -> None:
    driver.content[4] = bytes([first]) * 100
    requests = [driver.read(where) for where in (3, 4, 5)]
    driver.end_all()
    assert [request.error for request in requests] == [0, error, 0]
    assert is_done(driver.read(5))
    assert not is_done(driver.read(4)), "an error is not kept"


def test_unreadable_bytes_fail_those_who_need_them(driver: Driver) -> None:
    requests = [driver.read(where) for where in (3, 4, 5)]
    driver.send()
    driver.end_fetch(errno.EIO)
    assert len(driver.fetches) == 3
    driver.end_fetch()
    driver.end_fetch(errno.ENXIO)
    driver.end_all()
    assert [request.error for request in requests] == [0, errno.ENXIO, 0]
    assert not driver.in_flight


def test_what_is_kept_is_bounded(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "BUDGET", 5 * SIZE)
    for where in range(50):
        driver.read(where)
        driver.end_all()
        assert driver.unpacker.size <= 5 * SIZE
    assert is_done(driver.read(49))
    assert not is_done(driver.read(0))


def test_loop_unpacks_little_at_once_and_its_share_of_more(driver: Driver) -> None:
    driver.unpacker.at_once = 250
    two = [driver.read(1), driver.read(2)]
    driver.send()
    driver.end_fetch()
    assert all(map(is_done, two)), "no thread was asked"
    many = [driver.read(where) for where in range(10, 22)]
    driver.send()
    driver.end_fetch()
    assert len(driver.jobs) == 2
    assert sum(map(is_done, many)) == 1
    assert len(driver.next_round) == 1
    driver.next_round.pop()()
    assert sum(map(is_done, many)) == 2
    assert len(driver.jobs) == 2, "both threads are at work"
    driver.jobs[0][0]()
    assert not is_done(many[-1]), "a thread tells nobody"
    while driver.next_round:
        driver.next_round.pop()()
    assert is_done(many[-1])
    one = driver.read(30)
    driver.end_all()
    assert is_done(one)
    assert all(map(is_done, many))
    assert not driver.in_flight


def test_busy_loop_leaves_to_threads_what_they_take_soon(driver: Driver) -> None:
    driver.unpacker.at_once = 250
    some = [driver.read(where) for where in range(6)]
    driver.send()
    driver.end_fetch()
    assert len(driver.jobs) == 2
    assert not any(map(is_done, some))
    more = [*some, driver.read(10)]
    driver.send()
    driver.end_fetch()
    driver.next_round.pop()()
    assert sum(map(is_done, more)) == 1, "that is more than both take"
    driver.unpacker._moves += 1
    driver.next_round.pop()()
    assert sum(map(is_done, more)) == 1, "something happened in the round before"
    driver.next_round.pop()()
    assert sum(map(is_done, more)) == 2, "nothing else is to be done"
    driver.end_all()
    assert all(map(is_done, more))
    assert not driver.in_flight


def test_where_there_is_one_processor_the_loop_unpacks_all_of_it_in_turns(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "LANES", 0)
    driver.unpacker.at_once = 50
    four = [driver.read(where) for where in range(4)]
    driver.send()
    driver.end_fetch()
    for done in range(1, 4):
        assert sum(map(is_done, four)) == done
        driver.next_round.pop()()
    assert all(map(is_done, four))
    assert not driver.jobs
    assert not driver.next_round
    assert not driver.in_flight


def test_threads_unpack_what_would_hold_up_the_loop(driver: Driver) -> None:
    driver.unpacker.at_once = 99
    four = [driver.read(where) for where in range(4)]
    driver.send()
    driver.end_fetch()
    assert not any(map(is_done, four))
    assert not driver.next_round, "it would come again and again"
    driver.end_all()
    assert all(map(is_done, four))


def test_cluster_that_was_wanted_whole_is_not_kept(driver: Driver) -> None:
    whole, part = driver.read(7, 0, SIZE), driver.read(7, 10, 20)
    driver.end_all()
    assert whole.buffer == bytes([7]) * SIZE
    assert part.buffer == bytes([7]) * 20
    assert not driver.unpacker.size


def test_who_comes_while_a_thread_has_the_cluster_gets_it_too(driver: Driver) -> None:
    first = driver.read(7, 0, 10)
    driver.send()
    driver.end_fetch()
    work, done = driver.jobs.pop()
    work()
    assert first.buffer == bytes([7]) * 10, "copied where it was unpacked"
    second = driver.read(7, 500, 20)
    done(0)
    assert is_done(first)
    assert is_done(second)
    assert second.buffer == bytes([7]) * 20


def lending_read(driver: Driver, *parts: tuple[int, int, int]) -> Request:
    """A read that allows pieces: of cluster, skip and length each."""
    length = sum(part[2] for part in parts)
    buffer = memoryview(bytearray(length))
    request = Request(Op.READ.value, 0, length, buffer, ReplyQueue(lambda: None), Flag.MAY_LEND.value)
    this: Any = driver
    gather = gather_read(this, request)
    position = 0
    for where, skip, size in parts:
        driver.unpacker.read(where, skip, buffer[position : position + size], gather, position)
        position += size
    gather.end()
    return request


def test_clusters_that_are_wanted_for_the_most_part_are_lent(driver: Driver) -> None:
    request = lending_read(driver, (1, SIZE - 10, 10), (2, 0, SIZE), (3, 0, 500), (4, 0, 499))
    driver.end_all()
    assert is_done(request)
    assert isinstance(request.result, Pieces)
    views = request.result.views
    assert [*map(len, views)] == [10, SIZE, 500, 499]
    assert b"".join(views) == bytes([1]) * 10 + bytes([2]) * SIZE + bytes([3]) * 500 + bytes([4]) * 499
    assert request.buffer is not None
    assert bytes(request.buffer) == bytes([1]) * 10 + bytes(SIZE + 500) + bytes([4]) * 499, "the rest is copied"
    again = lending_read(driver, (3, 500, 500))
    assert is_done(again)
    assert b"".join(again.result.views) == bytes([3]) * 500, "what is kept is lent as well"
    assert not driver.in_flight


def test_nothing_is_lent_with_an_error_or_without_need(driver: Driver) -> None:
    driver.content[4] = bytes([0xFF]) * 100
    broken = lending_read(driver, (3, 0, SIZE), (4, 0, SIZE))
    copied = lending_read(driver, (5, 0, 10))
    driver.end_all()
    assert (broken.error, broken.result) == (errno.EIO, None)
    assert (copied.error, copied.result) == (0, None)
    assert copied.buffer == bytes([5]) * 10


def test_unpacked_clusters_are_freed_at_once(driver: Driver) -> None:
    """A circle kept all that had been sent, 150 MiB, until Python looked for circles."""
    gc.collect()
    gc.disable()
    try:
        requests = [lending_read(driver, (where, 0, SIZE), (where + 20, 0, SIZE)) for where in range(10)]
        driver.end_all()
        assert all(request.result for request in requests)
        assert not [each for each in gc.get_objects() if isinstance(each, Cluster)]
    finally:
        gc.enable()
