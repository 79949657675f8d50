"""The drivers there are, and what creates images. Imported when first used: a daemon needs few of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

import trio

from qsd.drivers.base import Driver
from qsd.drivers.creating import Creator
from qsd.errors import QmpError

T = TypeVar("T")


class Imported(Mapping[str, T], Generic[T]):
    """Values by name, each imported from its ``module:attribute``."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> T:
        module, _, attribute = self._places[name].partition(":")
        value: T = getattr(import_module(f"qsd.drivers.{module}"), attribute)
        return value

    def is_imported(self, name: str) -> bool:
        """Whether the value costs nothing."""
        return f"qsd.drivers.{self._places[name].partition(':')[0]}" in sys.modules

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


DRIVERS: Imported[type[Driver]] = Imported(
    {
        "compress": "compress:CompressDriver",
        "file": "file:FileDriver",
        "host_device": "file:HostDeviceDriver",
        "luks": "luks.driver:LuksDriver",
        "null-aio": "null:NullAioDriver",
        "null-co": "null:NullDriver",
        "qcow2": "qcow2.driver:Qcow2Driver",
        "raw": "raw:RawDriver",
    }
)

# Filters that jobs put in, which no option names.
JOB_FILTERS: Imported[type[Driver]] = Imported({"copy-on-read": "filters:StreamFilter"})

# Formats and protocols that blockdev-create can make, by driver name.
CREATORS: Imported[Creator] = Imported(
    {
        "file": "file_create:create_file",
        "luks": "luks.create:create_luks",
        "qcow2": "qcow2.create:create_qcow2",
    }
)


async def find_driver(name: str) -> type[Driver]:
    """The class of driver ``name``; raises QmpError."""
    known = DRIVERS if name in DRIVERS else JOB_FILTERS
    if name not in known:
        raise QmpError(f"Unknown driver '{name}'")
    if not known.is_imported(name):
        # The modules of qcow2 take a tenth of a second. Beside a thread the loop has its turns.
        await trio.to_thread.run_sync(known.__getitem__, name)
    return known[name]
