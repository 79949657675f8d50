"""A free lock is taken without giving others a turn; one that is not, in the order it was asked for."""

from __future__ import annotations

import trio
import trio.testing

from qsd.drivers.prompt import PromptLock


async def test_a_free_lock_is_taken_at_once() -> None:
    lock = PromptLock()
    with trio.testing.assert_no_checkpoints():
        async with lock:
            pass
        async with lock:
            pass


async def test_who_asks_first_has_it_first() -> None:
    lock = PromptLock()
    seen = []

    async def take(name: str) -> None:
        async with lock:
            seen.append(name)
            await trio.lowlevel.checkpoint()
            seen.append(name)

    async with trio.open_nursery() as nursery:
        async with lock:
            for name in "abc":
                nursery.start_soon(take, name)
                await trio.testing.wait_all_tasks_blocked()
        # It is somebody's already.
        await take("d")
    assert seen == list("aabbccdd")


async def test_who_gives_up_waiting_does_not_keep_it() -> None:
    lock = PromptLock()

    async def give_up() -> None:
        with trio.move_on_after(0):
            async with lock:
                raise AssertionError("two have it")

    async with lock, trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
    with trio.testing.assert_no_checkpoints():
        async with lock:
            pass
