"""The drivers there are."""

from __future__ import annotations

from qsd.drivers.base import Driver
from qsd.drivers.file import FileDriver, HostDeviceDriver
from qsd.drivers.null import NullAioDriver, NullDriver
from qsd.drivers.raw import RawDriver

DRIVERS: dict[str, type[Driver]] = {
    kind.name: kind for kind in (FileDriver, HostDeviceDriver, NullDriver, NullAioDriver, RawDriver)
}
