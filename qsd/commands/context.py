"""What a command implementation is given: the daemon's services, and who is asking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import attrs

if TYPE_CHECKING:
    from qsd.actors.events import EventBus
    from qsd.actors.graph import Graph
    from qsd.actors.jobs.create import CreateServices
    from qsd.actors.jobs.table import Jobs
    from qsd.actors.objects import Objects
    from qsd.actors.supervisor import Supervisor
    from qsd.qapi.schema.control import QMPCapability
    from qsd.servers.chardev.table import Chardevs
    from qsd.servers.exports import Exports
    from qsd.servers.nbd.server import NbdService


class Session(Protocol):
    """A monitor session, as a command sees it (``quit``, the negotiation)."""

    name: str

    def negotiate(self, enable: tuple[QMPCapability, ...]) -> None:
        """End the negotiation with these capabilities on."""


@attrs.define(eq=False)
class Services:
    """The daemon-wide services commands stand on. Built by ``daemon.py``."""

    supervisor: Supervisor
    events: EventBus
    objects: Objects
    chardevs: Chardevs
    graph: Graph
    exports: Exports
    nbd: NbdService
    jobs: Jobs
    creating: CreateServices


@attrs.define(eq=False)
class Context:
    """One call: ``session`` is None on the command line."""

    services: Services
    session: Session | None = None
