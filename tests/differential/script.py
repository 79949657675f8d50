"""What a QMP script is made of.

A step is a command (a dict), raw text that has one answer, ``event NAME``, or ``until JOB STATUS``: all events
about that job in their order, up to this status. ``Differs`` marks a step whose answer is not the reference's on
purpose, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

Step = dict[str, Any] | str


@attrs.frozen
class Differs:
    """A step that is answered in another way."""

    step: Step
    why: str


@attrs.frozen
class Script:
    """``marked`` is the script with its ``Differs``.

    ``sector``: the script needs a loop device of ``img`` with sectors of so many bytes, whose path ``LOOP``
    stands for. ``unseen``: members of answers that are left out of the comparison. ``files``: what is there beside
    the files of every program.
    """

    marked: list[Step | Differs]
    arguments: tuple[str, ...] = ()
    sector: int = 0
    unseen: frozenset[str] = frozenset()
    files: Mapping[str, bytes] = {}

    @property
    def steps(self) -> list[Step]:
        """What is sent."""
        return [item.step if isinstance(item, Differs) else item for item in self.marked]

    def why(self, index: int) -> str | None:
        """Why a step's answer differs, None when it does not."""
        item = self.marked[index]
        return item.why if isinstance(item, Differs) else None


def call(name: str, /, **arguments: Any) -> dict[str, Any]:
    """A command; ``_`` in names is ``-``, a trailing one is dropped."""
    body = {key.rstrip("_").replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": name, "arguments": body} if body else {"execute": name}


NEGOTIATE = call("qmp_capabilities")
