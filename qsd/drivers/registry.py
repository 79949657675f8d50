"""The drivers there are."""

from __future__ import annotations

from qsd.drivers.base import Driver
from qsd.drivers.creating import Creator
from qsd.drivers.file import FileDriver, HostDeviceDriver
from qsd.drivers.file_create import create_file
from qsd.drivers.null import NullAioDriver, NullDriver
from qsd.drivers.qcow2.driver import Qcow2Driver
from qsd.drivers.raw import RawDriver
from qsd.errors import QmpError

DRIVERS: dict[str, type[Driver]] = {
    kind.name: kind for kind in (FileDriver, HostDeviceDriver, NullDriver, NullAioDriver, RawDriver, Qcow2Driver)
}

# Formats and protocols that blockdev-create can make, by driver name.
CREATORS: dict[str, Creator] = {"file": create_file}


def find_driver(name: str) -> type[Driver]:
    """The class of driver ``name``; raises QmpError."""
    found = DRIVERS.get(name)
    if found is None:
        raise QmpError(f"Unknown driver '{name}'")
    return found
