"""Writes tests/data/qmp_schema_reference.json: what the reference says about the commands and events declared here.

Usage: python tools/record_schema.py SCHEMA.json, where SCHEMA.json holds the reference's answer to
query-qmp-schema (the list itself). Run it when a command or event is declared; it takes only what is declared, and
the types that uses.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import qsd.qapi.schema  # noqa: F401  # fills SCHEMA
from qsd.qapi.core import SCHEMA

TARGET = Path(__file__).parents[1] / "tests" / "data" / "qmp_schema_reference.json"
ABOUT = (
    "The reference's answer to query-qmp-schema (11.1): the commands and events declared here and all types they "
    "use; the deprecated values lists are left out."
)


def named(entry: dict[str, Any]) -> list[str]:
    """The types an entry uses."""
    used = [entry.get("arg-type"), entry.get("ret-type"), entry.get("element-type")]
    if entry["meta-type"] != "enum":
        used += [item["type"] for item in entry.get("members", [])]
    used += [item["type"] for item in entry.get("variants", [])]
    return [name for name in used if name is not None]


def main(source: str) -> None:
    """Write the fixture."""
    entries = {entry["name"]: entry for entry in json.loads(Path(source).read_text())}
    wanted = [*SCHEMA.commands, *SCHEMA.events]
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            wanted += named(entries[name])
    lines = []
    for name in sorted(seen):
        entry = {key: value for key, value in entries[name].items() if key != "values"}
        lines.append(json.dumps(entry, separators=(",", ":")))
    TARGET.write_text(f'{{"about":{json.dumps(ABOUT)},\n"entries":[\n' + ",\n".join(lines) + "\n]}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
