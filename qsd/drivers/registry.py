"""The drivers there are, and what creates images. Imported when first used: a daemon needs few of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Generic, TypeVar

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


def find_driver(name: str) -> type[Driver]:
    """The class of driver ``name``; raises QmpError."""
    found = DRIVERS.get(name) or JOB_FILTERS.get(name)
    if found is None:
        raise QmpError(f"Unknown driver '{name}'")
    return found
