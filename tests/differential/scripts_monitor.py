"""The envelope, ids, numbers and strings, negotiation, out of band. What the reference says to broken JSON is
recorded in qmp_json_reference.json, each input on a connection of its own."""

from __future__ import annotations

from script import NEGOTIATE, Differs, Script, Step, call

_BEFORE: list[Step | Differs] = [
    {},
    [],  # type: ignore[list-item]  # no command at all
    {"id": 1},
    {"execute": 1},
    {"execute": "query-version"},
    {"execute": "nope"},
    {"execute": "query-version", "arguments": 1},
    {"exec-oob": "query-version"},
    call("qmp_capabilities", x=1),
    call("qmp_capabilities", enable=1),
    call("qmp_capabilities", enable=["x"]),
    call("qmp_capabilities", enable=["oob", 1]),
    call("qmp_capabilities", enable=[None]),
    "garbage ",
    '"text"',
    call("qmp_capabilities", enable=[]),
]

_ENVELOPE: list[Step | Differs] = [
    NEGOTIATE,
    NEGOTIATE,
    call("qmp_capabilities", enable=["x"]),
    call("qmp_capabilities", x=1),
    {},
    {"id": 1},
    {"execute": None},
    {"execute": ""},
    {"execute": "é"},
    {"execute": "x\0y"},
    {"execute": "query-commands", "x": 1},
    {"x": 1},
    {"execute": "nope", "arguments": 1},
    {"execute": "nope", "arguments": None},
    {"execute": "nope", "arguments": []},
    {"execute": "nope", "arguments": {"x": 1}},
    {"exec-oob": "query-version"},
    {"exec-oob": 1},
    {"execute": "nope", "exec-oob": "x"},
    {"execute": "nope", "id": {"a": [None, True, 1.5, "x"]}},
    call("query-name"),
    call("query-events"),
    call("stop"),
    call("human-monitor-command"),
    call("query-version", a=1),
    call("quit", a=1),
]

_JSON: list[Step | Differs] = [
    NEGOTIATE,
    "'a' ",
    "{'execute':'nope'} ",
    "{'execute':\"no'pe\",'id':'a\\'b'}",
    '{"execute":"nope","id":1e3} ',
    '{"execute":"nope","id":-0} ',
    '{"execute":"nope","id":0.1} ',
    '{"execute":"nope","id":123456789012345678901234567890} ',
    '{"execute":"nope","id":18446744073709551615} ',
    '{"execute":"nope","id":-9223372036854775808} ',
    '{"execute":"nope","id":-9223372036854775809} ',
    '{"execute":"nope","id":1.0} ',
    '{"execute":"nope","id":1e300} ',
    '{"execute":"nope","id":1e-300} ',
    '{"execute":"nope","id":5e-324} ',
    '{"execute":"nope","id":"\\u00e9é"} ',
    '{"execute":"nope","id":"\\u0000\\u007f\x7f"} ',
    '{"execute":"nope","id":"\\ud83d\\ude00"} ',
    '{"execute":"nope","id":"\\/\\b\\f\\n\\r\\t\\\\\\""} ',
    '{"execute":"nope","id":100000000000000000000.0} ',
    '{"execute":"nope","id":[1.5,2e10,1e17,1e16,123456.789]} ',
]

_OOB: list[Step | Differs] = [
    call("qmp_capabilities", enable=["oob", "oob"]),
    {"exec-oob": "query-version"},
    {"exec-oob": "nope"},
    {"exec-oob": ""},
    {"exec-oob": 1},
    {"exec-oob": "query-version", "arguments": 1},
    {"exec-oob": "query-version", "id": 4},
    {"execute": "query-version", "exec-oob": "x"},
    {"exec-oob": "qmp_capabilities"},
    NEGOTIATE,
    {"exec-oob": "query-version", "arguments": {"x": 1}},
    {"exec-oob": "query-version", "x": 1},
]

SCRIPTS: dict[str, Script] = {
    "before negotiation": Script(_BEFORE),
    "envelope": Script(_ENVELOPE),
    "json": Script(_JSON),
    "out of band": Script(_OOB),
}
