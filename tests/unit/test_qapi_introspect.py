"""Introspection: what is declared has the reference's shape, and lists nothing that the reference does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qsd.qapi.schema
from qsd.qapi.core import SCHEMA
from qsd.qapi.introspect import introspect
from qsd.qapi.schema.control import SchemaInfo
from qsd.qapi.visit import from_json
from qsd.wire.qmp_json import dumps

_FIXTURE = Path(__file__).parents[1] / "data" / "qmp_schema_reference.json"
_Types = dict[str, dict[str, Any]]


def _reference() -> _Types:
    return {entry["name"]: entry for entry in json.loads(_FIXTURE.read_text())["entries"]}


def _ours() -> _Types:
    assert qsd.qapi.schema.__all__
    return {entry["name"]: entry for entry in introspect()}


# Enum values and branches the reference does not have; documented as ours.
_BEYOND = {"qsd-view"}


# Branches of unions that are still to come. (A value of the tag without a branch has no members of its own.)
TO_COME: set[str] = {"query-block-jobs: ret-type: element-type[mirror]"}


class _Comparison:
    """Compares two type graphs whose names differ. Ours may lack values, branches and choices, nothing else.

    What it has besides is named in ``_BEYOND``.
    """

    def __init__(self, ours: _Types, theirs: _Types) -> None:
        self.ours, self.theirs = ours, theirs
        self.seen: set[tuple[str, str]] = set()
        self.problems: list[str] = []

    def compare(self, ours: str, theirs: str, where: str) -> None:
        if (ours, theirs) in self.seen:
            return
        self.seen.add((ours, theirs))
        mine, other = self.ours[ours], self.theirs[theirs]
        for fact in ("meta-type", "json-type", "features", "tag", "allow-oob"):
            self.same(mine.get(fact), other.get(fact), f"{where}: {fact}")
        for name in ("arg-type", "ret-type", "element-type"):
            if name in mine and name in other:
                self.compare(mine[name], other[name], f"{where}: {name}")
        shape = mine["meta-type"]
        if shape == "enum":
            known = {item["name"]: item for item in other["members"]}
            for item in mine["members"]:
                if item["name"] in _BEYOND:
                    continue
                self.same(item, known.get(item["name"]), f"{where}: value")
            self.same(mine["values"], [item["name"] for item in mine["members"]], f"{where}: values")
        elif shape == "object":
            self.objects(mine, other, where)
        elif shape == "alternate":
            by_kind = {self.kind(self.theirs, item["type"]): item["type"] for item in other["members"]}
            for item in mine["members"]:
                kind = self.kind(self.ours, item["type"])
                self.compare(item["type"], by_kind[kind], f"{where}: {kind}")

    def objects(self, mine: dict[str, Any], other: dict[str, Any], where: str) -> None:
        members = {item["name"]: item for item in mine["members"]}
        known = {item["name"]: item for item in other["members"]}
        self.same(sorted(members), sorted(known), f"{where}: members")
        for name in members.keys() & known.keys():
            a, b = members[name], known[name]
            self.same({**a, "type": ""}, {**b, "type": ""}, f"{where}.{name}")
            self.compare(a["type"], b["type"], f"{where}.{name}")
        cases = {item["case"]: item["type"] for item in other.get("variants", [])}
        for item in mine.get("variants", []):
            if item["case"] in _BEYOND:
                continue
            place = f"{where}[{item['case']}]"
            if place in TO_COME:
                self.same(self.ours[item["type"]]["members"], [], f"{place} is here")
            else:
                self.compare(item["type"], cases[item["case"]], place)

    def kind(self, types: _Types, name: str) -> str:
        entry = types[name]
        return "string" if entry["meta-type"] == "enum" else entry.get("json-type") or entry["meta-type"]

    def same(self, ours: Any, theirs: Any, where: str) -> None:
        if ours != theirs:
            self.problems.append(f"{where}: {ours!r} is not {theirs!r}")


def test_introspection_agrees_with_the_reference() -> None:
    ours, theirs = _ours(), _reference()
    comparison = _Comparison(ours, theirs)
    for name in (*SCHEMA.commands, *SCHEMA.events):
        comparison.compare(name, name, name)
    assert comparison.problems == []


@pytest.mark.parametrize("change", ["member", "optional", "features", "type", "value"])
def test_comparison_notices_a_difference(change: str) -> None:
    """The comparison above must be able to fail."""
    theirs = _reference()
    arguments = theirs[theirs["block_resize"]["arg-type"]]
    if change == "member":
        arguments["members"].append({"name": "extra", "type": "str"})
    elif change == "optional":
        arguments["members"][0].pop("default")
    elif change == "features":
        theirs["block_resize"]["features"] = ["deprecated"]
    elif change == "type":
        arguments["members"][-1]["type"] = "str"
    else:
        modes = next(
            entry for entry in theirs.values() if "members" in entry and {"name": "hard"} in entry["members"]
        )
        modes["members"].remove({"name": "hard"})
    comparison = _Comparison(_ours(), theirs)
    for name in (*SCHEMA.commands, *SCHEMA.events):
        comparison.compare(name, name, name)
    assert comparison.problems


def test_every_type_named_is_described_once() -> None:
    entries = introspect()
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    for entry in entries:
        used = [entry.get("arg-type"), entry.get("ret-type"), entry.get("element-type")]
        used += [item.get("type") for item in entry.get("members", []) if entry["meta-type"] != "enum"]
        used += [item["type"] for item in entry.get("variants", [])]
        for name in used:
            assert name is None or name in names, (entry["name"], name)


def test_type_names_are_masked() -> None:
    for entry in introspect():
        if entry["meta-type"] in ("object", "enum", "alternate"):
            assert entry["name"].isdigit()
        elif entry["meta-type"] == "array":
            assert entry["name"] == f"[{entry['element-type']}]"


def test_introspection_is_what_query_qmp_schema_returns() -> None:
    """The answer passes the check of its own declared type."""
    entries = introspect()
    assert len(from_json(tuple[SchemaInfo, ...], entries)) == len(entries)
    assert json.loads(dumps(entries)) == entries


def test_introspection_lists_every_value_of_a_tag() -> None:
    types = _ours()
    options = types[types["blockdev-add"]["arg-type"]]
    driver = next(item for item in options["members"] if item["name"] == "driver")
    assert [item["case"] for item in options["variants"]] == types[driver["type"]]["values"]


def test_fixture_is_small_and_not_more_than_needed() -> None:
    assert _FIXTURE.stat().st_size < 160 * 1024
    named = {entry["name"] for entry in _reference().values() if entry["meta-type"] in ("command", "event")}
    assert named <= SCHEMA.commands.keys() | SCHEMA.events.keys()
