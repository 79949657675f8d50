"""``query-qmp-schema``: what is declared, described in the reference's terms.

Type names are masked by numbers, because they are no interface; only builtins, commands and events keep theirs.
All widths of integers are ``int`` here, and optional members carry ``"default": null``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from qsd.qapi.core import SCHEMA, Schema, resolve
from qsd.qapi.types import AlternateType, ArrayType, Branch, Builtin, EnumType, Integer, Member, StructType, Type

_Entry = dict[str, Any]


def introspect(schema: Schema = SCHEMA) -> list[dict[str, Any]]:
    """Describe every command and event of ``schema`` and all types they use, as JSON values."""
    return _Masker(schema).run()


@attrs.define(eq=False)
class _Masker:
    schema: Schema
    entries: list[_Entry] = attrs.field(factory=list)
    names: dict[Any, str] = attrs.field(factory=dict)
    todo: list[tuple[str, Any]] = attrs.field(factory=list)
    numbered: int = 0

    def run(self) -> list[_Entry]:
        for command in self.schema.commands.values():
            entry = {
                "name": command.name,
                "meta-type": "command",
                "arg-type": self._use_declared(command.args),
                "ret-type": self._use_declared(command.returns),
            }
            self.entries.append(entry | _features(command.features))
        for event in self.schema.events.values():
            entry = {"name": event.name, "meta-type": "event", "arg-type": self._use_declared(event.data)}
            self.entries.append(entry | _features(event.features))
        # Types are described in the order they were first named; describing one may name others.
        at = 0
        while at < len(self.todo):
            name, described = self.todo[at]
            self.entries.append({"name": name} | self._describe(described))
            at += 1
        return self.entries

    def _use_declared(self, annotation: Any) -> str:
        return self._use(None if annotation is None else resolve(annotation))

    def _use(self, used: Type | Branch | None) -> str:
        """The name of a type, which is described if it was not yet. None is the object without members."""
        if isinstance(used, Integer):
            key: Any = "int"
        elif isinstance(used, Builtin):
            key = used.name
        elif isinstance(used, ArrayType):
            key = (self._use(used.element),)
        elif used is None or (isinstance(used, Branch) and not used.members and not used.features):
            key = None
        elif isinstance(used, Branch):
            # A branch is the struct of that name, whether it was met here or as a type of its own.
            key = (used.name, tuple((item.name, item.optional) for item in used.members))
        elif isinstance(used, StructType):
            if not used.members and not used.features:
                return self._use(None)
            key = (used.name, tuple((item.name, item.optional) for item in used.members))
        else:
            key = used
        known = self.names.get(key)
        if known is not None:
            return known
        if isinstance(used, (Integer, Builtin)):
            name = key
        elif isinstance(used, ArrayType):
            name = f"[{key[0]}]"
        else:
            name = str(self.numbered)
            self.numbered += 1
        self.names[key] = name
        self.todo.append((name, used))
        return str(name)

    def _describe(self, described: Type | Branch | None) -> _Entry:
        if described is None:
            return {"meta-type": "object", "members": []}
        if isinstance(described, Integer):
            return {"meta-type": "builtin", "json-type": "int"}
        if isinstance(described, Builtin):
            return {"meta-type": "builtin", "json-type": described.json_type}
        if isinstance(described, ArrayType):
            return {"meta-type": "array", "element-type": self._use(described.element)}
        if isinstance(described, EnumType):
            members = [
                {"name": name} | _features(described.member_features.get(name, ())) for name in described.members
            ]
            return {"meta-type": "enum", "members": members, "values": list(described.members)}
        if isinstance(described, AlternateType):
            members = [{"type": self._use(choice)} for choice in described.choices.values()]
            return {"meta-type": "alternate", "members": members}
        entry: _Entry = {"meta-type": "object", "members": [self._member(item) for item in described.members]}
        if not isinstance(described, (StructType, Branch)):
            entry["tag"] = described.tag.name
            entry["variants"] = [
                {"case": value, "type": self._use(described.branches.get(value))}
                for value in described.tag_enum.members
            ]
        return entry | _features(described.features)

    def _member(self, item: Member) -> _Entry:
        entry: _Entry = {"name": item.name}
        if item.optional:
            entry["default"] = None
        return entry | {"type": self._use(item.type)} | _features(item.features)


def _features(features: Sequence[str]) -> _Entry:
    return {"features": list(features)} if features else {}
