"""Key slots of LUKS volumes, alone and inside qcow2: filled, overwritten, erased, refused."""

from __future__ import annotations

from typing import Any

from script import NEGOTIATE, Differs, Script, Step, call
from scripts_nodes import Steps, add, delete, options
from scripts_qcow2 import made, not_made

KIB = 1 << 10
SECRETS = {"s": "pw", "t": "other", "u": "third", "e": ""}
ARGUMENTS = tuple(word for name, data in SECRETS.items() for word in ("--object", f"secret,id={name},data={data}"))
# What is measured, made up, or up to the file system.
UNSEEN = frozenset({"iters", "master-key-iters", "uuid", "actual-size"})
QUICK = {"iter-time": 1}
LOOK: Steps = [call("query-named-block-nodes", flat=True)]


def amend(**more: Any) -> dict[str, Any]:
    given = {name.replace("_", "-"): value for name, value in more.items()}
    force = given.pop("force", None)
    forced = {} if force is None else {"force": force}
    return call("x-blockdev-amend", job_id="j", node_name="n", options=given, **forced)


def job(step: dict[str, Any], why: str = "") -> list[Step | Differs]:
    """A job to its end, and what the node says then; ``why`` it ends in another way."""
    end: Step | Differs = Differs(call("query-jobs"), why) if why else call("query-jobs")
    return [step, "until j concluded", end, call("job-dismiss", id="j"), "until j null", *LOOK]


def of_volume(**more: Any) -> dict[str, Any]:
    return amend(driver="luks", **more)


def of_image(**more: Any) -> dict[str, Any]:
    force = {"force": more.pop("force")} if "force" in more else {}
    encrypt = {"format": "luks", **{name.replace("_", "-"): value for name, value in more.items()}}
    return amend(driver="qcow2", encrypt=encrypt, **force)


def new_volume(name: str = "n") -> Steps:
    volume = {"file": f"f-{name}", "size": 64 * KIB, "key-secret": "s", "cipher-alg": "aes-128", **QUICK}
    return [
        *made("file", filename=name, size=0),
        add(options("file", f"f-{name}", filename=name)),
        *made("luks", **volume),
        add(options("luks", name, file=f"f-{name}", key_secret="s")),
    ]


def new_image(name: str = "n") -> Steps:
    encrypt = {"format": "luks", "key-secret": "s", "cipher-alg": "aes-128", **QUICK}
    return [
        *made("file", filename=name, size=0),
        add(options("file", f"f-{name}", filename=name)),
        *made("qcow2", file=f"f-{name}", size=64 * KIB, encrypt=encrypt),
        add(options("qcow2", name, file=f"f-{name}", encrypt={"format": "luks", "key-secret": "s"})),
    ]


def wrong(of: Any) -> Steps:
    """Refused before there is a job."""
    return [
        *(of(), of(state=None), of(state="nope"), of(state=1)),
        *(of(state="active", **{name: 1}) for name in ("new_secret", "old_secret", "secret")),
        *(of(state="active", keyslot=value) for value in ("1", 1.5, None, 1 << 63)),
        *(of(state="active", iter_time=value) for value in ("1", -(1 << 63) - 1)),
        *(of(state="active", new_secret="t", force=value) for value in (1, "on")),
        of(state="active", nope=1),
    ]


def refused(of: Any) -> Steps:
    """Refused by the job; slot 0 is the only one in use."""
    return [
        step
        for given in (
            {"state": "active"},
            {"state": "active", "keyslot": 1},
            {"state": "active", "new_secret": ""},
            {"state": "active", "new_secret": "zz"},
            {"state": "active", "new_secret": "t", "old_secret": "s"},
            {"state": "active", "new_secret": "t", "old_secret": "zz"},
            {"state": "active", "new_secret": "t", "secret": "zz"},
            {"state": "active", "new_secret": "t", "secret": "u"},
            {"state": "active", "new_secret": "zz", "secret": "u"},
            {"state": "active", "new_secret": "t", "keyslot": 8},
            {"state": "active", "new_secret": "t", "keyslot": -1},
            {"state": "active", "new_secret": "zz", "keyslot": 8},
            {"state": "active", "new_secret": "t", "keyslot": (1 << 63) - 1},
            {"state": "active", "new_secret": "t", "keyslot": 0},
            {"state": "active", "new_secret": "zz", "keyslot": 0, "force": False},
            {"state": "inactive"},
            {"state": "inactive", "force": True},
            {"state": "inactive", "keyslot": 8},
            {"state": "inactive", "keyslot": -1, "force": True},
            {"state": "inactive", "keyslot": 1},
            {"state": "inactive", "keyslot": 0},
            {"state": "inactive", "keyslot": 0, "old_secret": "s"},
            {"state": "inactive", "keyslot": 0, "old_secret": "u"},
            {"state": "inactive", "keyslot": 0, "old_secret": "u", "force": True},
            {"state": "inactive", "keyslot": 8, "old_secret": "zz"},
            {"state": "inactive", "keyslot": 1, "old_secret": "s"},
            {"state": "inactive", "old_secret": "s"},
            {"state": "inactive", "old_secret": "u"},
            {"state": "inactive", "old_secret": "u", "force": True},
            {"state": "inactive", "old_secret": "zz"},
            {"state": "inactive", "new_secret": "zz"},
            {"state": "inactive", "keyslot": 0, "new_secret": "t", "iter_time": 1},
            {"state": "inactive", "keyslot": 0, "iter_time": 1, "secret": "zz"},
            {"state": "inactive", "keyslot": 0, "secret": "s", "force": True},
        )
        for step in job(of(**given))
    ] + job(of(state="active", new_secret="t", keyslot=1 << 32), "the reference takes the lower half of the number")


