"""Power cuts while key slots change, in a volume of its own and in a qcow2 image.

Whatever has reached the disk, the old password opens it or the new one does; the other slots are as they were, and
none is in use that nothing opens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any, Final

import pytest

pytest.importorskip("numpy")
pytest.importorskip("cryptography")

from qcow2_fakes import MemoryFile, cut, examine, read, write
from test_luks_hostile import DATA, Disk, amendment, encrypted, new_volume, opened, volume

from qsd.drivers.luks import keys
from qsd.drivers.luks.volume import ChildArea, Volume, find_slots, open_volume
from qsd.drivers.qcow2.layout import parse_header
from qsd.errors import QmpError

# Who opens which slots.
Slots = dict[str, list[int]]
PASSWORDS: Final = ("s", "t", "u")
NEW: Final = {"state": "active", "new_secret": "t", "iter_time": 0}
SPARE: Final = {"state": "active", "new_secret": "u", "iter_time": 0}
# What is done first, what is cut off, and the slots after that.
AMENDMENTS: Final[dict[str, tuple[list[dict[str, Any]], dict[str, Any], Slots]]] = {
    "add": ([], NEW, {"s": [0], "t": [1]}),
    "add there": ([], {**NEW, "keyslot": 7}, {"s": [0], "t": [7]}),
    "overwrite the only one": ([], {**NEW, "keyslot": 0}, {"t": [0]}),
    "overwrite another": ([SPARE], {**NEW, "keyslot": 1}, {"s": [0], "t": [1]}),
    "overwrite where all are in use": (
        [SPARE] * 7,
        {**NEW, "keyslot": 3},
        {"s": [0], "t": [3], "u": [1, 2, 4, 5, 6, 7]},
    ),
    "overwrite by the same": ([], {**NEW, "new_secret": "s", "keyslot": 0}, {"s": [0]}),
    "erase": ([SPARE], {"state": "inactive", "keyslot": 0}, {"u": [1]}),
    "erase by password": ([SPARE, SPARE], {"state": "inactive", "old_secret": "u"}, {"s": [0]}),
    "erase what is free": ([SPARE], {"state": "inactive", "keyslot": 5}, {"s": [0], "u": [1]}),
}


@pytest.fixture(autouse=True)
def _little_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_measure", lambda _name, _length: 1000)


class Image:
    """A qcow2 image that is encrypted, or a volume."""

    def __init__(self, kind: str, data: bytes) -> None:
        self.is_qcow2 = kind == "qcow2"
        self.data = data

    @classmethod
    async def new(cls, kind: str) -> Image:
        if kind == "qcow2":
            return cls(kind, (await encrypted()).image)
        disk = Disk((await new_volume())[0])
        async with volume(disk) as driver:
            await write(driver, 0, DATA)
        return cls(kind, bytes(disk.data))

    @asynccontextmanager
    async def opened(self, disk: Disk, secret: str) -> AsyncIterator[Any]:
        if self.is_qcow2:
            async with opened(disk, secret) as (driver, _host):
                yield driver
        else:
            async with volume(disk, secret=secret) as driver:
                yield driver

    async def amend(self, driver: Any, change: dict[str, Any]) -> None:
        wanted = amendment(**change)
        await driver.amend(SimpleNamespace(encrypt=wanted) if self.is_qcow2 else wanted, force=True)

    async def look(self, data: bytes) -> tuple[Slots, list[int]]:
        """Which slots each password opens, and which are in use."""
        start = 0
        if self.is_qcow2:
            found = examine(data)
            assert (found.corruptions, found.leaks) == (0, 0), found.problems
            extension = parse_header(data[: 2 << 20]).crypto_extension()
            assert extension is not None
            start = extension.offset
        area = ChildArea(MemoryFile(data), start)
        there = await first_opened(area)
        slots = {name: await find_slots(there, name.encode()) for name in PASSWORDS}
        return {name: found for name, found in slots.items() if found}, list(there.header.active_slots)


async def first_opened(area: ChildArea) -> Volume:
    for password in PASSWORDS:
        try:
            return await open_volume(area, password.encode())
        except QmpError as error:
            if error.desc != "Invalid password, cannot unlock any keyslot":
                raise
    raise AssertionError("nothing opens it")


@pytest.mark.parametrize("name", AMENDMENTS)
@pytest.mark.parametrize("kind", ["qcow2", "volume"])
async def test_cut_off_amendment(kind: str, name: str) -> None:
    earlier, change, wanted = AMENDMENTS[name]
    image = await Image.new(kind)
    disk = Disk(image.data)
    async with image.opened(disk, "s") as driver:
        for each in earlier:
            await image.amend(driver, each)
        before, disk.requests = bytes(disk.data), 0
        disk.log.clear()
        await image.amend(driver, change)
        log = [*disk.log]
    first, _in_use = await image.look(before)
    seen = []
    for data in dict.fromkeys(cut(before, log)):
        found, in_use = await image.look(data)
        assert sorted(chain(*found.values())) == in_use, "a slot is in use that nothing opens"
        for password, slots in wanted.items():
            kept = {slot for slot in slots if slot in first.get(password, ()) and slot != change.get("keyslot")}
            assert kept <= set(found.get(password, ())), "a slot is lost that has nothing to do with it"
        if found not in seen:
            seen.append(found)
            # Who may open it sees what is in it.
            async with image.opened(Disk(data), next(iter(found))) as driver:
                assert await read(driver, 0, len(DATA)) == DATA
    assert (await image.look(bytes(disk.data)))[0] == wanted
    assert first in seen
    assert wanted in seen
    assert len(seen) > 1 or first == wanted
