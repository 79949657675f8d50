"""The registry of drivers: every name leads to what it says, and the schema lists just these."""

from __future__ import annotations

import inspect

from qsd.drivers.base import Driver
from qsd.drivers.registry import CREATORS, DRIVERS, JOB_FILTERS, find_driver
from qsd.qapi.core import SCHEMA
from qsd.qapi.schema.block import BlockdevDriver


def test_drivers_are_what_they_are_called() -> None:
    for name in (*DRIVERS, *JOB_FILTERS):
        kind = find_driver(name)
        assert issubclass(kind, Driver)
        assert kind.name == name


def test_drivers_are_those_of_the_schema() -> None:
    assert SCHEMA.commands
    assert sorted(DRIVERS) == sorted(driver.value for driver in BlockdevDriver)


def test_creators_are_coroutine_functions() -> None:
    assert set(CREATORS) <= set(DRIVERS)
    for creator in CREATORS.values():
        assert inspect.iscoroutinefunction(creator)