# Slots come and go, to the last. The reference takes seconds to fill one.
LIVED: list[dict[str, Any]] = [
    {"state": "active", "new_secret": "t", "iter_time": 1, "keyslot": 7},
    {"state": "active", "new_secret": "u", "iter_time": 1, "keyslot": 7},
    {"state": "active", "new_secret": "u", "iter_time": 1, "keyslot": 7, "force": True},
    # Forced where nothing is in the way.
    {"state": "active", "new_secret": "e", "iter_time": 1, "secret": "u", "force": True},
    {"state": "inactive", "keyslot": 7, "old_secret": "t"},
    {"state": "inactive", "keyslot": 7, "old_secret": "t", "force": True},
    {"state": "inactive", "keyslot": 7, "old_secret": "u"},
    {"state": "inactive", "keyslot": 7},
    {"state": "inactive", "keyslot": 7, "force": True},
    {"state": "inactive", "keyslot": 0},
    # With what the node was opened nothing opens any more.
    {"state": "active", "new_secret": "s"},
    {"state": "inactive", "old_secret": "s"},
    {"state": "inactive", "keyslot": 1},
    {"state": "inactive", "old_secret": "e"},
    {"state": "inactive", "old_secret": "e", "force": True},
    {"state": "active", "new_secret": "s", "secret": "e"},
    {"state": "inactive", "keyslot": 1, "force": True},
    {"state": "inactive", "keyslot": 1},
]
LIVED_INSIDE: list[dict[str, Any]] = [
    {"state": "active", "new_secret": "t", "iter_time": 1},
    {"state": "inactive", "old_secret": "s"},
    {"state": "inactive", "old_secret": "t"},
    {"state": "inactive", "keyslot": 1, "force": True},
]


def lived(of: Any, changes: list[dict[str, Any]]) -> Steps:
    return [step for given in changes for step in job(of(**given))]


def opened(**more: Any) -> Steps:
    return [delete("n"), add(options(more.pop("driver"), "n", file="f-n", **more))]


# Passwords are text: others could be given to no other program.
_NO_TEXT: Steps = [
    NEGOTIATE,
    *(
        call("object-add", qom_type="secret", id=name, data=data, format="base64")
        for name, data in (("bytes", "/w=="), ("zero", "cHcAeA=="), ("surrogate", "7aCA"), ("text", "w6k="))
    ),
    *new_volume(),
    *new_image("i"),
    *(
        add(options("luks", "x", file=name, key_secret=secret))
        for secret in ("bytes", "zero", "surrogate", "text", "nope")
        for name in ({"driver": "file", "filename": "img"}, {"driver": "file", "filename": "n", "read-only": True})
    ),
    delete("i"),
    add(options("qcow2", "i", file="f-i", encrypt={"format": "luks", "key-secret": "zero"})),
    *(
        step
        for given in (
            {"state": "active", "new_secret": "bytes"},
            {"state": "active", "new_secret": "t", "secret": "bytes"},
            {"state": "inactive", "old_secret": "bytes"},
        )
        for step in job(of_volume(**given))
    ),
    *not_made("luks", file="f-i", size=64 * KIB, key_secret="bytes"),
    *not_made("qcow2", file="f-i", size=64 * KIB, encrypt={"format": "luks", "key-secret": "bytes"}),
]

SCRIPTS: dict[str, Script] = {
    "luks passwords that are no text": Script(_NO_TEXT, ARGUMENTS, unseen=UNSEEN),
    "luks key slots refused": Script(
        [
            NEGOTIATE,
            *new_volume(),
            *wrong(of_volume),
            amend(driver="luks", encrypt={"format": "luks", "state": "active"}),
            amend(driver="qcow2", state="active"),
            amend(driver="qcow2"),
            *refused(of_volume),
        ],
        ARGUMENTS,
        unseen=UNSEEN,
    ),
    "luks key slots": Script(
        [NEGOTIATE, *new_volume(), *lived(of_volume, LIVED), *opened(driver="luks", key_secret="s")],
        ARGUMENTS,
        unseen=UNSEEN,
    ),
    "qcow2 key slots refused": Script(
        [
            NEGOTIATE,
            *new_image(),
            *wrong(of_image),
            amend(driver="qcow2", state="active"),
            amend(driver="luks", state="active"),
            amend(driver="qcow2", encrypt=None),
            amend(driver="qcow2", encrypt={}),
            amend(driver="qcow2", encrypt={"format": "qcow"}),
            *job(amend(driver="qcow2")),
            *refused(of_image),
        ],
        ARGUMENTS,
        unseen=UNSEEN,
    ),
    "qcow2 key slots": Script(
        [
            NEGOTIATE,
            *new_image(),
            *lived(of_image, LIVED_INSIDE),
            *opened(driver="qcow2", encrypt={"format": "luks", "key-secret": "s"}),
        ],
        ARGUMENTS,
        unseen=UNSEEN,
    ),
}
