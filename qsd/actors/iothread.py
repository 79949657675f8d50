"""The ``iothread`` object: a polling policy for the data plane.

The daemon has one data-plane loop, because one interpreter runs one thread of Python at a time: more threads
would take turns and add the switch. So an iothread is not a thread here; what it says about polling is applied by
that loop to the exports that name it. Every property is validated and kept as the reference does.
"""

from __future__ import annotations

from typing import Any

import attrs

from qsd.actors.qom import Property, QomObject, declare_type
from qsd.errors import QmpError
from qsd.host.reactor import PollPolicy

_INT64_MAX = 2**63 - 1

# Property on the wire: (attribute, default, greatest value). All start at 0.
_LIMITS: dict[str, tuple[str, int, int]] = {
    "thread-pool-min": ("thread_pool_min", 0, _INT64_MAX),
    "aio-max-batch": ("aio_max_batch", 0, _INT64_MAX),
    "thread-pool-max": ("thread_pool_max", 64, _INT64_MAX),
    "poll-max-ns": ("poll_max_ns", 32768, _INT64_MAX),
    "poll-weight": ("poll_weight", 3, 63),
    "poll-grow": ("poll_grow", 2, _INT64_MAX),
    "poll-shrink": ("poll_shrink", 2, _INT64_MAX),
}


@attrs.define(eq=False, slots=False)
class IoThread(QomObject):
    """An iothread's properties; ``policy`` is what the data plane reads."""

    typename = "iothread"

    thread_pool_min: int = 0
    aio_max_batch: int = 0
    thread_pool_max: int = 64
    poll_max_ns: int = 32768
    poll_weight: int = 3
    poll_grow: int = 2
    poll_shrink: int = 2

    @classmethod
    def from_options(cls, options: Any) -> IoThread:
        """Make one from ``IothreadProperties``. Raises QmpError for the first property out of range."""
        made = cls()
        given = {}
        for name, (attribute, _, high) in _LIMITS.items():
            value = getattr(options, attribute)
            if value is not None:
                given[attribute] = _checked(name, value, high)
        for attribute, value in given.items():
            setattr(made, attribute, value)
        made.check_pool()
        return made

    @property
    def policy(self) -> PollPolicy:
        return PollPolicy(self.poll_max_ns, self.poll_grow, self.poll_shrink)

    def check_pool(self) -> None:
        """Raise QmpError unless 0 <= thread-pool-min <= thread-pool-max and the latter allows a thread."""
        _check_pool(self.thread_pool_min, self.thread_pool_max)


def _check_pool(low: int, high: int) -> None:
    if high < 1 or low > high or high > 2**31 - 1:
        raise QmpError("bad thread-pool-min/thread-pool-max values")


def _checked(name: str, value: int, high: int) -> int:
    if not 0 <= value <= high:
        raise QmpError(f"{name} value must be in range [0, {high}]")
    return value


def _property(name: str) -> Property:
    attribute, _, high = _LIMITS[name]

    def read(item: IoThread) -> int:
        value: int = getattr(item, attribute)
        return value

    def write(item: IoThread, value: int) -> None:
        _checked(name, value, high)
        pool = {"thread_pool_min": item.thread_pool_min, "thread_pool_max": item.thread_pool_max}
        if attribute in pool:
            pool[attribute] = value
            _check_pool(pool["thread_pool_min"], pool["thread_pool_max"])
        setattr(item, attribute, value)

    return Property(name, "int", read, int, write)


_OF_EVERY_LOOP = ("thread-pool-min", "aio-max-batch", "thread-pool-max")

declare_type("event-loop-base", "object", *map(_property, _OF_EVERY_LOOP), abstract=True)
declare_type(
    "iothread",
    "event-loop-base",
    *(_property(name) for name in _LIMITS if name not in _OF_EVERY_LOOP),
    user_creatable=True,
)
