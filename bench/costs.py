"""What the building blocks of a request cost on this machine: ``python -m bench.costs [--pinned]``.

Each figure is the best of several rounds, in microseconds per item: the best round is the one that was disturbed
least. The loop around the item is measured alone and taken off; the one plain call around most items is not.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import select
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence

import trio

from bench.daemons import pinned_prefix
from bench.machine import cpu_model, package
from bench.report import columns

PAGE = 4096
SCATTER = 256 << 20
BURST = 32
ROUNDS = 7
REQUEST = struct.Struct(">IHHQQI")

Cost = tuple[str, float]


def best(work: Callable[[int], None], count: int) -> float:
    """Return the microseconds per item of ``work(count)`` in its best round."""
    work(max(count // 10, 1))
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work(count)
        taken.append(time.perf_counter() - begin)
    return 1e6 * min(taken) / count


async def best_async(work: Callable[[int], Awaitable[None]], count: int) -> float:
    """The same for a coroutine function."""
    await work(max(count // 10, 1))
    taken = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        await work(count)
        taken.append(time.perf_counter() - begin)
    return 1e6 * min(taken) / count


def each(call: Callable[[], object], count: int = 100_000) -> float:
    """Return the cost of one call of ``call``, the empty loop taken off."""

    def work(times: int) -> None:
        for _ in range(times):
            call()

    def nothing(times: int) -> None:
        for _ in range(times):
            pass

    return best(work, count) - best(nothing, count)


def interpreter_costs() -> list[Cost]:
    """Costs that no system call is part of."""
    header = REQUEST.pack(0x25609513, 0, 0, 1, PAGE, PAGE)

    def plain() -> None:
        pass

    return [
        ("plain call", each(plain, 1_000_000)),
        ("struct unpack_from of an NBD request (28 bytes)", each(lambda: REQUEST.unpack_from(header, 0))),
        ("struct pack_into of an NBD request", each_pack()),
        ("memoryview slice of 4 KiB", each_slice()),
    ]


def each_pack() -> float:
    buffer = bytearray(REQUEST.size)
    return each(lambda: REQUEST.pack_into(buffer, 0, 0x25609513, 0, 0, 1, PAGE, PAGE))


def each_slice() -> float:
    view = memoryview(bytearray(1 << 20))
    return each(lambda: view[PAGE : 2 * PAGE])


def file_costs() -> list[Cost]:
    """Costs of moving a page between a buffer and the page cache, and of the smallest system calls."""
    view = memoryview(bytearray(PAGE))
    nowait = os.RWF_NOWAIT
    with tempfile.TemporaryFile(dir="/var/tmp", buffering=0) as file:
        for _ in range(SCATTER // (1 << 20)):
            file.write(bytes(1 << 20))
        fd = file.fileno()
        offsets = [PAGE * page for page in random.Random(1).sample(range(SCATTER // PAGE), SCATTER // PAGE)]
        anywhere = itertools.cycle(offsets).__next__
        found = [
            ("preadv of a 4 KiB page, cached, the same again", each(lambda: os.preadv(fd, [view], 0))),
            (
                f"preadv of a random cached page of {SCATTER >> 20} MiB",
                each(lambda: os.preadv(fd, [view], anywhere())),
            ),
            ("the same with RWF_NOWAIT", each(lambda: os.preadv(fd, [view], anywhere(), nowait))),
            ("pwritev of a 4 KiB page, cached, the same again", each(lambda: os.pwritev(fd, [view], 0))),
            ("pwritev of a random cached page", each(lambda: os.pwritev(fd, [view], anywhere()))),
        ]
    with select.epoll() as poll:
        found.append(("epoll.poll(0), nothing ready", each(lambda: poll.poll(0))))
    return found


def socket_costs() -> list[Cost]:
    """Costs of a unix socket, each item being sent and received in the same thread."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with left, right:
        for end in (left, right):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        page, buffer = bytes(PAGE), memoryview(bytearray(BURST * PAGE))
        request = bytes(REQUEST.size)

        def receive(total: int) -> None:
            got = 0
            while got < total:
                got += right.recv_into(buffer)

        def one_by_one() -> None:
            left.send(page)
            receive(PAGE)

        def gathered() -> None:
            left.sendmsg([page] * BURST)
            receive(BURST * PAGE)

        def requests() -> None:
            left.sendmsg([request] * BURST)
            receive(BURST * REQUEST.size)

        return [
            ("send + recv of 4 KiB on a socket pair, one at a time", each(one_by_one, 20_000)),
            (f"the same, a burst of {BURST} in one sendmsg, per 4 KiB", each(gathered, 2_000) / BURST),
            (f"send + recv of {BURST} requests in one sendmsg, per request", each(requests, 5_000) / BURST),
        ]


async def trio_costs() -> list[Cost]:
    """Costs of the event loop."""

    async def checkpoints(count: int) -> None:
        for _ in range(count):
            await trio.lowlevel.checkpoint()

    async def own_channel(count: int) -> None:
        send, receive = trio.open_memory_channel[int](1)
        for _ in range(count):
            send.send_nowait(1)
            await receive.receive()

    async def round_trips(count: int) -> None:
        there_in, there_out = trio.open_memory_channel[int](0)
        back_in, back_out = trio.open_memory_channel[int](0)

        async def echo() -> None:
            async for item in there_out:
                await back_in.send(item)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            for _ in range(count):
                await there_in.send(1)
                await back_out.receive()
            there_in.close()

    async def children(count: int) -> None:
        async def nothing() -> None:
            pass

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(nothing)

    async def threads(count: int) -> None:
        for _ in range(count):
            await trio.to_thread.run_sync(int)

    return [
        ("trio checkpoint", await best_async(checkpoints, 10_000)),
        ("memory channel, send_nowait + receive in one task", await best_async(own_channel, 10_000)),
        ("memory channel round trip to another task", await best_async(round_trips, 5_000)),
        ("task started and ended in a nursery, many at once", await best_async(children, 2_000)),
        ("trio.to_thread.run_sync", await best_async(threads, 500)),
    ]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.costs", description=__doc__.partition("\n")[0])
    parser.add_argument("--pinned", action="store_true", help="stay on one CPU under SCHED_RR: much less spread")
    options = parser.parse_args(arguments)
    if options.pinned:
        prefix = pinned_prefix() or sys.exit("bench.costs: taskset or SCHED_RR is not to be had here")
        os.execvp(prefix[0], [*prefix, sys.executable, "-m", "bench.costs"])
    costs = [*interpreter_costs(), *file_costs(), *socket_costs(), *trio.run(trio_costs)]
    print(f"{sys.implementation.name} {sys.version.split()[0]}, trio {package('trio')}, {cpu_model()}\n")
    print("\n".join(columns([["item", "microseconds"], *([title, f"{cost:.2f}"] for title, cost in costs)])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
