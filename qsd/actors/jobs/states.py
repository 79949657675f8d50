"""The law of jobs as two tables: which status follows which, and which verb is heard in which status.

Taken from the reference (feature map 2.2); ``change`` and ``set-speed`` are verbs of block jobs.
"""

from __future__ import annotations

from enum import Enum

from qsd.errors import QmpError
from qsd.qapi.schema.jobs import JobStatus

S = JobStatus


class Verb(str, Enum):
    """What a user can tell a job, named as in error texts."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


FOLLOWERS: dict[JobStatus, frozenset[JobStatus]] = {
    S.UNDEFINED: frozenset({S.CREATED}),
    S.CREATED: frozenset({S.RUNNING, S.ABORTING, S.NULL}),
    S.RUNNING: frozenset({S.PAUSED, S.READY, S.WAITING, S.ABORTING}),
    S.PAUSED: frozenset({S.RUNNING}),
    S.READY: frozenset({S.STANDBY, S.WAITING, S.ABORTING}),
    S.STANDBY: frozenset({S.READY}),
    S.WAITING: frozenset({S.PENDING, S.ABORTING}),
    S.PENDING: frozenset({S.ABORTING, S.CONCLUDED}),
    S.ABORTING: frozenset({S.CONCLUDED}),
    S.CONCLUDED: frozenset({S.NULL}),
    S.NULL: frozenset(),
}

# Not yet waiting for others, and not paused.
WORKING = frozenset({S.CREATED, S.RUNNING, S.READY})

_STEERED = frozenset({Verb.CANCEL, Verb.PAUSE, Verb.RESUME, Verb.SET_SPEED, Verb.CHANGE})

VERBS: dict[JobStatus, frozenset[Verb]] = {
    S.UNDEFINED: frozenset(),
    S.CREATED: _STEERED,
    S.RUNNING: _STEERED,
    S.PAUSED: _STEERED,
    S.READY: _STEERED | {Verb.COMPLETE},
    S.STANDBY: _STEERED | {Verb.COMPLETE},
    S.WAITING: frozenset({Verb.CANCEL}),
    S.PENDING: frozenset({Verb.CANCEL, Verb.FINALIZE}),
    S.ABORTING: frozenset(),
    S.CONCLUDED: frozenset({Verb.DISMISS}),
    S.NULL: frozenset(),
}


def check_verb(name: str, status: JobStatus, verb: Verb) -> None:
    """Raise QmpError when job ``name`` does not hear ``verb`` in ``status``."""
    if verb not in VERBS[status]:
        raise QmpError(f"Job '{name}' in state '{status.value}' cannot accept command verb '{verb.value}'")
