"""The registry of drivers: every name leads to what it says, and the schema lists just these."""

from __future__ import annotations

import inspect
import threading
from importlib import import_module
from types import ModuleType

import pytest

from qsd.drivers import registry
from qsd.drivers.base import Driver
from qsd.drivers.registry import CREATORS, DRIVERS, JOB_FILTERS, find_driver
from qsd.errors import QmpError
from qsd.qapi.core import SCHEMA
from qsd.qapi.schema.block import BlockdevDriver


async def test_drivers_are_what_they_are_called() -> None:
    for name in (*DRIVERS, *JOB_FILTERS):
        kind = await find_driver(name)
        assert issubclass(kind, Driver)
        assert kind.name == name


def test_drivers_are_those_of_the_schema() -> None:
    assert SCHEMA.commands
    assert sorted(DRIVERS) == sorted(driver.value for driver in BlockdevDriver)


def test_creators_are_coroutine_functions() -> None:
    assert set(CREATORS) <= set(DRIVERS)
    for creator in CREATORS.values():
        assert inspect.iscoroutinefunction(creator)


async def test_driver_is_imported_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first qcow2 image of a daemon held it for a tenth of a second."""
    threads: list[threading.Thread] = []

    def importing(name: str) -> ModuleType:
        threads.append(threading.current_thread())
        return import_module(name)

    monkeypatch.setattr(registry, "import_module", importing)
    await find_driver("qcow2")
    first, threads[:] = threads[:], []
    monkeypatch.setattr(registry.Imported, "is_imported", lambda _self, _name: False)
    await find_driver("qcow2")
    assert first[-1] is threading.main_thread(), "nothing to wait for"
    assert threads[0] is not threading.main_thread()


async def test_driver_that_does_not_exist_is_refused() -> None:
    with pytest.raises(QmpError, match="Unknown driver 'qcow9'"):
        await find_driver("qcow9")
