"""The registry of objects: what users create under ``/objects``, and what other services show in the tree.

It has no task and no mailbox: its state is changed between awaits only, by whoever calls it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from qsd import trace
from qsd.actors.faces import LivingFace, MonitorFace
from qsd.actors.iothread import IoThread
from qsd.actors.qom import Children, Container, QomObject, list_types
from qsd.actors.secret import Secret
from qsd.errors import QmpError
from qsd.qapi.schema.objects import IothreadProperties, SecretProperties

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*", re.ASCII)
_NEW = trace.event("object_new")
_FINALIZE = trace.event("object_finalize")
IDENTIFIER_HINT = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."


def check_identifier(name: str) -> None:
    """Raise QmpError (with the reference's hint) unless ``name`` is an identifier."""
    if _IDENTIFIER.fullmatch(name) is None:
        raise QmpError("Parameter 'id' expects an identifier", hint=IDENTIFIER_HINT)


def creatable_types() -> list[str]:
    """The types ``object-add`` takes, sorted."""
    return sorted(row.name for row in list_types("user-creatable"))


class Objects:
    """The object tree: ``/objects``, ``/chardevs`` and the containers the reference has beside them."""

    def __init__(self) -> None:
        self.root = Container()
        for name in ("backend", "objects", "chardevs", "audiodevs"):
            self.root.items[name] = Container()
        self.secrets = Secrets(self)
        self.iothreads = IoThreads(self)
        # By the type of their options: checks the options, and returns what makes the object. Both raise QmpError.
        self.makers: dict[type, Callable[[Any], Callable[[], Awaitable[QomObject]]]] = {
            IothreadProperties: self._iothread,
            SecretProperties: self._secret,
        }
        # Ids taken by objects that are being made: their id is refused to others, and they are not found yet.
        self._reserved: set[str] = set()

    @property
    def user(self) -> dict[str, QomObject]:
        """The objects under ``/objects``."""
        return self._container("objects").items

    async def add(self, options: Any) -> None:
        """Make what ``options`` (a branch of ``ObjectOptions``) describe. Raises QmpError and leaves nothing."""
        name: str = options.id
        check_identifier(name)
        make = self.makers[type(options)](options)
        self._check_free(name)
        self._reserved.add(name)
        try:
            made = await make()
        finally:
            self._reserved.discard(name)
        self.user[name] = made
        if _NEW.enabled:
            _NEW("{} ({})", name, made.typename)

    def _iothread(self, options: IothreadProperties) -> Callable[[], Awaitable[QomObject]]:
        made = IoThread.from_options(options)

        async def make() -> QomObject:
            return made

        return make

    def _secret(self, options: SecretProperties) -> Callable[[], Awaitable[QomObject]]:
        made = Secret.from_options(options)

        async def make() -> QomObject:
            await made.load(options, self.secrets.get)
            return made

        return make

    async def delete(self, name: str, session: str | None = None) -> None:
        """Delete a user's object. ``session`` is the id of the monitor that asks. Raises QmpError.

        What still uses the object keeps it (an iothread's policy, a secret's value were read by then).
        """
        found = self.user.get(name)
        if found is None:
            raise QmpError(f"object '{name}' not found")
        if isinstance(found, LivingFace):
            if isinstance(found, MonitorFace) and name == session:
                raise QmpError("Cannot delete the current QMP monitor")
            self.withdraw("objects", name)
            await found.remove()
            return
        self.withdraw("objects", name)
        if _FINALIZE.enabled:
            _FINALIZE("{} ({})", name, found.typename)

    def publish(self, container: str, name: str, item: QomObject) -> None:
        """Show ``item`` as ``/container/name``. Raises QmpError when the name is taken."""
        if container == "objects":
            self._check_free(name)
        elif name in self._container(container).items:
            raise _duplicate(name)
        self._container(container).items[name] = item

    def withdraw(self, container: str, name: str) -> None:
        """Take an object out of the tree; fine when it is not there any more."""
        self._container(container).items.pop(name, None)

    def mount(self, container: str, view: Callable[[], Children]) -> None:
        """Let ``/container`` show what ``view`` returns at each look."""
        self.root.items[container] = Container(view)

    def _check_free(self, name: str) -> None:
        if name in self.user or name in self._reserved:
            raise _duplicate(name)

    def _container(self, name: str) -> Container:
        found = self.root.items[name]
        assert isinstance(found, Container)
        return found


def _duplicate(name: str) -> QmpError:
    return QmpError(f"attempt to add duplicate property '{name}' to object (type 'container')")


class Secrets:
    """Finds secrets by id."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def get(self, name: str) -> bytes:
        """The plain bytes of secret ``name``. Raises QmpError."""
        found = self._objects.user.get(name)
        if found is None:
            raise QmpError(f"No secret with id '{name}'")
        if not isinstance(found, Secret):
            raise QmpError(f"Object with id '{name}' is not a secret")
        return found.value

    def password(self, name: str) -> bytes:
        """The same for what encrypts an image: UTF-8 without zero bytes, as the reference wants it."""
        value = self.get(name)
        try:
            is_text = "\0" not in value.decode()
        except UnicodeDecodeError:
            is_text = False
        if not is_text:
            raise QmpError(f"Data from secret {name} is not valid UTF-8")
        return value


class IoThreads:
    """Finds iothreads by id."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def get(self, name: str) -> IoThread:
        """The iothread ``name``. Raises QmpError."""
        found = self._objects.user.get(name)
        if not isinstance(found, IoThread):
            raise QmpError(f'iothread "{name}" not found')
        return found
